"""Two things timed in alternation: a real training run, and something else between its epochs."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.methods import METHODS, Method
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.graph import Compile
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose


def noise(count: int, size: int = 32) -> InMemoryImages:
    """Images for timing: their content does not matter."""
    data = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InMemoryImages(data, [str(i) for i in range(count)])


def two_query_method(name: str, encoder: Encoder, images: int) -> Method:
    """A method for so many images, whose trained network sees at least the two views that CLD compares."""
    build: Callable[..., Method] = METHODS[name.lower()]  # each has further parameters of its own
    method = build(encoder, images)
    method.online = max(2, method.online)
    return method


def plain_step(module: Pretrain, optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """A training step without the loop around it."""

    def step(batch: Batch) -> None:
        module.begin_step(optimizer)
        loss, update = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.end_step(update)

    return step


def beside(
    encoder: Encoder,
    method: Method,
    images: InMemoryImages,
    other: Callable[[], float],
    *,
    epochs: int,
    batch_size: int = 256,
    views: Views | None = None,
    compile: Compile = "off",
    cld: CrossLevel | None = None,
) -> tuple[list[float], list[float]]:
    """Seconds a step of the whole training run, and ``other``'s own figure, epoch by epoch in alternation.

    A step is measured from the end of one epoch's interruption to the beginning of the next: it has the data, the
    views, both branches, the optimizer, the logs and the checkpoint in it. The first epoch warms up, and compiles where
    that is asked for.
    """
    views = views or Views("cifar", 32)
    views.count = method.views
    batches = TrainBatches(images, batch_size, seed=0, bad_files=BadFiles())
    module = Pretrain(
        encoder, method, cld, views, steps=epochs * len(batches), warmup_steps=0, optimizer="sgd", lr=0.06,
        weight_decay=5e-4, seed=0,
    )  # fmt: skip
    ours: list[float] = []
    theirs: list[float] = []
    resumed = [time.perf_counter()]

    def interrupt() -> dict[str, float]:
        wait()
        ours.append((time.perf_counter() - resumed[0]) / len(batches))
        theirs.append(other())
        wait()
        resumed[0] = time.perf_counter()
        return {}

    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(file=io.StringIO())
        fit(
            module, batches, Path(folder), hardware=choose(), monitor=interrupt, monitor_every=1, console=quiet,
            compile=compile,
        )  # fmt: skip
    return ours[1:], theirs[1:]


def wait() -> None:
    """Wait until the GPU, where there is one, has finished its queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def median(values: list[float]) -> float:
    """The middle of the rounds: a busy machine spoils some."""
    return statistics.median(values)


def machine() -> str:
    """One line for every table."""
    return f"{choose().reason}; torch {torch.__version__}"


def dated() -> str:
    """The same with the day, for results that no record has."""
    return f"{machine()}; {time.strftime('%Y-%m-%d')}"
