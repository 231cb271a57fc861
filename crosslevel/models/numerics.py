"""Measures whether this machine computes a network's layers correctly in low precision; others are set to float32.

Libraries of fast kernels have faults that depend on the processor and on untested shapes. In oneDNN the weight gradient
of a strided convolution over a map of one pixel is uninitialized memory (docs/numerics.md). A training does not reveal
this: its loss falls, rises, or is no number a hundred steps later.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from crosslevel.utils.console import say
from crosslevel.utils.device import Hardware
from crosslevel.utils.rng import seeded

LIMIT = 0.05
"""The largest error of a tensor, relative to its norm: rounding to bfloat16 makes 0.003, faults make 0.03 to inf."""

_IMAGES = 8  # the most images for a measured layer: known faults do not depend on their number (measured from 1 to 512)
_WORK = 3e7  # products: a layer that takes more is measured on fewer images, and of a large map on its upper rows
_M_PERTURB, _FILL = -6, 0x80  # from glibc's malloc.h; new memory is filled with the complement, 0x7f


class Fault(NamedTuple):
    """A layer's ``name`` in its network, its input's ``shape`` without the batch, and the wrong ``tensor``."""

    name: str
    shape: tuple[int, ...]
    tensor: str


def avoid_faults(
    network: nn.Module, run: Callable[[], object], hardware: Hardware, *, model: nn.Module | None = None
) -> str:
    """Measure every convolution and linear layer at its own shapes; those that are wrong are set to compute in float32.

    On a CPU in low precision only: nothing is done elsewhere. Weights, statistics, gradients and torch's random numbers
    stay as they are.

    Args:
        network: as it will be trained, on the CPU.
        run: calls the network with images of each size that it will be trained on; two of zeros suffice.
        hardware: the device and the precision of the training.
        model: a module that holds further copies of the network, such as a moving average; their layers are set as
            well.

    Returns:
        one line for the user; empty where all is right.

    """
    if hardware.device.type != "cpu" or hardware.precision == "fp32":
        return ""
    faults, layers = _measured(network, run, hardware), dict(network.named_modules())
    wrong = {_settings(layers[fault.name]) for fault in faults}
    for layer in (model or network).modules():
        # For every shape: a detector's images differ in size, and such layers are few and small.
        if isinstance(layer, _LAYERS) and _settings(layer) in wrong:
            layer.forward = functools.partial(_in_float32, layer)  # type: ignore[method-assign]
    return _message(faults, hardware.precision)


def glance(encoder: Callable[[Tensor], object], *sizes: int, channels: int = 3) -> None:
    """Encode two images of zeros of each size (pixels)."""
    for size in sizes:
        encoder(torch.zeros(2, channels, size, size).contiguous(memory_format=torch.channels_last))


@functools.cache
def say_once(console: Console | None, line: str) -> None:
    """Print a line once on each console, without wrapping it."""
    if console is not None:
        say(console, line, unbroken=True)


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, computed in float32 even under autocast, and returned in autocast's type."""
    plain: Any = type(layer).forward
    if not torch.is_autocast_enabled("cpu"):
        out: Tensor = plain(layer, x)
        return out
    with torch.autocast("cpu", enabled=False):
        out = plain(layer, x.float())
    return out.to(torch.get_autocast_dtype("cpu"))


def _measured(network: nn.Module, run: Callable[[], object], hardware: Hardware) -> list[Fault]:
    faults: list[Fault] = []
    results: dict[str, str] = {}
    for name, layer, shape, last in _calls(network, run):
        key = (_settings(layer), [p.requires_grad for p in layer.parameters()], shape, last)
        if repr(key) not in results:
            results[repr(key)] = _wrong(layer, _numbers(layer, shape, last), hardware)
        if results[repr(key)]:
            faults.append(Fault(name, shape, results[repr(key)]))
    return faults


def _calls(network: nn.Module, run: Callable[[], object]) -> list[tuple[str, nn.Module, tuple[int, ...], bool]]:
    """Every layer, once for each input shape (without the batch), and whether the input is channels last."""
    calls: dict[tuple[str, tuple[int, ...]], tuple[nn.Module, bool]] = {}

    def record(name: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        calls[name, tuple(x.shape[1:])] = (layer, x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(record, name))
        for name, layer in network.named_modules()
        if isinstance(layer, _LAYERS)
    ]
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            network.eval()
            run()
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
    return [(name, layer, shape, last) for (name, shape), (layer, last) in calls.items()]


def _numbers(layer: nn.Module, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Random input of a shape (given without the batch), with as many images and rows as are cheap to compute."""
    weight: Any = layer.weight
    positions = math.prod(shape[:-1] if isinstance(layer, nn.Linear) else shape[1:])
    images = max(1, min(_IMAGES, int(_WORK / (weight.numel() * positions))))
    if isinstance(layer, nn.Conv2d):
        rows = max(2 * weight.shape[-2], int(2 * _WORK / (weight.numel() * shape[2])))
        shape = (shape[0], min(shape[1], rows), shape[2])
    x = torch.randn(images, *shape, generator=seeded(0))
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def _wrong(layer: nn.Module, x: Tensor, hardware: Hardware) -> str:
    """The names of a layer's outputs and gradients that are wrong in low precision; empty if none is."""
    right = _results(layer, x)
    with hardware.autocast(), _dirty_memory():
        low_precision = _results(layer, x)
    return " and ".join(
        name
        for (name, a), (_, b) in zip(low_precision, right, strict=True)
        # Written so that a NaN is wrong.
        if not bool((a.float() - b).norm() <= LIMIT * b.norm())
    )


def _results(layer: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """The layer's output, and the gradients of its input and its trained parameters."""
    x = x.clone().requires_grad_()
    trained = {f"{name} gradient": p for name, p in layer.named_parameters() if p.requires_grad}
    inputs, plain = {"input gradient": x, **trained}, type(layer).forward
    with torch.enable_grad():
        out = plain(layer, x)
        upstream = torch.randn(out.shape, generator=seeded(1)).to(out.dtype)
        gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
    return [("output", out.detach()), *zip(inputs, gradients, strict=True)]


@contextmanager
def _dirty_memory() -> Iterator[None]:
    """Fill new memory with large numbers, if the C library supports it (glibc).

    New memory is mostly zeros, which hides a kernel that forgets to write zeros: without this, the measurement would
    miss some faults that a training meets.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_PERTURB, _FILL)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    """The settings that select a layer's kernel."""
    weight: Any = layer.weight
    names = ("stride", "padding", "dilation", "groups")
    return (type(layer), tuple(weight.shape), *(getattr(layer, name, None) for name in names))


def _message(faults: list[Fault], precision: str) -> str:
    if not faults:
        return ""
    (name, shape, tensor), layers = faults[0], len({fault.name for fault in faults})
    more = "" if layers == 1 else f" and of {layers - 1} more layer{'s' if layers > 2 else ''}"
    size = "x".join(str(side) for side in shape)
    return (
        f"{precision} is wrong on this processor: the {tensor} of {name} (input {size}){more}; computed in float32 "
        "instead, see docs/numerics.md"
    )
