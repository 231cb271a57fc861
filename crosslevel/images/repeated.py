"""Near-duplicates: every image several times, each time shifted by a few pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.images.indexes import Paths
from crosslevel.images.sources import Images, Packed

IN_MEMORY = 1e9  # bytes: copies of packed images beyond this are made when they are asked for


class Repeated(Images):
    """``times`` copies of every image, one after the other, each shifted by up to ``shift`` pixels.

    The shift is uniform in [-shift, shift] down and across, drawn from (``seed``, the image's path, copy): the same
    image has the same copies in any part of the source. What leaves the frame is replaced by reflection. Copy j of
    ``a.jpg`` has the path ``a.jpg#j``. ``tracks`` are the source's or, where it has none, the originals' places.

    Raises:
        ValueError: fewer than one copy, or a negative shift.

    """

    def __init__(self, images: Images, times: int, shift: int = 2, seed: int = 0) -> None:
        if times < 1 or shift < 0:
            raise ValueError(f"repeat={times}, shift={shift}: needs at least 1 copy and 0 pixels")
        self.images, self.times, self.shift, self.seed = images, times, shift, seed
        self.name, self.classes = images.name, images.classes
        self.paths = Paths.of(f"{path}#{copy}" for path in images.paths for copy in range(times))
        self.labels = None if images.labels is None else images.labels.repeat_interleave(times)
        owners = torch.arange(len(images.paths)) if images.tracks is None else images.tracks
        self.tracks = owners.repeat_interleave(times)
        if images.blocks is not None:
            self.blocks = [range(block.start * times, block.stop * times) for block in images.blocks]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Copy i and its label (-1 without labels)."""
        image, _ = self.images[i // self.times]
        down, across = self.offset(i)
        height, width = image.shape[1:]
        shifted = image[:, reflected(down, height)][:, :, reflected(across, width)]
        return shifted, -1 if self.labels is None else int(self.labels[i])

    def offset(self, i: int) -> tuple[int, int]:
        """How many pixels copy i is shifted down and across."""
        name = f"{self.seed}\0{self.paths[i]}".encode(errors="surrogateescape")
        drawn = hashlib.blake2b(name, digest_size=16).digest()
        halves = (int.from_bytes(half, "little") for half in (drawn[:8], drawn[8:]))
        down, across = (half % (2 * self.shift + 1) - self.shift for half in halves)
        return down, across

    def _content(self) -> Iterable[bytes | memoryview]:
        yield f"{self.images.identity()} {self.times} {self.shift} {self.seed}\0".encode()
        for path in self.images.paths:
            yield f"{path}\0".encode(errors="surrogateescape")


def repeat(images: Images, times: int, shift: int = 2, seed: int = 0) -> Images:
    """`Repeated`; packed images stay packed where the copies take less than `IN_MEMORY`."""
    copies = Repeated(images, times, shift, seed)
    if not isinstance(images, Packed) or images.data.numel() * times > IN_MEMORY:
        return copies
    data = torch.cat([_copies(images, copies, first) for first in range(0, len(images), 4096)])
    packed = Packed(data, copies.paths, copies.labels, copies.classes, copies.name)
    packed.tracks = copies.tracks
    return packed


def _copies(images: Packed, copies: Repeated, first: int) -> UInt8[Tensor, "M 3 S S"]:
    """All copies of 4,096 images at once."""
    some = images.data[first : first + 4096]
    owner = torch.arange(len(some)).repeat_interleave(copies.times)
    offsets = [copies.offset(first * copies.times + i) for i in range(len(owner))]
    # All shifts of a row, looked up by shift.
    rows, columns = (
        torch.stack([reflected(s, size) for s in range(-copies.shift, copies.shift + 1)]) for size in some.shape[2:]
    )
    down, across = (torch.tensor(offsets) + copies.shift).unbind(1)
    return some[
        owner[:, None, None, None],
        torch.arange(3)[:, None, None],
        rows[down][:, None, :, None],
        columns[across][:, None, None, :],
    ]


def reflected(shift: int, size: int) -> Int64[Tensor, " size"]:
    """Where the pixels of a row of ``size`` come from when it moves by ``shift``, mirrored at its first and last."""
    around = max(1, 2 * (size - 1))
    place = (torch.arange(size) - shift) % around
    return torch.minimum(place, around - place) if size > 1 else torch.zeros(1, dtype=torch.long)
