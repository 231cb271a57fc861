"""``crosslevel pack``: images decoded and resized once, to be read at memory speed from then on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths, taken
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.packed import (
    ABOUT,
    INDEX,
    UNFINISHED,
    VERSION,
    Decoded,
    decoded,
    is_pack,
    shard_name,
    shrunk,
)
from crosslevel.data.subsets.suffixes import split
from crosslevel.utils.errors import BadImage, SourceError
from crosslevel.utils.files import is_unfinished, sweep, write, write_tensors

IMAGES_A_PART = 2048  # what a killed run loses at most
SHARD = 2**29  # bytes after which another shard begins, unless all images have one square size
BAD_FILES = "bad_files.txt"
_LOOKED_AT = 32  # images, to estimate the size


def pack(
    images: str,
    output: str = "packed",
    size: int = 256,
    workers: int | None = None,
    data_root: str | None = None,
    crops: Crops | None = None,
) -> Path:
    """Decode and resize images once, into a folder that every command takes as images and reads at memory speed.

    Pixels are stored uncompressed: several times the space of JPEG. A killed run continues where it was when it is
    started again with the same arguments; if the images have changed since, they are packed anew.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        output: the folder to write.
        size: pixels of the shorter side; smaller images are not enlarged.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.

    Returns:
        the folder.

    """
    if size < 1:
        raise ValueError(f"--size {size}: give at least 1 pixel")
    console, began = Console(soft_wrap=True), time.monotonic()
    folder = Path(output)
    _check_place(folder, images)
    source = open_images(images, data_root=data_root, crops=crops)
    _check_watched(folder, source)
    identity = source.identity()
    found = _about(folder)
    if found is not None and (found["identity"], found["size"]) != (identity, size):
        _say(console, f"{folder}: {_difference(found, size, crops, source)}: packed anew")
        _clear(folder)
        found = None
    writer = _Writer(folder, source, {**_origin(images, crops, source), "identity": identity, "size": size})
    if found is not None and (folder / ABOUT).is_file():
        writer.tidy()
        writer.renew()
        _say(console, f"{folder} is complete: {found['images']:,} images of {images}, nothing has changed")
        return folder
    _say(console, _space(folder, source, size, writer.start()))
    if writer.done:
        _say(console, f"continuing at image {writer.done:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("packing", total=len(source), completed=writer.done)
        try:
            for done in writer.write(decoded(source, size, range(writer.done, len(source)), workers)):
                bar.update(task, completed=done)
        except KeyboardInterrupt:
            _say(console, f"{writer.done:,} images are done; the same command continues there")
            raise
    count, seconds = writer.finish(), max(time.monotonic() - began, 1e-9)
    _say(console, f"{count:,} images in {folder}, {writer.bytes() / 1e9:.2f} GB, {len(source) / seconds:,.0f} images/s")
    if len(writer.bad):
        _say(console, writer.bad.summary(len(source)))
    return folder


class _Part(NamedTuple):
    """What is known of the images of one part: their sizes, places, where their pixels are, and the bad ones."""

    table: dict[str, Tensor]  # rows, columns, places
    shard: int
    stop: int  # bytes of the shard that are written with this part
    done: int  # the first image after it
    square: int  # the side that all images so far have, 0 if they differ
    bad: dict[str, str]


class _Writer:
    """Shards that grow part by part.

    The pixels of a part are on disk before the small file that counts it, so that a kill at any moment loses at most
    one part; what lies behind the last one counted is cut off. Where parts and shards end depends on the images alone.
    """

    def __init__(self, folder: Path, source: Images, about: dict[str, Any]) -> None:
        self.folder, self.source, self.about = folder, source, about
        self.bad, self.parts = source.bad_files(), list[_Part]()

    @property
    def done(self) -> int:
        """The first image that is still to do."""
        return self.parts[-1].done if self.parts else 0

    def bytes(self) -> int:
        """The pixels that are written."""
        return sum(self._lengths())

    def start(self) -> int:
        """Go back to the last finished part, and return the bytes that are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / UNFINISHED, self.about)
        while (file := self._part_file()).is_file():
            part = _read_part(file)
            shard = self.folder / shard_name(part.shard)
            if not shard.is_file() or shard.stat().st_size < part.stop:
                break  # the pixels never arrived
            self._count(part)
        for file in self.folder.glob("part-*"):
            if file >= self._part_file():
                file.unlink()
        lengths = self._lengths()
        for file in self.folder.glob("*.bin"):
            number = int(file.stem)
            if number < len(lengths):
                os.truncate(file, lengths[number])
            else:
                file.unlink()
        return sum(lengths)

    def write(self, pieces: Iterator[Decoded]) -> Iterator[int]:
        """Store all the pieces; tells after each how many images are done."""
        waiting: list[Decoded] = []
        seen = self.done
        for piece in pieces:
            waiting.append(piece)
            seen = min(seen + piece.asked, len(self.source))
            if seen - self.done >= IMAGES_A_PART or seen == len(self.source):
                self._store(waiting, seen)
                waiting = []
            yield seen

    def finish(self) -> int:
        """Write the index, and at last the file that makes the pack whole; return the number of images.

        Raises:
            SourceError: fewer than 2 images can be read.

        """
        rows, columns, places = (
            torch.cat([part.table[name] for part in self.parts]) for name in ("rows", "columns", "places")
        )
        if len(self.bad):
            self.bad.write(self.folder / BAD_FILES)
        if len(rows) < 2:
            raise SourceError(
                f"{self.source.name}: needs at least 2 images, only {len(rows)} of {len(self.source)} can be read "
                f"(see {self.folder / BAD_FILES})"
            )
        table = {"rows": rows, "columns": columns, **_columns("paths", taken(self.source.paths, places))}
        for name in ("labels", "tracks"):
            column: Tensor | None = getattr(self.source, name)
            if column is not None:
                table[name] = column[places]
        self._write_index(table | _watched(self.source))
        whole = {"images": len(rows), "classes": self.source.classes, "shards": self._lengths()}
        _write(self.folder / ABOUT, {**self.about, **whole})
        self.tidy()
        return len(rows)

    def renew(self) -> None:
        """The same images may have other times now, or lie elsewhere: from now on, a change is one of these."""
        try:
            table, about = load_file(self.folder / INDEX), json.loads((self.folder / ABOUT).read_text("utf-8"))
        except (OSError, SafetensorError):
            return  # whoever opens the pack says that it is damaged
        watched = _watched(self.source)
        if any(name not in table or not torch.equal(table[name], column) for name, column in watched.items()):
            self._write_index(table | watched)
        if about != about | self.about:
            _write(self.folder / ABOUT, about | self.about)

    def _write_index(self, table: dict[str, Tensor]) -> None:
        write_tensors(self.folder / INDEX, table)

    def tidy(self) -> None:
        """Delete what only an unfinished pack needs."""
        for file in (*self.folder.glob("part-*"), *self.folder.glob("*.tmp"), self.folder / UNFINISHED):
            file.unlink(missing_ok=True)
        sweep(self.folder)

    def _store(self, pieces: list[Decoded], done: int) -> None:
        rows, columns = torch.cat([p.rows for p in pieces]), torch.cat([p.columns for p in pieces])
        last = self.parts[-1] if self.parts else None
        shard, stop = (last.shard, last.stop) if last else (0, 0)
        square = _common(rows, columns, last.square if last else None)
        if stop >= SHARD and not square:
            shard, stop = shard + 1, 0
        with (self.folder / shard_name(shard)).open("ab") as file:
            for piece in pieces:
                _append(file, piece.pixels)
            stop = file.tell()
            os.fsync(file.fileno())
        bad = {path: reason for piece in pieces for path, reason in piece.bad}
        table = {"rows": rows.int(), "columns": columns.int(), "places": torch.cat([p.places for p in pieces])}
        part = _Part(table, shard, stop, done, square, bad)
        _write_part(self._part_file(), part)
        self._count(part)

    def _count(self, part: _Part) -> None:
        self.parts.append(part)
        for path, reason in part.bad.items():
            self.bad.add(path, reason)

    def _part_file(self) -> Path:
        """The file of the next part."""
        return self.folder / f"part-{len(self.parts):06}.safetensors"

    def _lengths(self) -> list[int]:
        """Bytes of each shard."""
        return list({part.shard: part.stop for part in self.parts}.values())


def _common(rows: Tensor, columns: Tensor, before: int | None) -> int:
    """The one square size of these images and of those before (None: there are none), 0 if they differ."""
    if not len(rows):
        return -1 if before is None else before
    side = int(rows[0])
    same = bool((rows == side).all() and (columns == side).all()) and before in (None, -1, side)
    return side if same else 0


def _append(file: BinaryIO, pixels: Tensor) -> None:
    file.write(pixels.numpy().data)


def _write_part(file: Path, part: _Part) -> None:
    told = {name: getattr(part, name) for name in ("shard", "stop", "done", "square", "bad")}
    write_tensors(file, part.table, {"part": json.dumps(told)})


def _read_part(file: Path) -> _Part:
    with safe_open(file, framework="pt") as opened:
        table = {name: opened.get_tensor(name) for name in ("rows", "columns", "places")}
        return _Part(table, **json.loads((opened.metadata() or {})["part"]))


def _write(file: Path, content: dict[str, Any]) -> None:
    write(file, json.dumps(content, indent=1) + "\n")


def _columns(name: str, strings: Any) -> dict[str, Tensor]:
    paths = strings if isinstance(strings, Paths) else Paths.of(strings)
    return {f"{name}.text": paths.text, f"{name}.ends": paths.ends}


def _watched(source: Images) -> dict[str, Tensor]:
    """What tells later whether the source has changed, as columns of the index."""
    watch = source.watch
    if watch is None:
        return {}
    sizes = {} if watch.sizes is None else {"sizes": watch.sizes}
    return {"times": watch.times, **_columns("watched", watch.paths), **sizes}


def _check_place(folder: Path, images: str) -> None:
    """Refuse a folder that holds something else, and one inside the source, which would change by being packed."""
    others = [file for file in folder.iterdir() if not is_unfinished(file.name)] if folder.is_dir() else []
    if others and not is_pack(str(folder)):
        raise ValueError(f"--output {folder}: there is something else in it: give another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: it is a file: give a folder")
    whole = split(images)[0]
    read = whole if os.path.exists(whole) else whole.partition(",")[0]
    if os.path.isdir(read) and folder.resolve().is_relative_to(Path(read).resolve()):
        raise ValueError(f"--output {folder} lies inside {read}: give a folder outside of it")


def _check_watched(folder: Path, source: Images) -> None:
    """Refuse a place in a folder that the pack looks at later: it would take itself for a change."""
    watch = source.watch
    if watch is None:
        return
    watched = {os.path.realpath(os.path.join(watch.root, path)) for path in watch.paths}
    for above in folder.resolve().parents:
        if str(above) in watched:
            raise ValueError(f"--output {folder} lies inside {above}: give a folder outside of it")


def _about(folder: Path) -> dict[str, Any] | None:
    """What the pack in ``folder`` was made of, None where there is none."""
    for name in (ABOUT, UNFINISHED):
        try:
            told: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if told.get("version") == VERSION:
            return told
    return None


def _origin(images: str, crops: Crops | None, source: Images) -> dict[str, Any]:
    where = os.path.abspath(images) if os.path.exists(images) else None
    cut = {} if crops is None else {"crops": asdict(crops)}
    watched = {} if source.watch is None else {"watched": source.watch.root}
    return {"version": VERSION, "source": images, "where": where, **cut, **watched}


def _difference(found: dict[str, Any], size: int, crops: Crops | None, source: Images) -> str:
    if found["size"] != size:
        return f"it was packed with --size {found['size']}"
    if found.get("crops") != (None if crops is None else asdict(crops)):
        return f"it was packed with {Crops(**found['crops']).options() if 'crops' in found else 'no --crops'}"
    then = f" ({found['images']:,} readable images then, {len(source):,} files now)" if "images" in found else ""
    return f"{source.name} has changed since{then}"


def _clear(folder: Path) -> None:
    # A kill in between leaves an unfinished pack, and not one that is taken for whole.
    if (folder / ABOUT).is_file():
        os.replace(folder / ABOUT, folder / UNFINISHED)
    for pattern in (INDEX, "*.tmp", "part-*", "*.bin", BAD_FILES):
        for file in folder.glob(pattern):
            file.unlink()


def _space(folder: Path, source: Images, size: int, written: int) -> str:
    """One line on the space that is needed.

    Raises:
        ValueError: there is not enough.

    """
    areas = []
    for i in torch.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).long().tolist():
        try:
            rows, columns = shrunk(source[i][0], size).shape[1:]
        except BadImage:
            continue
        areas.append(3 * rows * columns)
    needed = sum(areas) / max(1, len(areas)) * len(source) - written
    free = shutil.disk_usage(folder).free
    line = f"{len(source):,} images: needs about {max(0, needed) / 1e9:.2f} GB, {folder} has {free / 1e9:.1f} GB"
    if needed > free:
        raise ValueError(f"{line}: give another --output or a smaller --size")
    return line


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False)
