"""Who makes the pieces of a table: this process, one after the other, or the machines of a Ray cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.cluster import Engine, Opened, alone, by_workers, cores_each, on_gpus, ray_for
from crosslevel.data.images import Images
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import Features, Runtime, stream
from crosslevel.features.part_files import Done, Keys, PartFiles
from crosslevel.features.pieces import Pieces
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.utils.device import Device, Hardware, Precision, choose
from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.files import ENCODER

ROWS = 2048  # images of a piece; a lost machine loses at most one piece for each of its workers
GPU_ROWS = 8192  # likewise on GPUs, where each piece starts decoding processes


class Task(NamedTuple):
    """The settings of a table: ``output`` is a file, whose pieces lie beside it, or a folder of Parquet files.

    ``workers`` are processes that decode; None on a cluster: each GPU's share of the machine's cores.
    """

    device: Device
    precision: Precision
    batch_size: int
    output: str
    fingerprint: str
    workers: int | None = None
    on_gpu: bool = False
    rows: int = ROWS


class Maker:
    """Makes pieces of one table; ``existing`` are the keys of the rows that are in its folder of parts."""

    def __init__(self, task: Task, encoder: Encoder, source: Images, existing: Keys | None = None) -> None:
        self.task, self.encoder, self.source = task, encoder, source
        workers = task.workers if task.workers is not None else cores_each() if task.on_gpu else 0
        self.runtime = Runtime(choose(task.device, task.precision), workers, task.batch_size)
        self.files = PartFiles(Path(task.output), task.fingerprint)
        self.existing = np.empty(0, np.int64) if existing is None else existing

    def __call__(self, key: tuple[int, int]) -> Done:
        """The piece of images ``first`` to ``stop``."""
        return self.make(*key)

    def make(self, first: int, stop: int) -> Done:
        """One piece."""
        if not Path(self.task.output).suffix:
            return self.files.write(self.encoder, self.source, first, stop, self.existing, self.runtime)
        bad_files = BadFiles()
        part, runtime = take(self.source, torch.arange(first, stop)), self.runtime
        batches = list(
            stream(
                self.encoder,
                part,
                batch_size=runtime.batch_size,
                workers=runtime.workers,
                hardware=runtime.hardware,
                bad_files=bad_files,
            )
        )
        if batches:
            features, labels, indices = (torch.cat(column) for column in zip(*batches, strict=True))
            pieces = Pieces(Path(self.task.output), self.task.fingerprint, self.source)
            pieces.write(first, Features(features, labels, indices + first), bad_files, stop)
        return Done(first, stop, sum(len(rows.indices) for rows in batches), 0, bad_files.reasons)


class Sent(NamedTuple):
    """An encoder for other machines: the bytes of its file, and the expected checksum of the encoder."""

    file: bytes
    identity: str

    @classmethod
    def of(cls, encoder: Encoder) -> Sent:
        """Pack an encoder that is open here."""
        with tempfile.TemporaryDirectory() as folder:
            file = encoder.save(Path(folder) / ENCODER)
            return cls(file.read_bytes(), load_encoder(file).identity())

    def open(self) -> Encoder:
        """Open it on another machine.

        Raises:
            UserError: the encoder is a different one there.

        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / ENCODER
            file.write_bytes(self.file)
            encoder = load_encoder(file)
        if encoder.identity() != self.identity:
            raise UserError(f"{encoder.name} is not the same on all machines: install the same packages on each")
        return encoder


def hardware_for(engine: Engine, device: Device, precision: Precision, workers: int | None) -> Hardware:
    """The hardware that makes a table: this machine's, or a cluster's, which may have GPUs when this machine has none.

    Raises:
        MissingExtra: Ray is not installed.
        UserError: this machine or the cluster lacks the requested hardware, or cannot use it.

    """
    if engine != "ray":
        return choose(device, precision)
    gpus = on_gpus(ray_for("--engine ray"), device)
    if not gpus:
        alone(workers)
    if not gpus or torch.cuda.is_available():
        return choose(device, precision)
    if precision == "auto":
        raise UserError("--precision auto: the cluster's GPUs are not known here: give fp32, bf16 or fp16")
    return Hardware(torch.device("cuda"), precision, f"cuda: GPUs of the cluster, {precision} (as set)")


class Making(NamedTuple):
    """A table to be made; ``elsewhere`` is the source for the machines of a cluster, None to make the table here."""

    task: Task
    encoder: Encoder
    source: Images
    elsewhere: Opened | None

    def results(self, missing: list[range], existing: Keys | None = None) -> Iterator[Done]:
        """The results of the missing pieces, in order.

        On a cluster each piece is made by a worker with its own GPU or core. Pieces of a lost worker or machine are
        made again by others; each piece is written atomically under its own name, so that none is duplicated. Only the
        encoder and numbers pass between machines: workers read the source and write the pieces themselves.

        Raises:
            MachineError: the cluster fails.
            UserError: source or encoder are not the same on all machines.

        """
        size = self.task.rows
        keys = [(i, min(i + size, gap.stop)) for gap in missing for i in range(gap.start, gap.stop, size)]
        if self.elsewhere is None:
            yield from map(Maker(self.task, self.encoder, self.source, existing), keys)
            return
        make = partial(_maker, self.task, Sent.of(self.encoder), self.elsewhere, existing)
        try:
            yield from by_workers(make, keys, "--engine ray", self.task.on_gpu)
        except MachineError as error:
            raise MachineError(f"{error}; the same command continues there") from error


def _maker(task: Task, encoder: Sent, source: Opened, existing: Keys | None) -> Maker:
    return Maker(task, encoder.open(), source.open(), existing)
