"""Layers that a processor computes wrong are found and avoided: faults made by hand, and this processor's own."""

import copy
import ctypes
import io
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from crosslevel.models.encoder import Encoder
from crosslevel.models.numerics import avoid_faults, glance, say_once
from crosslevel.utils.device import Hardware

BF16 = Hardware(torch.device("cpu"), "bf16", "")
KINDS = ["output", "input gradient", "weight gradient"]


class _Spoiled(torch.autograd.Function):
    """The value itself; its gradient times ``factor``."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Faulty(nn.Conv2d):
    """``what`` is ``factor`` times what it should be, in low precision and on maps of one pixel."""

    def __init__(self, channels, what, factor=float("nan")):
        super().__init__(channels, channels, 3, padding=1)
        self.what, self.factor, self.low = what, factor, 0

    def forward(self, x):
        if not torch.is_autocast_enabled("cpu") or x.shape[-1] > 1:
            return super().forward(x)
        self.low += 1
        x = _Spoiled.apply(x, self.factor) if self.what == "input gradient" else x
        weight = _Spoiled.apply(self.weight, self.factor) if self.what == "weight gradient" else self.weight
        out = self._conv_forward(x, weight, self.bias)
        return out + (self.factor - 1) * out.detach() if self.what == "output" else out


def network(what, factor=float("nan"), last=16):
    """Images of 2 pixels leave one for the faulty layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        Faulty(16, what, factor),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, last),
    )


def run(model, size=2):
    return lambda: glance(model, size)


def in_low_precision(model, size=2, images=4):
    """Gradients of the first convolution and of the faulty one, in bfloat16 and in float32."""
    found = []
    for enabled in (True, False):
        x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(x).float().square().sum()
        found.append(torch.autograd.grad(loss, [model[0].weight, model[2].weight]))
    return found


def within(limit, found, right):
    """Whether all tensors' errors are below ``limit``, relative to their norms; those of a NaN are not."""
    pairs = zip((a.double() for a in found), (b.double() for b in right), strict=True)
    return all(bool((a - b).norm() <= limit * b.norm()) for a, b in pairs)


@pytest.mark.parametrize("factor", [1.2, float("nan")])
@pytest.mark.parametrize("what", KINDS)
def test_a_wrong_layer_is_named_and_computed_in_float32(what, factor):
    model = network(what, factor)
    assert not within(0.05, *in_low_precision(model))
    told = avoid_faults(model, run(model), BF16)
    assert told == (
        f"bf16 is wrong on this processor: the {what} of 2 (input 16x1x1); computed in float32 instead, "
        "see docs/numerics.md"
    )
    assert within(0.02, *in_low_precision(model))
    # What is right stays in the precision that was asked for, and what follows gets what it would have got.
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.zeros(1, 3, 2, 2)).dtype == model[2](torch.zeros(1, 16, 1, 1)).dtype == torch.bfloat16
    assert model[2](torch.zeros(1, 16, 1, 1)).dtype == torch.float32
    assert avoid_faults(model, run(model), BF16) == told


@pytest.mark.parametrize(("size", "factor"), [(2, 1.01), (4, float("nan"))], ids=["rounding", "other-shapes"])
def test_what_is_right_stays_as_it_is(size, factor):
    model = network("output", factor)
    assert avoid_faults(model, run(model, size), BF16) == ""
    assert "forward" not in vars(model[2])


def test_more_layers_are_counted():
    model = nn.Sequential(*(Faulty(16, "output") for _ in range(3)), Faulty(16, "weight gradient"))
    told = avoid_faults(model, lambda: model(torch.zeros(2, 16, 1, 1)), BF16)
    assert told.startswith("bf16 is wrong on this processor: the output of 0 (input 16x1x1) and of 3 more layers; comp")


@pytest.mark.parametrize(
    "hardware", [Hardware(torch.device("cpu"), "fp32", ""), BF16._replace(device=torch.device("cuda"))]
)
def test_nothing_is_measured_where_no_low_precision_meets_a_cpu(hardware):
    def never():
        raise AssertionError

    assert avoid_faults(network("output"), never, hardware) == ""


def test_the_measure_leaves_no_trace():
    model = network("weight gradient")
    model[1].eval()
    before, draws = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    avoid_faults(model, run(model), BF16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert [part.training for part in model] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_pre_hooks for part in model)


def test_copies_are_set_too_and_keep_their_own_weights():
    model = network("output")
    twin = copy.deepcopy(model).requires_grad_(False)
    avoid_faults(model, run(model), BF16, model=nn.ModuleList([model, twin]))
    later = copy.deepcopy(model)
    for other in (twin, later):
        nn.init.constant_(other[2].weight, 0.5)
    x, calls = torch.ones(2, 16, 1, 1), model[2].low
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [part[2](x).float() for part in (model, twin, later)]
    for part, output in zip((model, twin, later), outputs, strict=True):
        right = x[:, :, 0, 0] @ part[2].weight[:, :, 1, 1].T + part[2].bias
        torch.testing.assert_close(output[:, :, 0, 0], right, rtol=0.01, atol=0.01)
    assert (model[2].low, twin[2].low) == (calls, 0)


def test_a_line_is_told_once_on_a_console_and_by_one_rank(monkeypatch):
    first, second = Console(file=io.StringIO()), Console(file=io.StringIO())
    for console in (first, first, second, None):
        say_once(console, "[wrong] there")
        say_once(console, "")
    assert first.file.getvalue() == second.file.getvalue() == "[wrong] there\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    say_once(first, "another")
    assert first.file.getvalue() == "[wrong] there\n"


@contextmanager
def used_memory():
    """Memory comes as if it had been used: full of large numbers (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        pytest.skip("needs glibc, which can fill memory")
    mallopt(-6, 0x80)
    try:
        yield
    finally:
        mallopt(-6, 0)


def by_products(conv, x):
    """A convolution as a product of matrices in float64, in which no kernel for convolutions takes part."""
    weight, groups = conv.weight.double(), conv.groups
    columns = F.unfold(x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    columns = columns.unflatten(1, (groups, -1))
    out = weight.reshape(groups, -1, columns.shape[2]) @ columns
    side = [
        (n + 2 * p - k) // s + 1
        for n, p, k, s in zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
    ]
    return out.flatten(1, 2).unflatten(2, side)


def test_the_documented_case_is_wrong_where_it_is_avoided():
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    right, found = told.split("tensor(")[1:]
    assert not re.search("inf|nan", right)
    conv = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)
    assert bool(re.search("inf|nan", found)) == bool(avoid_faults(conv, lambda: conv(torch.zeros(2, 64, 1, 1)), BF16))


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" not in os.environ, reason="for processes that are told an instruction set")
def test_the_processor_is_told_its_instruction_set(capfd):
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        F.conv2d(torch.ones(2, 16, 4, 4), torch.ones(16, 16, 3, 3))
    told = re.search("cpu,isa:(.*)", capfd.readouterr().out)[1]
    marks = [mark for mark in ("AVX2", "AVX-512", "bfloat16", "AMX") if mark in told]
    wanted = {
        "AVX2": ["AVX2"],
        "AVX512_CORE": ["AVX-512"],
        "AVX512_CORE_BF16": ["AVX-512", "bfloat16"],
        "AVX512_CORE_AMX": ["bfloat16", "AMX"],
    }
    assert marks[-2:] == wanted[os.environ["ONEDNN_MAX_CPU_ISA"]]


# Strided over a pixel, in one dimension and in groups; a whole map of 16 channels; what networks have otherwise.
LAYERS = {
    "3x3/2": (1, nn.Conv2d(16, 32, 3, 2, 1, bias=False)),
    "7x7/2": (1, nn.Conv2d(3, 16, 7, 2, 3, bias=False)),
    "3x3/3": (2, nn.Conv2d(64, 64, 3, 3, 1, bias=False)),
    "depthwise": (1, nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False)),
    "groups": (1, nn.Conv2d(64, 64, 3, 2, 1, groups=4, bias=False)),
    "whole map": (4, nn.Conv2d(16, 32, 4, 4, bias=False)),
    "1x1/2": (4, nn.Conv2d(32, 64, 1, 2, bias=False)),
    "3x3": (4, nn.Conv2d(32, 32, 3, 1, 1, bias=False)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels-last"])
@pytest.mark.parametrize("layer", LAYERS)
def test_this_processor_computes_what_products_of_matrices_give(layer, channels_last):
    """Each layer alone, in bfloat16 and on memory that was used; run under each instruction set too."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size, conv = LAYERS[layer]
    conv = copy.deepcopy(conv).to(memory_format=layout)
    x = torch.randn(9, conv.in_channels, size, size).to(memory_format=layout).requires_grad_()
    avoid_faults(conv, lambda: conv(x), BF16)
    upstream = torch.randn_like(by_products(conv, x), dtype=torch.float32)
    right = torch.autograd.grad(by_products(conv, x), [x, conv.weight], upstream.double())
    with used_memory(), torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        found = torch.autograd.grad(out, [x, conv.weight], upstream.to(out.dtype))
    assert within(0.02, (out, *found), (by_products(conv, x), *right))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 16, {"small_images": False, "width": 0.0625, "zero_init_last": False}),
        ("efficientnet_b0", 16, {}),
    ],
)
def test_this_processor_trains_a_network(name, size, options):
    """The gradient of every convolution of a whole network, at maps of one pixel, is that of float32."""
    torch.manual_seed(0)
    encoder = Encoder(name, **options).to(memory_format=torch.channels_last).eval()
    avoid_faults(encoder, lambda: glance(encoder, size), BF16)
    weights = [p for p in encoder.parameters() if p.ndim == 4]
    x = torch.randn(8, 3, size, size).to(memory_format=torch.channels_last)
    found = []
    for enabled in (True, False):
        with used_memory(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(encoder(x).float().square().sum(), weights))
    # Rounding adds up over the layers to 0.16 at most (four seeds, AVX2 and AMX); of the fault it is infinite.
    assert within(0.3, *found)
