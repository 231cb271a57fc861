"""The training step compiled: the encoder and the views by torch.compile, and on CUDA the whole step as one CUDA graph.

A step of small images is hundreds of short kernels, which a GPU finishes faster than Python can launch them. Captured
once, all of them, from the views to the optimizer and the method's memory, are one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms import masked
from crosslevel.transforms.parameters import draw
from crosslevel.transforms.philox import Counted
from crosslevel.utils.console import say
from crosslevel.utils.device import Hardware

Compile = Literal["auto", "on", "off"]

PAYS = 2000  # steps from which on half a minute of compiling pays off at 32 pixels, by some 20 ms a step
WARM = 3  # steps before the capture: they compile, choose algorithms, and fill the optimizer's memory
BACKEND = "inductor"
Backend = str | Callable[..., Any]
"""A compiler of torch.compile's: its name, or a function of a graph and its inputs."""
Step = Callable[[Batch], None]


class Choice(NamedTuple):
    """Whether to compile the ``encoder`` (with the views) and the whole step as a ``graph``; and a message."""

    encoder: bool
    graph: bool
    line: str


def choose(mode: Compile, steps: int, module: Pretrain, hardware: Hardware, devices: int, batches: Any) -> Choice:
    """Choose what to compile, by the number of remaining steps."""
    kind = hardware.device.type
    if mode == "off" or (mode == "auto" and kind != "cuda"):
        return Choice(False, False, "")
    if mode == "auto" and steps < PAYS:
        return Choice(False, False, f"not compiled: {steps:,} steps earn too little ({PAYS:,} or more pay for it)")
    if devices > 1:
        return Choice(False, False, f"not compiled: {devices} devices wait for each other within a step")
    if kind == "mps":
        return Choice(False, False, "not compiled: torch.compile on Apple's GPUs is not tried here")
    against = "it needs CUDA" if kind != "cuda" else obstacle(module, hardware, batches)
    if against:
        return Choice(True, False, f"compiled: the encoder and the views; no CUDA graph of the step: {against}")
    return Choice(True, True, f"compiled: the step as one CUDA graph, in about half a minute, for {steps:,} steps")


def obstacle(module: Pretrain, hardware: Hardware, batches: Any) -> str:
    """The reason why the step cannot be captured; empty if it can."""
    cld, method, name = module.cld, module.method, module.optimizer_name
    reasons = {
        "a stream's batches may differ in shape": not isinstance(batches, TrainBatches),
        f"the optimizer {name} decides on the host": name != "sgd",
        "float16's scale is decided on the host": hardware.precision == "fp16",
        f"cld.grouping={cld and cld.grouping} decides on the host": cld is not None and cld.grouping != "kmeans",
        f"cld.init={cld and cld.init} is drawn on the host": cld is not None and cld.init != "first",
        method.host_decision: bool(method.host_decision),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def compiled(module: Pretrain, drawing: bool = False, backend: Backend = BACKEND) -> None:
    """Compile all encoders in place, moving averages as well, and how views are made; names and weights stay.

    ``drawing``: compile the drawing of their parameters, too; the step's number must then be a tensor.
    """
    how: dict[str, Any] = {"backend": backend, "dynamic": False}
    for encoder in _encoders(module):
        encoder.compile(**how)
    module.views.make = torch.compile(masked.view, **how)
    if drawing:
        module.views.draw = torch.compile(draw, **how)
        module.views.words = torch.compile(Counted.words, **how)


def as_before(module: Pretrain) -> None:
    """Undo `compiled`."""
    for encoder in _encoders(module):
        encoder._compiled_call_impl = None
    module.views.make, module.views.draw, module.views.words = masked.view, draw, Counted.words


def _encoders(module: Pretrain) -> list[Encoder]:
    """The trained encoder and a method's moving averages of it."""
    return [part for part in module.modules() if isinstance(part, Encoder)]


class Compiled:
    """A compiled step, which falls back to the plain step if it fails; one line says why."""

    def __init__(self, step: Step, module: Pretrain, console: Console, backend: Backend = BACKEND) -> None:
        self.step, self.module, self.console = step, module, console
        self.is_warm = False
        compiled(module, backend=backend)

    def __call__(self, batch: Batch) -> None:
        """One step."""
        if self.is_warm:
            self.step(batch)
            return
        done, before = self.module.step, _Statistics(self.module)
        try:
            self.step(batch)
        except Exception as error:
            # A failure here comes before the optimizer's step, but perhaps after a forward pass.
            if self.module.step != done or not _of_compiler(error):
                raise
            as_before(self.module)
            before.restore()
            say(self.console, f"not compiled: {_reason(error)}")
            self.step(batch)
        self.is_warm = True


class Captured:
    """The step as one CUDA graph, from the views to the method's memory.

    The first ``warm`` steps run without capture; the next step is captured, and from then on replayed. Values that
    differ from step to step (images, indices, the rate, the step's number) are written into static tensors.
    """

    def __init__(
        self,
        module: Pretrain,
        optimizer: torch.optim.Optimizer,
        hardware: Hardware,
        console: Console,
        eager: Step,
        warm: int = WARM,
        backend: Backend = BACKEND,
    ) -> None:
        self.module, self.optimizer, self.hardware, self.console, self.eager_step = (
            module, optimizer, hardware, console, eager
        )  # fmt: skip
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch | None = None
        self.warm, self.step_count, self.failed = warm, 0, False
        module.keep_on(hardware.device, optimizer)
        compiled(module, drawing=True, backend=backend)

    def __call__(self, batch: Batch) -> None:
        """One step."""
        if self.failed or (self.batch is not None and self.batch.images.shape != batch.images.shape):
            self.eager_step(batch)
            return
        if self.batch is None:
            partners = None if batch.partners is None else batch.partners.clone()
            self.batch = Batch(batch.images.clone(), batch.labels.clone(), batch.index.clone(), partners)
        for buffer, new in zip(self.batch, batch, strict=True):
            if buffer is not None and new is not None:
                buffer.copy_(new, non_blocking=True)
        self.module.begin_step(self.optimizer)
        if self.step_count == 0 and self.warm:
            self._or_eagerly(self._aside)
        elif self.step_count < self.warm:
            self._aside()
        elif self.graph is None:
            self._or_eagerly(self._capture)
        if self.graph is not None:
            self.graph.replay()
        self.step_count += 1
        self.module.step += 1

    def _or_eagerly(self, action: Callable[[], None]) -> None:
        """Run it, or fall back to the plain step and say why; a failure comes before the optimizer's step."""
        before = _Statistics(self.module)
        try:
            action()
        except Exception as error:
            self.failed = True
            as_before(self.module)
            before.restore()
            self.module.begin_step(self.optimizer)  # the fallback draws the same random numbers
            say(self.console, f"no CUDA graph of the step: {_reason(error)}")
            self._work()

    def _aside(self) -> None:
        """A step on another stream, which a capture requires before."""
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):
                self._work()
        finally:
            here.wait_stream(stream)

    def _capture(self) -> None:
        """Record the step; this computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._work()
        self.graph = graph

    def _work(self) -> None:
        """The computation of a step."""
        module, precision = self.module, self.hardware.precision
        assert self.batch is not None

        def forward(part: Batch) -> tuple[Tensor, Any]:
            # Casts in autocast's cache would outlive their graph.
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                return cast("tuple[Tensor, Any]", module(part))

        self.optimizer.zero_grad()
        updates = module.gradients(self.batch, forward, Tensor.backward)
        self.optimizer.step()
        module.remember(*updates)


class _Statistics:
    """A copy of the running statistics of batch normalization, to undo a forward pass whose step failed."""

    def __init__(self, module: Pretrain) -> None:
        normalizing = (part for part in module.modules() if isinstance(part, _BatchNorm))
        self.saved = [(buffer, buffer.clone()) for part in normalizing for buffer in part.buffers(recurse=False)]

    def restore(self) -> None:
        """Put the copied statistics back."""
        for buffer, before in self.saved:
            buffer.copy_(before)


def _of_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _reason(error: Exception) -> str:
    """The error in one line: a compiler's first line names the failed component, its second the reason."""
    return " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__


def flags(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor | bool | None]]:
    """Each parameter group's ``fused`` and ``lr`` on this device: a checkpoint may have another device's."""
    return [{name: group[name] for name in ("fused", "lr") if name in group} for group in optimizer.param_groups]
