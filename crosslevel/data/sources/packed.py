"""Packs: images decoded and resized once, read through memory maps from then on.

A pack is a folder. Its shards ``00000.bin``, ... hold the pixels of one image after the other, uncompressed, each as
(H, W, 3) bytes: crops are fastest in this memory order. ``index.safetensors`` has a row for every image, and
``pack.json`` describes the source; it is written last, so that a folder with it is complete. Each image has a checksum
in the index, which is verified when the image is first read; index and pack.json have their own. Packs of former
versions have no checksums, and are read without.

Uncompressed pixels take several times the space of JPEG (262 kB for a 256 x 341 image), but are read at the speed of
memory; a compressed format would have to be decoded again in every epoch.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.index_cache import Paths
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.data.loaders.workers import worth_workers
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.tensors import load_safetensors
from crosslevel.utils.trees import json_tree

if TYPE_CHECKING:
    from crosslevel.data.cluster import Opened

INDEX, ABOUT, UNFINISHED = "index.safetensors", "pack.json", "unfinished.json"
VERSION = 1


def is_pack(folder: str) -> bool:
    """Whether ``folder`` holds a pack, complete or unfinished."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (ABOUT, UNFINISHED))


def open_pack(folder: str) -> Images:
    """The images of a pack: ``SquarePack`` where all have one square size, else ``Pack``.

    Warns if the source has changed since: if images were added, removed or renamed, or if a shard, a Parquet file, a
    video, an annotation or a local copy of a data set of the hub was changed. An image file with new content under its
    old name, and a newer revision on the hub, are only noticed by packing again.

    Raises:
        SourceError: it is unfinished, damaged, or of another version.

    """
    path = Path(folder)
    if not (path / ABOUT).is_file():
        raise SourceError(f"{folder}: this pack is not finished: run the same crosslevel pack again, it continues")
    metadata, index, shards = _contents(folder)
    _warn_of_changes(folder, metadata, index)
    rows, columns = index["rows"], index["columns"]
    common = int(rows[0])
    if len(shards) == 1 and bool((rows == common).all() and (columns == common).all()):
        return SquarePack(folder, metadata, index, shards[0], common)
    return Pack(folder, metadata, index, shards)


def _contents(folder: str) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """Read a pack's metadata, index and shards.

    Raises:
        SourceError: they are damaged, or of another version.

    """
    path = Path(folder)
    try:
        metadata = read_about(path / ABOUT)
        if metadata["version"] != VERSION:
            raise SourceError(f"{folder}: a pack of version {metadata['version']}, this is {VERSION}: pack again")
        index, _ = load_safetensors(path / INDEX)
        areas = 3 * index["rows"].long() * index["columns"].long()
        shards = [_mapped(path / shard_name(s), size) for s, size in enumerate(metadata["shards"])]
        lengths = {len(index[name]) for name in ("rows", "columns", "paths.ends", "checks") if name in index}
        if lengths != {metadata["images"]} or int(areas.sum()) != sum(map(len, shards)) or int(areas.min()) < 1:
            raise UserError("its index is not that of its shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SourceError):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise SourceError(f"{folder}: this pack is damaged ({reason}): delete it and pack again") from error
    return metadata, index, shards


def read_about(file: Path) -> dict[str, Any]:
    """The content of pack.json, or of its counterpart in an unfinished pack.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.

    """
    content: dict[str, Any] = json_tree(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file.name} holds no settings")
    written = content.pop("check", None)
    # Another version may compute it in another way.
    if content.get("version") == VERSION and written not in (None, check_of(content)):
        raise UserError(f"{file.name} is not as it was written")
    return content


def check_of(metadata: dict[str, Any]) -> str:
    """A checksum (CRC-32) of pack.json's content."""
    return f"{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}"


class _Checks:
    """The checksums of images (CRC-32); each is verified when this process first reads the image."""

    def __init__(self, folder: str, index: dict[str, Tensor]) -> None:
        self.folder, self.checks = folder, index.get("checks")
        self.unread = torch.full((len(index["rows"]) if self.checks is not None else 0,), True)

    def look(self, i: int, pixels: UInt8[Tensor, " L"], path: str) -> None:
        """Compare an image's bytes.

        Raises:
            SourceError: they differ from those that were written.

        """
        if self.checks is None or not self.unread[i]:
            return
        if zlib.crc32(pixels.numpy().data) != int(self.checks[i]):
            raise SourceError(
                f"{self.folder}: this pack is damaged (the pixels of {path} are not those that were written): "
                "delete it and pack again"
            )
        self.unread[i] = False


class Pack(Images):
    """Images of several sizes: image i is a slice of a memory map."""

    decodes = False

    def __init__(self, folder: str, metadata: dict[str, Any], index: dict[str, Tensor], shards: list[Tensor]) -> None:
        _describe(self, folder, metadata, index)
        self.folder, self.shards = folder, shards
        self.rows, self.columns = index["rows"].int(), index["columns"].int()
        self.ends = (3 * self.rows.long() * self.columns).cumsum(0)
        self.shard_ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
        self._made_of, self._checks = _fingerprint(metadata), _Checks(folder, index)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i and its label (-1 without labels); changes to it never reach the file."""
        i = range(len(self.rows))[i]
        rows, columns, end = int(self.rows[i]), int(self.columns[i]), int(self.ends[i])
        shard = int(torch.searchsorted(self.shard_ends, end))
        stop = end - int(self.shard_ends[shard]) + len(self.shards[shard])
        flat = self.shards[shard][stop - 3 * rows * columns : stop]
        self._checks.look(i, flat, self.paths[i])
        return flat.view(rows, columns, 3).permute(2, 0, 1), -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """Bytes that identify the pack by its origin: hashing its pixels would read all of it."""
        return [self._made_of]

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not forked maps the files itself, so that pixels are not pickled.
        return open_pack, (self.folder,)


class SquarePack(InMemoryImages):
    """Images of one square size: one tensor on a memory map."""

    def __init__(
        self, folder: str, metadata: dict[str, Any], index: dict[str, Tensor], shard: Tensor, side: int
    ) -> None:
        self.flat = shard.view(-1, 3 * side**2)
        images = self.flat.view(-1, side, side, 3).permute(0, 3, 1, 2)
        super().__init__(images, _paths(index, "paths"))
        _describe(self, folder, metadata, index)
        self.folder, self._made_of, self._checks = folder, _fingerprint(metadata), _Checks(folder, index)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 S S"], int]:
        """Image i and its label (-1 without labels); changes to it never reach the file."""
        i = range(len(self.flat))[i]
        self._checks.look(i, self.flat[i], self.paths[i])
        return super().__getitem__(i)

    def batch(self, index: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
        """The images of ``index``, copied once."""
        side = self.data.shape[-1]
        self._look(index)
        return self.flat.index_select(0, index).view(-1, side, side, 3).permute(0, 3, 1, 2)

    def check(self) -> None:
        """Verify the checksums of all images that were not read yet."""
        self._look(torch.arange(len(self.flat)))

    def _look(self, index: Int64[Tensor, " B"]) -> None:
        if self._checks.checks is not None:
            for i in index[self._checks.unread[index]].tolist():
                self._checks.look(i, self.flat[i], self.paths[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """Bytes that identify the pack by its origin: hashing its pixels would read all of it."""
        return [self._made_of]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_pack, (self.folder,)


class Decoded(NamedTuple):
    """Consecutive images in the layout of shards, with their sizes and their numbers in the source.

    ``checks`` are the images' checksums; ``requested`` counts the readable and the unreadable images.
    """

    pixels: UInt8[Tensor, " L"]
    checks: Int64[Tensor, " N"]
    rows: Int64[Tensor, " N"]
    columns: Int64[Tensor, " N"]
    numbers: Int64[Tensor, " N"]
    requested: int
    errors: list[tuple[str, str]]


def decoded(
    images: Images, size: int, numbers: range, workers: int | None, at_once: int, elsewhere: Opened | None = None
) -> Iterator[Decoded]:
    """The images ``numbers`` in order, brought to ``size``, ``at_once`` at a time; ``workers`` as for `EvalBatches`.

    ``elsewhere`` are the same images for the machines of a cluster, which then work instead of local processes.
    """
    keys = [numbers[first : first + at_once] for first in range(0, len(numbers), at_once)]
    if elsewhere is not None:
        yield from elsewhere.mapped(partial(_PackJob, size=size), keys)
        return
    job = _PackJob(images, size)
    workers = worth_workers(job, len(images)) if workers is None else workers
    if workers:
        yield from Pool(job, keys, workers, persistent=False)
    else:
        yield from ahead(job.__getitem__, keys)


def shrunk(image: UInt8[Tensor, "3 H W"], size: int) -> UInt8[Tensor, "3 h w"]:
    """The shorter side resized to ``size`` (bilinear, antialiased) where it is longer; never enlarged."""
    if min(image.shape[-2:]) <= size:
        return image
    smaller: Tensor = tvf.resize(image, [size], antialias=True)
    return smaller


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:05}.bin"


@dataclass
class _PackJob(Dataset[Decoded]):
    images: Images
    size: int

    def __getitem__(self, key: range) -> Decoded:
        pictures, numbers, errors = [], [], []
        for i in key:
            try:
                pictures.append(shrunk(self.images[i][0], self.size))
                numbers.append(i)
            except BadImage as error:
                errors.append((error.path, error.reason))
        sizes = torch.tensor([picture.shape[1:] for picture in pictures], dtype=torch.int64).view(-1, 2)
        flat = [picture.permute(1, 2, 0).reshape(-1) for picture in pictures]
        checks = torch.tensor([zlib.crc32(pixels.numpy().data) for pixels in flat], dtype=torch.int64)
        pixels = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)
        return Decoded(
            pixels, checks, sizes[:, 0], sizes[:, 1], torch.tensor(numbers, dtype=torch.int64), len(key), errors
        )


def _describe(images: Images, folder: str, metadata: dict[str, Any], index: dict[str, Tensor]) -> None:
    images.name, images.paths, images.classes = folder, _paths(index, "paths"), metadata["classes"]
    images.labels, images.tracks = index.get("labels"), index.get("tracks")


def _fingerprint(metadata: dict[str, Any]) -> bytes:
    """Bytes that identify the pack by its origin: hashing its pixels would read all of it."""
    return f"{metadata['identity']} {metadata['size']}".encode()


def _paths(index: dict[str, Tensor], name: str) -> Paths:
    return Paths(index[f"{name}.text"], index[f"{name}.ends"])


def _mapped(file: Path, size: int) -> UInt8[Tensor, " L"]:
    """A file's bytes as a tensor: read on demand, and shared by all processes; writes stay in memory."""
    if file.stat().st_size != size:
        raise UserError(f"{file.name} has {file.stat().st_size:,} bytes, not {size:,}")
    with file.open("rb") as opened:
        if sys.platform == "linux":
            # Without a reservation (MAP_NORESERVE), as a pack may be larger than the memory.
            private = mmap.MAP_PRIVATE | 0x4000
            view = mmap.mmap(opened.fileno(), size, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            view = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
    return torch.frombuffer(view, dtype=torch.uint8)


def _warn_of_changes(folder: str, metadata: dict[str, Any], index: dict[str, Tensor]) -> None:
    location = metadata["where"]
    if "times" not in index:
        return
    watch = Watch(metadata.get("watched", location), _paths(index, "watched"), index["times"], index.get("sizes"))
    if not watch.holds() and not watch.is_missing():
        source = metadata["source"] if location is None else location
        warnings.warn(f"{folder}: {source} has changed since it was packed: crosslevel pack again", stacklevel=3)
