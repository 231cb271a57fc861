"""``crosslevel embed``: a table of features, one row for each image."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from crosslevel.data.cluster import Engine, Opened
from crosslevel.data.images import Images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import parse
from crosslevel.features import formats
from crosslevel.features.columns import thumbnails as small
from crosslevel.features.columns.loss import LOSS, ImageLosses, Objective
from crosslevel.features.engines import GPU_ROWS, Making, Task, hardware_for
from crosslevel.features.engines import ROWS as CPU_ROWS
from crosslevel.features.extract import Features, Runtime, extract, stream
from crosslevel.features.part_files import PartFiles
from crosslevel.features.pieces import Pieces, text
from crosslevel.features.source import open_for, suited
from crosslevel.features.table import IMAGE, metadata_of
from crosslevel.models.encoder import Encoder
from crosslevel.models.named import mark_of, open_encoder
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.device import Device, Precision
from crosslevel.utils.errors import SourceError, UserError, counted
from crosslevel.utils.locks import folder_lock
from crosslevel.utils.marks import verb
from crosslevel.utils.processes import keeping


class Embedded(NamedTuple):
    """Features (N, D) in float32, one row for each readable image; the paths, and the labels if there are any."""

    features: np.ndarray[Any, np.dtype[np.float32]]
    paths: list[str]
    labels: np.ndarray[Any, np.dtype[np.int64]] | None
    classes: list[str] | None


ROWS = 8192  # rows of a piece; a killed run loses at most one piece


@verb(
    "output",
    "thumbnails",
    "loss",
    "engine",
    "device",
    "precision",
    "workers",
    "batch_size",
    "data_root",
    "crops",
    "quiet",
    output="features.parquet",
)
def embed(
    run: str,
    images: str,
    output: str | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    workers: int | None = None,
    batch_size: int = 256,
    data_root: str | None = None,
    crops: Crops | None = None,
    thumbnails: int | None = None,
    loss: bool = False,
    engine: Engine = "local",
    quiet: bool = False,
    *,
    rows: int | None = None,
) -> Path | Embedded:
    """Write the features of images to a file: path relative to the source, label if there is one, feature.

    The images are streamed: memory does not grow with their number. A killed run continues where it was when it is
    started again with the same arguments.

    Args:
        run: the folder of a run, or its encoder.safetensors; or weights by name, without any training: timm:NAME such
            as timm:vit_small_patch14_dinov2.lvd142m, hf-hub:owner/name, or a folder of such files; ,size=PIXELS after
            it sets another image size than the weights' own.
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        output: the file to write: .parquet, or .npy with a manifest in .csv beside it; or a folder for other programs:
            .lance (LanceDB), or .fiftyone, which FiftyOne imports. A name without such an ending is a folder of Parquet
            files, to which every call adds the new images: those with a new path (also after renaming) or new content.
            From Python, the features are returned as arrays unless it is given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: fp32, so that a table is the same wherever it is made; auto takes bfloat16 where the hardware
            computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        thumbnails: pixels of the longer side of small pictures, such as 96, which are stored in a column named image in
            the format of the Hugging Face hub; explore, search and curate show them. None unless given.
        loss: of a run: add a column named loss, in nats: NT-Xent (Chen et al. 2020, at the run's temperature) of two
            views of an image, drawn as the run drew them, among those of 255 others; explore colours and filters by it.
            Each image passes through the encoder nine times.
        engine: local works on this machine; ray on all machines of a Ray cluster (RAY_ADDRESS, or this machine), with a
            worker for each GPU and its share of the cores to decode, or else for each core. The work of a lost machine
            is repeated; all machines must be able to reach source and output.
        quiet: print nothing.
        rows: images of a piece of the table; a killed run loses at most one piece; no option.

    Returns:
        the file; without one, the features, paths and labels.

    Examples:
        >>> table = crosslevel.embed("runs/photos", "photos/")
        >>> len(table.features) == len(table.paths)
        True

    """
    console = printer(quiet)
    _check(output, thumbnails, loss, engine)
    objective = Objective.of(run) if loss else None
    hardware = hardware_for(engine, device, precision, workers)
    encoder = open_encoder(run)
    parsed = suited(parse(images), encoder)
    source, images = open_for(encoder, parsed, data_root, crops), parsed.text
    say(console, f"device: {hardware.reason}; {counted(len(source), 'image')}")
    say(console, encoder.loaded)
    runtime = Runtime(hardware, workers, batch_size)
    if output is None:
        return _arrays(encoder, source, runtime, console)
    file, metadata = Path(output), metadata_of(encoder, run, source, images, hardware.precision)
    if file.suffix == ".fiftyone" and thumbnails is None and metadata["root"] is None:
        raise UserError(f"{images}: FiftyOne shows files, and these images are none: give --thumbnails 96")
    on_gpu, precise = engine == "ray" and hardware.device.type == "cuda", cast(Precision, hardware.precision)
    size = rows or (GPU_ROWS if on_gpu else CPU_ROWS)
    task = Task(device, precise, batch_size, os.path.abspath(file), encoder.identity(), workers, on_gpu, size)
    making = Making(task, encoder, source, Opened.of(parsed, data_root, crops, source) if engine == "ray" else None)
    if not file.suffix:
        with folder_lock(file, "crosslevel embed"):
            _add(making, console)
        say(console, _next(file, run))
        return file
    request = [images if crops is None else f"{images} {crops}", hardware.precision]
    request += [str(addition) for addition in (thumbnails, LOSS if loss else None) if addition]
    fingerprint = _fingerprint(mark_of(run, encoder), " ".join(request), source)
    further = _further(making, objective, thumbnails, runtime)
    if objective is not None:
        metadata[LOSS] = objective.described()
        say(console, f"loss: {objective}")
    pieces = Pieces(file, fingerprint, source, metadata, further)
    making = making._replace(task=task._replace(fingerprint=pieces.fingerprint))
    with folder_lock(pieces.folder, "crosslevel embed", keep=False):
        _write(making, pieces, runtime, console, rows or ROWS)
    say(console, _next(file, run))
    return file


def _next(file: Path, run: str) -> str:
    also = f", or crosslevel evaluate {shlex.quote(str(run))} IMAGES --test IMAGES" if file.suffix == ".npy" else ""
    return f"next: {formats.READ[file.suffix].format(file=file, quoted=shlex.quote(str(file)))}{also}"


def _further(
    making: Making, objective: Objective | None, thumbnails: int | None, runtime: Runtime
) -> dict[str, Callable[[Sequence[int]], pa.Array]]:
    """Further columns of the table: functions that compute each from the numbers of images."""
    columns: dict[str, Callable[[Sequence[int]], pa.Array]] = {}
    if objective is not None:
        columns[LOSS] = ImageLosses(making.encoder, making.source, objective, runtime.hardware, runtime.workers)
    if thumbnails is not None:
        columns[IMAGE] = partial(small.column, making.source, size=thumbnails, workers=runtime.workers)
    return columns


def _check(output: str | None, thumbnails: int | None, loss: bool, engine: Engine) -> None:
    """Refuse an output that does not support the other settings."""
    if output is not None and Path(output).suffix not in ("", *formats.SUFFIXES):
        raise UserError(f"--output {output}: the name must end in {', '.join(formats.SUFFIXES)}, or be a folder's")
    if output is None and engine != "local":
        raise UserError(f"engine={engine} writes what its workers make: give output, a file or a folder")
    small.check(thumbnails)
    if thumbnails is not None and (Path(output or "").suffix not in formats.PICTURED or engine != "local"):
        raise UserError(
            f"--thumbnails {thumbnails}: pictures need a Parquet table made on this machine: --output features.parquet"
        )
    if loss and (not Path(output or "").suffix or engine != "local"):
        raise UserError("--loss true: losses need a table in one file, made on this machine: --output features.parquet")
    formats.check(Path(output or ""))


def _add(making: Making, console: Console) -> None:
    """Add the source's new images to a folder of Parquet files."""
    task, source = making.task, making.source
    present, start_time, bad_files = (
        PartFiles(Path(task.output), task.fingerprint).existing_keys(),
        time.monotonic(),
        source.bad_files(),
    )
    rows = before = 0
    with progress_bar(console) as bar:
        progress = bar.add_task("embedding", total=len(source))
        for done in making.results([range(len(source))], present):
            rows, before = rows + done.rows, before + done.existing
            for path, reason in done.reasons.items():
                bad_files.add(path, reason)
            bar.advance(progress, done.stop - done.first)
    if not len(present) and not rows:
        raise SourceError(f"{source.name}: none of its {len(source)} images can be read{bad_files.first}")
    speed = len(source) / max(time.monotonic() - start_time, 1e-9)
    say(console, f"{counted(rows, 'feature')} added to {task.output}, {before:,} were there; {speed:,.0f} images/s")
    if len(bad_files):
        bad_files.write(Path(f"{task.output}.bad_files.txt"))
        say(console, bad_files.summary(len(source)))


def _write(making: Making, pieces: Pieces, runtime: Runtime, console: Console, rows: int) -> None:
    """Compute the missing pieces of a table, join them, and clean up; this process has locked the folder of pieces."""
    file, encoder, source = pieces.file, making.encoder, making.source
    for line in pieces.start():
        say(console, line)
    speed = "complete before"
    if pieces.joined is None:
        start_time, before = time.monotonic(), pieces.done
        with keeping(lambda: f"{pieces.done:,} images are done; the same command continues there"):
            if making.elsewhere is None:
                _compute(encoder, source, pieces, runtime, console, rows)
            else:
                _gather(making, pieces, console)
            pieces.join()
        speed = f"{(len(source) - before) / max(time.monotonic() - start_time, 1e-9):,.0f} images/s"
    assert pieces.joined is not None
    say(console, f"{counted(pieces.joined, 'feature')} of {encoder.num_features} in {file}, {speed}")
    if pieces.reasons:
        skipped = source.bad_files()
        for path, reason in pieces.reasons.items():
            skipped.add(path, reason)
        skipped.write(file.with_name(f"{file.stem}.bad_files.txt"))
        say(console, skipped.summary(len(source)))
    pieces.remove()


def _arrays(encoder: Encoder, source: Images, runtime: Runtime, console: Console) -> Embedded:
    """All features in memory."""
    bad_files = source.bad_files()
    with progress_bar(console) as bar:
        task = bar.add_task("embedding", total=len(source))
        extracted = extract(
            encoder, source, batch_size=runtime.batch_size, workers=runtime.workers, hardware=runtime.hardware,
            bad_files=bad_files, progress=lambda done, total: bar.update(task, completed=done),
        )  # fmt: skip
    if len(bad_files):
        say(console, bad_files.summary(len(source)))
    paths = [source.paths[i] for i in extracted.indices.tolist()]
    labels = None if source.labels is None else extracted.labels.numpy()
    return Embedded(extracted.features.numpy(), paths, labels, source.classes)


def _compute(encoder: Encoder, source: Images, pieces: Pieces, runtime: Runtime, console: Console, least: int) -> None:
    """Write all missing pieces; each but the last has at least ``rows`` rows."""
    bad_files = source.bad_files()
    with progress_bar(console) as bar:
        task = bar.add_task("embedding", total=len(source), completed=pieces.done)
        for missing in pieces.missing():
            features = stream(
                encoder,
                source,
                batch_size=runtime.batch_size,
                workers=runtime.workers,
                hardware=runtime.hardware,
                bad_files=bad_files,
                start=missing.start,
            )
            first = missing.start
            for rows in _gathered(_until(features, missing.stop), least):
                first = pieces.write(first, rows, bad_files)
                bar.update(task, completed=pieces.done)
    pieces.reasons.update(bad_files.reasons)


def _gather(making: Making, pieces: Pieces, console: Console) -> None:
    """Have the machines of a cluster make all missing pieces."""
    reasons = dict(pieces.reasons)
    with progress_bar(console) as bar:
        progress = bar.add_task("embedding", total=len(making.source), completed=pieces.done)
        for done in making.results(pieces.missing()):
            reasons |= done.reasons
            bar.advance(progress, done.stop - done.first)
    pieces.start()  # finds the pieces that were written
    pieces.reasons.update(reasons)


def _until(features: Iterator[Features], stop: int) -> Iterator[Features]:
    """The features of images before ``stop``."""
    for part in features:
        inside = part.indices < stop
        if inside.any():
            yield Features(*(column[inside] for column in part))
        if not inside.all():
            return


def _gathered(features: Iterator[Features], least: int) -> Iterator[Features]:
    """Batches joined to at least ``least`` rows."""
    waiting: list[Features] = []
    for part in features:
        waiting.append(part)
        if sum(len(p.indices) for p in waiting) >= least:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[Features]) -> Features:
    return Features(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def _fingerprint(encoder: str, images: str, source: Images) -> str:
    """A text that changes when the encoder or the list of images does."""
    digest = hashlib.sha256(f"{encoder} {images} {len(source)}".encode())
    for path in source.paths:
        digest.update(text(path).encode())
    return digest.hexdigest()
