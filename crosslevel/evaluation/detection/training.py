"""Fine-tuning a detector: its schedule, its batches, its steps, and the statistics it is tested with."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.data.sources.annotated.annotations import Annotated, Objects
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.rng import generator, mixed
from crosslevel.utils.tensors import load_saved, write_saved

BATCH = 16
"""Images an iteration for which the learning rate is given."""

_Sample = tuple[UInt8[Tensor, "3 H W"], Objects]


class Diverged(UserError):
    """The loss is no longer a number; the message says which one, and when."""


class Schedule(NamedTuple):
    """The learning rate over ``iterations`` of ``batch_size`` images.

    ``rate`` is for 16 images and grows with their number; it falls to a tenth at each of ``steps``, which are parts of
    all iterations; it rises for ``warmup`` iterations, but for no more than a tenth of all.
    """

    iterations: int = 24_000
    batch_size: int = BATCH
    rate: float = 0.02
    steps: tuple[float, ...] = (18 / 24, 22 / 24)
    warmup: int = 100

    def at(self, n: int) -> float:
        """The learning rate of iteration ``n``, counted from 0."""
        rate = self.rate * self.batch_size / BATCH
        rate *= 0.1 ** sum(n >= round(step * self.iterations) for step in self.steps)
        warmup = min(self.warmup, self.iterations // 10)
        return rate * (0.001 + 0.999 * n / warmup) if n < warmup else rate


class TrainingData:
    """Batches of the training set in random order, decoded ahead by threads; iteration n always has the same."""

    def __init__(self, images: Annotated, batch_size: int, seed: int, workers: int, bad_files: BadFiles) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.workers, self.bad_files = workers, bad_files

    def batches(self, start: int, stop: int) -> Iterator[list[_Sample]]:
        """The batches of iterations ``start`` to ``stop``."""
        keys = itertools.chain.from_iterable(itertools.islice(self.index_batches(start), stop - start))
        read = ahead(self._read, keys, 2 * self.batch_size, max(1, self.workers))
        with closing(read):
            for _ in range(start, stop):
                yield list(itertools.islice(read, self.batch_size))

    def index_batches(self, start: int) -> Iterator[list[int]]:
        """Permutation after permutation, each drawn from (seed, its number), cut into batches."""
        epoch, offset = divmod(start * self.batch_size, len(self.images))
        pending: list[int] = []
        while True:
            while len(pending) < self.batch_size:
                rng = generator(self.seed, 1, epoch)
                pending += torch.randperm(len(self.images), generator=rng).tolist()[offset:]
                epoch, offset = epoch + 1, 0
            yield pending[: self.batch_size]
            pending = pending[self.batch_size :]

    def _read(self, i: int) -> _Sample:
        """Image i, or the next one that can be read."""
        for k in range(len(self.images)):
            try:
                image, objects = self.images[(i + k) % len(self.images)]
                return image, objects.usable
            except BadImage as error:
                self.bad_files.add(error.path, error.reason)
        raise SourceError(f"{self.images.name}: none of its {len(self.images)} images can be read")


class Checkpoint:
    """The state of an unfinished training in ``file`` (None: it is not saved), valid only for ``key``."""

    def __init__(self, file: Path | None, key: str, minutes: float) -> None:
        self.file, self.key, self.minutes = file, key, minutes
        self.saved = time.monotonic()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore model and optimizer; return the number of finished iterations."""
        if self.file is None or not self.file.is_file():
            return 0
        state = load_saved(self.file)
        if state["key"] != self.key:
            return 0
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
        """Save the state after ``done`` iterations if the last checkpoint is old enough."""
        if self.file is None or time.monotonic() - self.saved < 60 * self.minutes:
            return
        state = {"key": self.key, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
        write_saved(self.file, state)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Delete the state of a finished training."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def fine_tune(
    model: FasterRCNN,
    data: TrainingData,
    schedule: Schedule,
    *,
    name: str,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    show: Callable[[int, float], None],
) -> None:
    """Train all of ``model`` by SGD; ``show`` is called with the iterations done and the newest loss.

    Raises:
        Diverged: the loss of the training called ``name`` is no longer a number.

    """
    optimizer = torch.optim.SGD(_groups(model), lr=schedule.at(0), momentum=0.9)
    first = checkpoint.restore(model, optimizer)
    model.train()
    for n, samples in enumerate(data.batches(first, schedule.iterations), first):
        reseed(seed, 2, n)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(n)
        losses = model(*_augmented(samples, device))
        total = torch.stack(list(losses.values())).sum()
        loss = float(total.detach())
        if not math.isfinite(loss):
            wrong = ", ".join(f"{key} is {float(v.detach())}" for key, v in losses.items() if not v.isfinite())
            rate = f"the learning rate ({schedule.at(n):.3g})"
            raise Diverged(f"detection, {name}: {wrong or 'the loss'} in iteration {n + 1}: lower {rate}")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        show(n + 1, loss)
        checkpoint.save(model, optimizer, n + 1)


@torch.no_grad()
def settle(model: FasterRCNN, data: TrainingData, schedule: Schedule, seed: int, device: torch.device) -> None:
    """Estimate the statistics of batch normalizations anew: averages over 200 batches, or a tenth of all."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    count = max(1, min(200, schedule.iterations // 10))
    for n, samples in enumerate(data.batches(schedule.iterations, schedule.iterations + count), schedule.iterations):
        reseed(seed, 2, n)
        model(*_augmented(samples, device))


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the caller's random state when the block ends."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def reseed(*numbers: int) -> None:
    """Seed torch's generators with these numbers; different numbers give independent streams."""
    torch.manual_seed(mixed(*numbers))


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters; batch normalizations are not decayed (detectron2's default)."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": 1e-4},
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": 0.0},
    ]


def _augmented(samples: list[_Sample], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images in [0, 1] and their objects on the device, half of them mirrored; classes count from 1."""
    images, targets = [], []
    for (pixels, objects), mirrored in zip(samples, (torch.rand(len(samples)) < 0.5).tolist(), strict=True):
        image, boxes = pixels.to(device).float() / 255, objects.boxes
        if mirrored:
            image, boxes = image.flip(-1), _mirrored(boxes, image.shape[-1])
        images.append(image)
        targets.append({"boxes": boxes.to(device), "labels": objects.labels.to(device) + 1})
    return images, targets


def _mirrored(boxes: Float[Tensor, "K 4"], width: int) -> Float[Tensor, "K 4"]:
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((width - x2, y1, width - x1, y2), 1)
