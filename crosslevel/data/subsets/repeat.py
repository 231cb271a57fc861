"""Near-duplicates: every image several times, each time shifted by a few pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.images import Images, ImageView, InMemoryImages
from crosslevel.data.index_cache import Names
from crosslevel.utils.errors import UserError

IN_MEMORY = 1e9  # bytes: beyond this, copies of packed images are made on demand


class Repeated(ImageView):
    """``times`` copies of every image, one after the other, each shifted by up to ``shift`` pixels.

    The shift is uniform in [-shift, shift] down and across, drawn from (``seed``, the image's path, copy): so an image
    has the same copies in any part of the source. Pixels that move out are replaced by reflection. Copy j of ``a.jpg``
    has the path ``a.jpg#j``. ``tracks`` are the source's; if it has none, the copies of one image are a track.

    Raises:
        ValueError: fewer than one copy, or a negative shift.

    """

    def __init__(self, images: Images, times: int, shift: int = 2, seed: int = 0) -> None:
        if times < 1 or shift < 0:
            raise UserError(f"repeat={times}, shift={shift}: needs at least 1 copy and 0 pixels")
        if times * len(images) >= 2**31:
            raise UserError(f"repeat={times} makes {times * len(images):,} of {len(images):,} images: fewer than 2^31")
        super().__init__(images, paths=_Copies(images.paths, times))
        self.times, self.shift, self.seed = times, shift, seed
        self.labels = None if images.labels is None else images.labels.repeat_interleave(times)
        owners = torch.arange(len(images.paths)) if images.tracks is None else images.tracks
        self.tracks = owners.repeat_interleave(times)
        if images.blocks is not None:
            self.blocks = [range(block.start * times, block.stop * times) for block in images.blocks]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Copy i and its label (-1 without labels)."""
        image, _ = self.images[i // self.times]
        return _shifted(image, *self.offset(i)), -1 if self.labels is None else int(self.labels[i])

    def offset(self, i: int) -> tuple[int, int]:
        """How many pixels copy i is shifted down and across."""
        return _offset(self.paths[i], self.seed, self.shift)

    def content(self) -> Iterable[bytes | memoryview]:
        """The source's identity, the settings of the repetition, and the paths that determine the shifts."""
        yield f"{self.images.identity()} {self.times} {self.shift} {self.seed}\0".encode()
        for path in self.images.paths:
            yield f"{path}\0".encode(errors="surrogateescape")


class _Copies(Names):
    """The names of all copies, made on demand: for a million images they would take a gigabyte."""

    def __init__(self, paths: Sequence[str], times: int) -> None:
        self.paths, self.times = paths, times

    def __len__(self) -> int:
        return len(self.paths) * self.times

    def name(self, i: int) -> str:
        """The name of copy i."""
        return f"{self.paths[i // self.times]}#{i % self.times}"


def repeat(images: Images, times: int, shift: int = 2, seed: int = 0, in_memory: float = IN_MEMORY) -> Images:
    """`Repeated`; packed images stay packed where the copies take at most ``in_memory`` bytes."""
    copies = Repeated(images, times, shift, seed)
    if not isinstance(images, InMemoryImages) or images.data.numel() * times > in_memory:
        return copies
    return InMemoryImages.of(_copied(images, copies), copies)


def _copied(images: InMemoryImages, copies: Repeated) -> UInt8[Tensor, "M 3 S S"]:
    """All copies at once: those with the same shift together."""
    data = images.data.new_empty(len(copies), *images.data.shape[1:])
    offsets = torch.tensor([_offset(path, copies.seed, copies.shift) for path in copies.paths])
    for offset in offsets.unique(dim=0):
        rows = (offsets == offset).all(1).nonzero()[:, 0]
        data[rows] = _shifted(images.batch(rows // copies.times), *offset.tolist())
    return data


def _shifted(image: UInt8[Tensor, "*B 3 H W"], down: int, across: int) -> UInt8[Tensor, "*B 3 H W"]:
    height, width = image.shape[-2:]
    # index_select, as indexing by tensors starts threads, even for one small image.
    return image.index_select(-2, reflected(down, height)).index_select(-1, reflected(across, width))


def _offset(path: str, seed: int, shift: int) -> tuple[int, int]:
    """Two numbers, each uniform in [-shift, shift]; they depend on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}\0{path}".encode(errors="surrogateescape"), digest_size=16).digest()
    down, across = (int.from_bytes(half, "little") % (2 * shift + 1) - shift for half in (digest[:8], digest[8:]))
    return down, across


@lru_cache(maxsize=1024)  # not to be written into
def reflected(shift: int, size: int) -> Int64[Tensor, " size"]:
    """The source index of each pixel of a row of ``size`` that moves by ``shift``, mirrored at both ends."""
    around = max(1, 2 * (size - 1))
    position = (torch.arange(size) - shift) % around
    return torch.minimum(position, around - position) if size > 1 else torch.zeros(1, dtype=torch.long)
