"""A pack being written: shards that grow part by part, and an index at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths, take_strings
from crosslevel.data.sources.packed import ABOUT, INDEX, UNFINISHED, Decoded, check_of, read_about, shard_name
from crosslevel.utils.errors import SourceError
from crosslevel.utils.files import BAD_FILES, sweep, sync_folder, write, write_tensors
from crosslevel.utils.tensors import load_safetensors
from crosslevel.utils.trees import json_tree


@dataclass(frozen=True)
class Sizes:
    """The sizes at which parts and shards of a pack end.

    Args:
        part: images of a part; a killed run loses at most one part.
        shard: bytes after which the next shard begins, unless all images have one square size.
        at_once: images that a worker decodes before it hands them over.

    """

    part: int = 2048
    shard: int = 2**29
    at_once: int = 32


USUAL = Sizes()
_COLUMNS = ("rows", "columns", "places", "checks")


class _Part(NamedTuple):
    """The images of one part: their sizes, their numbers in the source, where their pixels are, and the bad ones."""

    table: dict[str, Tensor]  # of `_COLUMNS`
    shard: int
    stop: int  # bytes of the shard that are written with this part
    done: int  # the first image after it
    square: int  # the common side of all square images so far, 0 if they differ
    reasons: dict[str, str]


class PackWriter:
    """Writes shards part by part, so that a kill at any moment loses at most one part.

    The pixels of a part are written to disk first, then the small file that counts the part. When a killed run
    continues, a shard is cut after its last counted part. Where parts and shards end depends on the images alone.
    """

    def __init__(self, folder: Path, source: Images, metadata: dict[str, Any], sizes: Sizes = USUAL) -> None:
        self.folder, self.source, self.metadata, self.sizes = folder, source, metadata, sizes
        self.bad_files, self.finished = source.bad_files(), list[_Part]()

    @property
    def done(self) -> int:
        """The first image that is still to do."""
        return self.finished[-1].done if self.finished else 0

    def bytes(self) -> int:
        """The pixels that are written."""
        return sum(self._lengths())

    def start(self) -> int:
        """Go back to the last finished part, and return the number of bytes written."""
        for file in self.folder.iterdir():
            if file.is_symlink():
                file.unlink()  # a link is removed, so that its target is never written or cut
        _write(self.folder / UNFINISHED, self.metadata)
        while (part := _read_part(self._part_file())) is not None:
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
        """Store all the pieces; yield the number of finished images after each."""
        waiting: list[Decoded] = []
        requested = self.done
        for piece in pieces:
            waiting.append(piece)
            requested = min(requested + piece.requested, len(self.source))
            if requested - self.done >= self.sizes.part or requested == len(self.source):
                self._store(waiting, requested)
                waiting = []
            yield requested

    def finish(self) -> int:
        """Write the index, and last the file that marks the pack as complete; return the number of images.

        Raises:
            SourceError: fewer than 2 images can be read.

        """
        if len(self.bad_files):
            self.bad_files.write(self.folder / BAD_FILES)
        table = _index_of(self.finished, self.source)
        count = len(table["rows"])
        if count < 2:
            raise SourceError(
                f"{self.source.name}: needs at least 2 images, only {count} of {len(self.source)} can be read "
                f"(see {self.folder / BAD_FILES})"
            )
        write_tensors(self.folder / INDEX, table)
        totals = {"images": count, "classes": self.source.classes, "shards": self._lengths()}
        _write(self.folder / ABOUT, {**self.metadata, **totals})
        self.tidy()
        return count

    def renew(self) -> None:
        """Store the source's present path and times of change, to notice later changes."""
        table, metadata = load_safetensors(self.folder / INDEX)[0], read_about(self.folder / ABOUT)
        watched = _watched(self.source)
        if any(name not in table or not torch.equal(table[name], column) for name, column in watched.items()):
            write_tensors(self.folder / INDEX, table | watched)
        if metadata != metadata | self.metadata:
            _write(self.folder / ABOUT, metadata | self.metadata)

    def tidy(self) -> None:
        """Delete the files that only an unfinished pack needs."""
        for file in (*self.folder.glob("part-*"), *self.folder.glob("*.tmp"), self.folder / UNFINISHED):
            file.unlink(missing_ok=True)
        sweep(self.folder)

    def _store(self, pieces: list[Decoded], done: int) -> None:
        rows, columns = torch.cat([p.rows for p in pieces]), torch.cat([p.columns for p in pieces])
        last = self.finished[-1] if self.finished else None
        shard, stop = (last.shard, last.stop) if last else (0, 0)
        square = _common(rows, columns, last.square if last else None)
        if stop >= self.sizes.shard and not square:
            shard, stop = shard + 1, 0
        with (self.folder / shard_name(shard)).open("ab") as file:
            for piece in pieces:
                _append(file, piece.pixels)
            stop = file.tell()
            os.fsync(file.fileno())
        reasons = {path: reason for piece in pieces for path, reason in piece.errors}
        indices, checks = (torch.cat([getattr(p, name) for p in pieces]) for name in ("numbers", "checks"))
        table = dict(zip(_COLUMNS, (rows.int(), columns.int(), indices, checks), strict=True))
        part = _Part(table, shard, stop, done, square, reasons)
        _write_part(self._part_file(), part)
        self._count(part)

    def _count(self, part: _Part) -> None:
        self.finished.append(part)
        for path, reason in part.reasons.items():
            self.bad_files.add(path, reason)

    def _part_file(self) -> Path:
        """The file of the next part."""
        return self.folder / f"part-{len(self.finished):06}.safetensors"

    def _lengths(self) -> list[int]:
        """Bytes of each shard."""
        return list({part.shard: part.stop for part in self.finished}.values())


def _index_of(chunks: list[_Part], source: Images) -> dict[str, Tensor]:
    """The pack's index: size and path of each image, labels and tracks if there are any, and files to watch."""
    rows, columns, indices, checks = (torch.cat([part.table[name] for part in chunks]) for name in _COLUMNS)
    table = {"rows": rows, "columns": columns, "checks": checks}
    table |= _columns("paths", take_strings(source.paths, indices)) | _watched(source)
    for name, column in (("labels", source.labels), ("tracks", source.tracks)):
        if column is not None:
            table[name] = column[indices]
    return table


def clear(folder: Path) -> None:
    """Delete a pack."""
    # A kill in between leaves an unfinished pack, and never one that looks complete.
    if (folder / ABOUT).is_file():
        os.replace(folder / ABOUT, folder / UNFINISHED)
        sync_folder(folder)
    for pattern in (INDEX, "*.tmp", "part-*", "*.bin", BAD_FILES):
        for file in folder.glob(pattern):
            file.unlink()


def _common(rows: Tensor, columns: Tensor, before: int | None) -> int:
    """The common square size of these and the former images (None: no former ones), 0 if they differ."""
    if not len(rows):
        return -1 if before is None else before
    side = int(rows[0])
    same = bool((rows == side).all() and (columns == side).all()) and before in (None, -1, side)
    return side if same else 0


def _append(file: BinaryIO, pixels: Tensor) -> None:
    file.write(pixels.numpy().data)


def _write_part(file: Path, part: _Part) -> None:
    fields = {name: getattr(part, name) for name in ("shard", "stop", "done", "square")}
    write_tensors(file, part.table, {"part": json.dumps({**fields, "bad": part.reasons})})


def _read_part(file: Path) -> _Part | None:
    """A finished part; None if it is missing, damaged or of a former version."""
    try:
        table, metadata = load_safetensors(file)
        fields = json_tree(metadata["part"])
        return _Part({name: table[name] for name in _COLUMNS}, reasons=fields.pop("bad"), **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    write(file, json.dumps({**content, "check": check_of(content)}, indent=1) + "\n")


def _columns(name: str, strings: Any) -> dict[str, Tensor]:
    paths = strings if isinstance(strings, Paths) else Paths.of(strings)
    return {f"{name}.text": paths.text, f"{name}.ends": paths.ends}


def _watched(source: Images) -> dict[str, Tensor]:
    """The index columns that later show whether the source has changed."""
    watch = source.watch
    if watch is None:
        return {}
    sizes = {} if watch.sizes is None else {"sizes": watch.sizes}
    return {"times": watch.times, **_columns("watched", watch.paths), **sizes}
