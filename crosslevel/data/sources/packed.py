"""Packs: images decoded and resized once, read through memory maps from then on.

A pack is a folder. Its shards ``00000.bin``, ... hold the pixels of one image after the other, uncompressed, each as
(H, W, 3) bytes: the order in memory that crops are fastest from. ``index.safetensors`` has a row for every image and
``pack.json`` says what the images were; it is written last, so that a folder with it is whole.

Uncompressed pixels take several times the space of JPEG (a 256 x 341 image 262 kB), and reading them takes nothing
but memory's time; anything that is smaller would have to be decoded again in every epoch.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.index_cache import Paths
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.workers import ahead, worth_workers
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError, UserError

INDEX, ABOUT, UNFINISHED = "index.safetensors", "pack.json", "unfinished.json"
VERSION = 1
READ_AT_ONCE = 32  # images a worker decodes before it hands them over


def is_pack(folder: str) -> bool:
    """Whether ``folder`` holds a pack, whole or unfinished."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (ABOUT, UNFINISHED))


def open_pack(folder: str) -> Images:
    """The images of a pack: ``SquarePack`` where all have one square size, else ``Pack``.

    Warns if the source has changed since: if images were added, removed or renamed, or if a shard, a Parquet file, a
    video, an annotation or a local copy of a data set of the hub was changed. An image file with new content under its
    old name, and a newer revision on the hub, are only noticed by packing again.

    Raises:
        SourceError: it is not finished, damaged, or of another version.

    """
    path = Path(folder)
    if not (path / ABOUT).is_file():
        raise SourceError(f"{folder}: this pack is not finished: run the same crosslevel pack again, it continues")
    try:
        about: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about["version"] != VERSION:
            raise SourceError(f"{folder}: a pack of version {about['version']}, this is {VERSION}: pack again")
        index = load_file(path / INDEX)
        rows, columns = index["rows"].long(), index["columns"].long()
        shards = [_mapped(path / shard_name(s), size) for s, size in enumerate(about["shards"])]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{folder}: this pack is damaged ({error}): delete it and pack again") from error
    _warn_of_changes(folder, about, index)
    common = int(rows[0])
    if len(shards) == 1 and bool((rows == common).all() and (columns == common).all()):
        return SquarePack(folder, about, index, shards[0], common)
    return Pack(folder, about, index, shards)


class Pack(Images):
    """Images of several sizes: image i is a slice of a memory map."""

    def __init__(self, folder: str, about: dict[str, Any], index: dict[str, Tensor], shards: list[Tensor]) -> None:
        _describe(self, folder, about, index)
        self.folder, self.shards = folder, shards
        self.rows, self.columns = index["rows"].int(), index["columns"].int()
        self.ends = (3 * self.rows.long() * self.columns).cumsum(0)
        self.shard_ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
        self._made_of = _made_of(about)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i and its label (-1 without labels); changes to it never reach the file."""
        i = range(len(self.rows))[i]
        rows, columns, end = int(self.rows[i]), int(self.columns[i]), int(self.ends[i])
        shard = int(torch.searchsorted(self.shard_ends, end))
        stop = end - int(self.shard_ends[shard]) + len(self.shards[shard])
        pixels = self.shards[shard][stop - 3 * rows * columns : stop].view(rows, columns, 3)
        return pixels.permute(2, 0, 1), -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """What the pixels follow from: hashing them would read the whole pack."""
        return [self._made_of]

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that is not forked maps the files itself: the pixels are not sent.
        return open_pack, (self.folder,)


class SquarePack(InMemoryImages):
    """Images of one square size: one tensor on a memory map."""

    def __init__(self, folder: str, about: dict[str, Any], index: dict[str, Tensor], shard: Tensor, side: int) -> None:
        self.flat = shard.view(-1, 3 * side**2)
        images = self.flat.view(-1, side, side, 3).permute(0, 3, 1, 2)
        super().__init__(images, _paths(index, "paths"))
        _describe(self, folder, about, index)
        self.folder, self._made_of = folder, _made_of(about)

    def batch(self, index: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
        """The images of ``index``, copied once."""
        side = self.data.shape[-1]
        return self.flat.index_select(0, index).view(-1, side, side, 3).permute(0, 3, 1, 2)

    def content(self) -> Iterable[bytes | memoryview]:
        """What the pixels follow from: hashing them would read the whole pack."""
        return [self._made_of]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_pack, (self.folder,)


class Decoded(NamedTuple):
    """Images one after the other, as shards hold them, with their sizes and their numbers in the source.

    ``asked`` counts those that could be read and those that could not.
    """

    pixels: UInt8[Tensor, " L"]
    rows: Int64[Tensor, " N"]
    columns: Int64[Tensor, " N"]
    numbers: Int64[Tensor, " N"]
    asked: int
    bad: list[tuple[str, str]]


def decoded(images: Images, size: int, numbers: range, workers: int | None) -> Iterator[Decoded]:
    """The images ``numbers`` in order, brought to ``size``; ``workers`` as `EvalBatches` has them."""
    job = _PackJob(images, size)
    workers = worth_workers(job, len(images)) if workers is None else workers
    keys = [numbers[first : first + READ_AT_ONCE] for first in range(0, len(numbers), READ_AT_ONCE)]
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
        pictures, numbers, bad = [], [], []
        for i in key:
            try:
                pictures.append(shrunk(self.images[i][0], self.size))
                numbers.append(i)
            except BadImage as error:
                bad.append((error.path, error.reason))
        sizes = torch.tensor([picture.shape[1:] for picture in pictures], dtype=torch.int64).view(-1, 2)
        flat = [picture.permute(1, 2, 0).reshape(-1) for picture in pictures]
        pixels = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)
        return Decoded(pixels, sizes[:, 0], sizes[:, 1], torch.tensor(numbers, dtype=torch.int64), len(key), bad)


def _describe(images: Images, folder: str, about: dict[str, Any], index: dict[str, Tensor]) -> None:
    images.name, images.paths, images.classes = folder, _paths(index, "paths"), about["classes"]
    images.labels, images.tracks = index.get("labels"), index.get("tracks")


def _made_of(about: dict[str, Any]) -> bytes:
    """What the pixels follow from: hashing them would read the whole pack."""
    return f"{about['identity']} {about['size']}".encode()


def _paths(index: dict[str, Tensor], name: str) -> Paths:
    return Paths(index[f"{name}.text"], index[f"{name}.ends"])


def _mapped(file: Path, size: int) -> UInt8[Tensor, " L"]:
    """A file's bytes as a tensor: read when they are used, and shared by all processes; writes stay in memory."""
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


def _warn_of_changes(folder: str, about: dict[str, Any], index: dict[str, Tensor]) -> None:
    where = about["where"]
    if "times" not in index:
        return
    watch = Watch(about.get("watched", where), _paths(index, "watched"), index["times"], index.get("sizes"))
    if not watch.holds() and not watch.gone():
        named = about["source"] if where is None else where
        warnings.warn(f"{folder}: {named} has changed since it was packed: crosslevel pack again", stacklevel=3)
