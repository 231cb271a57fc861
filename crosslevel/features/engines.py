"""Where the pieces of a table are made: in this process one after the other, or by the machines of a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import Features, Runtime, stream
from crosslevel.features.parts import Done, Keys, Parts
from crosslevel.features.pieces import Pieces
from crosslevel.models.named import open_encoder
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import MachineError, MissingExtra

Engine = Literal["local", "ray"]
ROWS = 2048  # images a piece: what a lost machine loses at most for each of its workers
Row = dict[str, "np.ndarray[Any, Any]"]


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

    def __init__(self, task: Task, known: Keys | None = None, *, of_cluster: bool = False) -> None:
        if of_cluster:
            torch.set_num_threads(1)  # as many workers as there are cores
            warnings.simplefilter("ignore")
        self.task, self.encoder = task, open_encoder(task.run)
        self.source = open_images(task.images, data_root=task.data_root, crops=task.crops)
        self.place = Runtime(choose(task.device, task.precision), 0, task.batch_size)
        self.parts = Parts(Path(task.output), task.fingerprint)
        self.known = np.empty(0, np.int64) if known is None else known

    def __call__(self, batch: Row) -> Row:
        """Ray Data's form: images ``first`` to ``stop`` of each row; a row of what became of them."""
        done = [self.make(int(a), int(b)) for a, b in zip(batch["first"], batch["stop"], strict=True)]
        return {"done": np.array([json.dumps(part) for part in done])}

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
    """Each piece by a worker that has an accelerator, or else a core, of its own (Ray Data's pool of actors).

    Pieces of a worker or a machine that is lost are made again by others; each is written whole, under its own name, so
    that none comes twice. Nothing but numbers passes between machines: workers read the source and write themselves.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("--engine ray needs Ray: pip install 'crosslevel[ray]'") from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    on_gpu = choose(task.device, task.precision).device.type == "cuda" or _cluster_gpus(ray, task)
    total = ray.cluster_resources()
    workers = max(1, min(len(wanted), int(total.get("GPU" if on_gpu else "CPU", 1))))
    rows = [{"first": piece.start, "stop": piece.stop} for piece in wanted]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Maker,
        fn_constructor_args=(task, known),
        fn_constructor_kwargs={"of_cluster": True},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, max_tasks_in_flight_per_actor=2),
        num_gpus=1 if on_gpu else None,
        num_cpus=None if on_gpu else 1,
    )
    try:
        for row in data.iter_rows():
            yield Done(*json.loads(row["done"]))
    except (ray.exceptions.RayError, RuntimeError) as error:
        why = " ".join(str(error).split())[-300:]
        raise MachineError(f"the cluster could not go on: {why}; the same command continues there") from error


def _cluster_gpus(ray: Any, task: Task) -> bool:
    """Whether the workers find a GPU where this machine has none."""
    return task.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0
