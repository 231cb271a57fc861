"""Where the pieces of a table are made: in this process one after the other, or by the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.cluster import Engine, by_workers, ray_for
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import Features, Runtime, stream
from crosslevel.features.parts import Done, Keys, Parts
from crosslevel.features.pieces import Pieces
from crosslevel.models.named import open_encoder
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import MachineError

ROWS = 2048  # images a piece: what a lost machine loses at most for each of its workers


class Task(NamedTuple):
    """All that another process needs to make pieces: texts that mean the same on every machine of a cluster."""

    run: str
    images: str
    data_root: str | None
    crops: Crops | None
    device: Device
    precision: Precision
    batch_size: int
    output: str
    fingerprint: str


class Maker:
    """Makes pieces of one table; the encoder and the source are opened once.

    ``output`` is a file, whose pieces lie beside it (`Pieces`), or a folder of parts (`Parts`).
    """

    def __init__(self, task: Task, known: Keys | None = None) -> None:
        self.task, self.encoder = task, open_encoder(task.run)
        self.source = open_images(task.images, data_root=task.data_root, crops=task.crops)
        self.place = Runtime(choose(task.device, task.precision), 0, task.batch_size)
        self.parts = Parts(Path(task.output), task.fingerprint)
        self.known = np.empty(0, np.int64) if known is None else known

    def __call__(self, key: tuple[int, int]) -> Done:
        """The piece of images ``first`` to ``stop``."""
        return self.make(*key)

    def make(self, first: int, stop: int) -> Done:
        """One piece."""
        if not Path(self.task.output).suffix:
            return self.parts.write(self.encoder, self.source, first, stop, self.known, self.place)
        bad = BadFiles()
        part, runtime = take(self.source, torch.arange(first, stop)), self.place
        batches = list(
            stream(self.encoder, part, batch_size=runtime.batch_size, workers=0, hardware=runtime.hardware, bad=bad)
        )
        if batches:
            features, labels, places = (torch.cat(column) for column in zip(*batches, strict=True))
            pieces = Pieces(Path(self.task.output), self.task.fingerprint, self.source)
            pieces.write(first, Features(features, labels, places + first), bad, stop)
        return Done(first, stop, sum(len(rows.places) for rows in batches), 0, bad.reasons)


def ranges(missing: list[range], rows: int | None = None) -> list[range]:
    """Images to be made, cut into pieces of at most ``rows``."""
    size = rows or ROWS
    return [range(i, min(i + size, gap.stop)) for gap in missing for i in range(gap.start, gap.stop, size)]


def made(engine: Engine, task: Task, source: Images, wanted: list[range], known: Keys | None = None) -> Iterator[Done]:
    """What became of each of the pieces, in whatever order they are done.

    Raises:
        MissingExtra: Ray is not installed.
        MachineError: the cluster cannot do it.

    """
    if engine == "ray":
        yield from _by_ray(task, wanted, known)
        return
    maker = Maker(task, known)
    for piece in wanted:
        yield maker.make(piece.start, piece.stop)


def _by_ray(task: Task, wanted: list[range], known: Keys | None) -> Iterator[Done]:
    """Each piece by a worker that has an accelerator, or else a core, of its own.

    Pieces of a worker or a machine that is lost are made again by others; each is written whole, under its own name, so
    that none comes twice. Nothing but numbers passes between machines: workers read the source and write themselves.
    """
    ray = ray_for("--engine ray")
    on_gpu = choose(task.device, task.precision).device.type == "cuda" or _cluster_gpus(ray, task)
    keys = [(piece.start, piece.stop) for piece in wanted]
    try:
        yield from by_workers(partial(Maker, task, known), keys, "--engine ray", on_gpu)
    except MachineError as error:
        raise MachineError(f"{error}; the same command continues there") from error


def _cluster_gpus(ray: Any, task: Task) -> bool:
    """Whether the workers find a GPU where this machine has none."""
    return task.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0
