"""``crosslevel embed``: a table of features, one row an image."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.features.extract import Features, stream
from crosslevel.models.encoder import FILE, load_encoder
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import SourceError

_REPEATED = ["label", "class"]  # columns with few different values; looking for some among features takes time
ROWS = 8192  # a part of the table: what a killed run loses at most


def embed(
    run: str,
    images: str,
    output: str = "features.parquet",
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
    batch_size: int = 256,
    data_root: str | None = None,
    crops: Crops | None = None,
) -> Path:
    """Write the features of images to a file: path relative to the source, label if there is one, feature.

    The images are streamed: memory does not grow with their number. A killed run continues where it was when it is
    started again with the same arguments.

    Args:
        run: the folder of a run, or its encoder.safetensors.
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        output: the file to write: .parquet, or .npy with a manifest in .csv beside it.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.

    Returns:
        the file.
    """
    console = Console(soft_wrap=True)
    file = Path(output)
    if file.suffix not in _JOINERS:
        raise ValueError(f"--output {output}: the name must end in .parquet or .npy")
    hardware = choose(device, precision)
    encoder = load_encoder(run)
    source = open_images(images, data_root=data_root, crops=crops)
    console.print(f"device: {hardware.why}; {len(source):,} images", highlight=False)
    began, bad = time.monotonic(), source.bad_files()
    parts = _Parts(file, _fingerprint(run, images if crops is None else f"{images} {crops}", source), source)
    first = start = parts.start()
    if start:
        console.print(f"continuing at image {start:,}", highlight=False)
    with _bar(console) as bar:
        task = bar.add_task("embedding", total=len(source), completed=start)
        features = stream(
            encoder, source, batch_size=batch_size, workers=workers, hardware=hardware, bad=bad, start=start
        )
        try:
            for rows in _gathered(features, ROWS):
                start = parts.write(rows, bad)
                bar.update(task, completed=start)
        except KeyboardInterrupt:
            console.print(f"{start:,} images are done; the same command continues there", highlight=False)
            raise
    parts.bad.update(bad.reasons)
    rows_written = parts.finish()
    seconds = max(time.monotonic() - began, 1e-9)
    speed = f"{(len(source) - first) / seconds:,.0f} images/s"
    console.print(
        f"{rows_written:,} features of {encoder.num_features} in {file}, {speed}", highlight=False, markup=False
    )
    if parts.bad:
        skipped = source.bad_files()
        for path, reason in parts.bad.items():
            skipped.add(path, reason)
        skipped.write(file.with_name(f"{file.stem}.bad_files.txt"))
        console.print(skipped.summary(len(source)), highlight=False, markup=False)
    return file


def _gathered(features: Iterator[Features], least: int) -> Iterator[Features]:
    """Batches joined to at least ``least`` rows."""
    waiting: list[Features] = []
    for part in features:
        waiting.append(part)
        if sum(len(p.places) for p in waiting) >= least:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Features]) -> Features:
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Parts:
    """Finished pieces of a table, in a folder beside it, until they are all there.

    Each piece is on disk before the state that counts it, so that a kill at any moment loses at most one.
    """

    def __init__(self, file: Path, fingerprint: str, source: Images) -> None:
        self.file, self.fingerprint, self.source = file, fingerprint, source
        self.folder = file.with_name(f"{file.name}.parts")
        self.bad: dict[str, str] = {}

    def start(self) -> int:
        """The first image that is still to do; pieces of other images or another encoder are thrown away."""
        state = self.folder / "state.json"
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            if found["fingerprint"] == self.fingerprint:
                self.bad = found["bad"]
                return int(found["done"])
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return 0

    def write(self, rows: Features, bad: BadFiles) -> int:
        """Store one piece, and return the first image after it."""
        done = int(rows.places[-1]) + 1
        piece = self.folder / f"{int(rows.places[0]):012}.parquet"
        pq.write_table(self._table(rows), piece, use_dictionary=_REPEATED)
        self.bad.update(bad.reasons)
        self._remember(done)
        return done

    def finish(self) -> int:
        """Join the pieces into the file, put it in place at once, and return its number of rows.

        Raises:
            SourceError: not one image could be read.
        """
        pieces = sorted(self.folder.glob("*.parquet"))
        if not pieces:
            raise SourceError(f"{self.source.name}: none of its {len(self.source)} images can be read")
        unfinished = self.folder / f"joined{self.file.suffix}"
        rows = _JOINERS[self.file.suffix](pieces, unfinished)
        for made in self.folder.glob("joined*"):
            os.replace(made, self.file.with_suffix(made.suffix))
        shutil.rmtree(self.folder)
        return rows

    def _remember(self, done: int) -> None:
        state = self.folder / "state.json"
        text = json.dumps({"fingerprint": self.fingerprint, "done": done, "bad": self.bad})
        state.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(state.with_suffix(".tmp"), state)

    def _table(self, rows: Features) -> pa.Table:
        flat = pa.array(rows.features.numpy().ravel())
        columns: dict[str, Any] = {"path": [_text(self.source.paths[i]) for i in rows.places.tolist()]}
        if self.source.labels is not None:
            columns["label"] = rows.labels.numpy()
            if self.source.classes is not None:
                columns["class"] = [self.source.classes[label] for label in rows.labels.tolist()]
        columns["feature"] = pa.FixedSizeListArray.from_arrays(flat, rows.features.shape[1])
        return pa.table(columns)


def _join_parquet(pieces: list[Path], file: Path) -> int:
    count = 0
    with pq.ParquetWriter(file, pq.read_schema(pieces[0]), use_dictionary=_REPEATED) as writer:
        for piece in pieces:
            table = pq.read_table(piece)
            writer.write_table(table)
            count += len(table)
    return count


def _join_npy(pieces: list[Path], file: Path) -> int:
    """Features as one array (rows, D) of float32, and a manifest of the other columns in the same order."""
    count = sum(pq.read_metadata(piece).num_rows for piece in pieces)
    width = pq.read_schema(pieces[0]).field("feature").type.list_size
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(count, width))
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as manifest:
        writer, at = csv.writer(manifest), 0
        for piece in pieces:
            table = pq.read_table(piece)
            others = table.drop_columns("feature")
            if at == 0:
                writer.writerow(others.column_names)
            writer.writerows(zip(*(column.to_pylist() for column in others.columns), strict=True))
            values = table["feature"].combine_chunks().flatten().to_numpy()
            array[at : at + len(table)] = values.reshape(-1, width)
            at += len(table)
    array.flush()
    return count


_JOINERS = {".parquet": _join_parquet, ".npy": _join_npy}


def _fingerprint(run: str, images: str, source: Images) -> str:
    """Changes when the encoder or the list of images does."""
    weights = Path(run) / FILE if Path(run).is_dir() else Path(run)
    digest = hashlib.sha256(f"{weights.stat().st_mtime_ns} {weights.stat().st_size} {images} {len(source)}".encode())
    for path in source.paths:
        digest.update(_text(path).encode())
    return digest.hexdigest()


def _text(path: str) -> str:
    """A file name that is not valid UTF-8 keeps its bytes as escapes: tables hold Unicode only."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
