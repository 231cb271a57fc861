"""What is compiled of a run, by the rule and when it fails; the losses stay. The capture itself needs a GPU."""

import io

import pytest
import torch
from rich.console import Console
from test_static_step import batch_of, training

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.methods import METHODS
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop import graph
from crosslevel.training.loop.fit import fit
from crosslevel.transforms import parameters
from crosslevel.utils.device import Hardware, choose

CUDA = Hardware(torch.device("cuda"), "bf16", "")
CPU = Hardware(torch.device("cpu"), "fp32", "")


def batches(count=8):
    data = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TrainBatches(InMemoryImages(data, [str(i) for i in range(count)]), 8, seed=0, bad_files=BadFiles())


@pytest.fixture
def console():
    return Console(file=io.StringIO(), soft_wrap=True)


def said(console):
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("wanted", "steps", "hardware", "devices", "encoder", "whole", "line"),
    [
        ("off", 10**6, CUDA, 1, False, False, ""),
        ("auto", 10**6, CPU, 1, False, False, ""),
        ("auto", graph.PAYS, CUDA, 1, True, True, "one CUDA graph"),
        ("auto", graph.PAYS - 1, CUDA, 1, False, False, "earn too little"),
        ("on", 5, CUDA, 1, True, True, "one CUDA graph"),
        ("on", 5, CPU, 1, True, False, "it needs CUDA"),
        ("on", 10**6, CUDA, 2, False, False, "2 devices wait for each other"),
        ("on", 10**6, CUDA._replace(precision="fp16"), 1, True, False, "float16's scale"),
    ],
)
def test_what_is_compiled(wanted, steps, hardware, devices, encoder, whole, line):
    choice = graph.choose(wanted, steps, training("moco", True, 8), hardware, devices, batches())
    assert (choice.encoder, choice.graph) == (encoder, whole)
    assert line in choice.line
    assert choice.line.count("\n") == 0
    assert bool(choice.line) == bool(line)


@pytest.mark.parametrize(("place", "value", "reason"), [
    ("cld.grouping", "normalized-cut", "cld.grouping=normalized-cut decides on the host"),
    ("cld.init", "kmeans++", r"cld.init=kmeans\+\+ is drawn on the host"),
    ("method.splits", 2, "method.splits=2 deals out the keys"),
    ("method.sharded", True, "method.sharded: which rows"),
    ("optimizer_name", "lars", "the optimizer lars"),
])  # fmt: skip
def test_what_cannot_be_captured_says_why(place, value, reason):
    *parts, name = place.split(".")
    module = training("npid" if name == "sharded" else "moco", True, 8)
    setattr(getattr(module, parts[0]) if parts else module, name, value)
    choice = graph.choose("auto", 10**6, module, CUDA, 1, batches())
    assert (choice.encoder, choice.graph) == (True, False)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(choice.line)
    module = training("npid", True, 8)  # which has no keys to deal out
    module.method.splits = 2
    assert graph.choose("auto", 10**6, module, CUDA, 1, batches()).graph
    assert "may differ in shape" in graph.choose("auto", 10**6, training("moco", True, 8), CUDA, 1, []).line


def losses_of(step, module, count=3):
    found = []
    for number in range(count):
        step(batch_of_step(number))
        found.append(float(module.losses["loss"]))
    return torch.tensor(found)


def batch_of_step(number):
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return batch_of(8)


def usual(module, optimizer):
    def step(batch):
        module.begin_step(optimizer)
        loss, kept = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.end_step(kept)

    return step


def seeded(name):
    torch.manual_seed(3)
    return training(name, True, 8)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_step_whose_schedules_are_tensors_is_the_usual_one(name):
    """Rate, averages and the step's number in tensors, as a captured step has them."""
    plain, kept = seeded(name), seeded(name)
    first, second = plain.configure_optimizer(), kept.configure_optimizer()
    kept.keep_on(torch.device("cpu"), second)
    expected = losses_of(usual(plain, first), plain)
    torch.testing.assert_close(losses_of(usual(kept, second), kept), expected, rtol=1e-4, atol=1e-5)
    assert kept.now.item() == 2
    assert second.param_groups[0]["lr"].item() == pytest.approx(first.param_groups[0]["lr"])
    for a, b in zip(plain.state_dict().values(), kept.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_a_capture_that_fails_is_told_and_the_training_goes_on(console):
    """Here there is no GPU: exactly what fails, in the first step and without a trace in what the method remembers."""
    plain, tried = seeded("npid"), seeded("npid")
    first, second = plain.configure_optimizer(), tried.configure_optimizer()
    with parameters.in_pieces(False):
        step = graph.Captured(tried, second, CPU, console, usual(tried, second), warm=0, backend="eager")
        expected = losses_of(usual(plain, first), plain)
        torch.testing.assert_close(losses_of(step, tried), expected, rtol=1e-4, atol=1e-5)
    assert said(console).startswith("no CUDA graph of the step: ")
    assert said(console).count("\n") == 1
    torch.testing.assert_close(tried.method.bank.rows, plain.method.bank.rows, rtol=1e-3, atol=1e-4)
    assert (tried.step, step.failed, tried.encoder._compiled_call_impl) == (3, True, None)


def refuses(graph_module, inputs):
    """A compiler that fails."""
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize("backend", ["eager", refuses])
def test_a_compiled_encoder_gives_the_same_losses(tmp_path, console, backend):
    how, ends = {"hardware": choose("cpu", "fp32"), "console": console, "backend": backend}, []
    for wanted in ("off", "on"):
        module = seeded("simclr")
        module.steps = 2
        fit(module, batches(), tmp_path / wanted, compile=wanted, **how)
        ends.append(module)
        compiled = module.encoder._compiled_call_impl is not None
        assert compiled == (wanted == "on" and backend == "eager")
    assert ("not compiled: " in said(console)) == (backend != "eager")
    assert ("no compiler here" in said(console)) == (backend != "eager")
    assert "compiled: the encoder and the views; no CUDA graph of the step: it needs CUDA" in said(console)
    for a, b in zip(*(end.state_dict().values() for end in ends), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["moco", "byol", "dino"])
def test_the_encoders_that_make_keys_and_targets_are_compiled_too(console, name):
    plain, tried = seeded(name), seeded(name)
    first, second = plain.configure_optimizer(), tried.configure_optimizer()
    compiled = []

    def backend(graph_module, inputs):
        if len(inputs) > len(list(tried.encoder.parameters())):
            compiled.append(any(tensor.requires_grad for tensor in inputs))
        return graph_module

    step = graph.Compiled(usual(tried, second), tried, console, backend)
    encoders = [part for part in tried.modules() if isinstance(part, Encoder)]
    assert [part._compiled_call_impl is None for part in encoders] == [False, False]
    expected = losses_of(usual(plain, first), plain, 2)
    torch.testing.assert_close(losses_of(step, tried, 2), expected, rtol=1e-5, atol=1e-6)
    assert set(compiled) == {True, False}  # with gradients, and the averages without
    for a, b in zip(plain.state_dict().values(), tried.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    graph.as_before(tried)
    assert all(part._compiled_call_impl is None for part in encoders)
    assert said(console) == ""


def test_a_step_that_fails_after_its_forward_pass_counts_once(console):
    """As where the backward pass cannot be compiled: batch normalizations have seen the batch by then."""
    plain, tried = seeded("simclr"), seeded("simclr")
    first, second = plain.configure_optimizer(), tried.configure_optimizer()
    forward = tried.method.forward

    def fails(*arguments):
        tried.method.forward = forward
        raise torch._dynamo.exc.TorchDynamoException("no backward pass here")

    step = graph.Compiled(usual(tried, second), tried, console)
    tried.method.forward = fails
    graph.as_before(tried)  # what was compiled makes no difference here
    expected = losses_of(usual(plain, first), plain, 2)
    torch.testing.assert_close(losses_of(step, tried, 2), expected, rtol=1e-4, atol=1e-5)
    assert said(console) == "not compiled: no backward pass here\n"
    for a, b in zip(plain.state_dict().values(), tried.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
