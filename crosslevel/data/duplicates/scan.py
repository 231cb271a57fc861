"""One pass over the images: it keeps a small record of each, to find copies and to describe the collection."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.images import Images
from crosslevel.data.loaders.records import records
from crosslevel.utils.errors import SourceError
from crosslevel.utils.tensors import as_rgb

if TYPE_CHECKING:
    from crosslevel.data.cluster import Opened

_AT_A_TIME = 256


class ScanResult(NamedTuple):
    """The result of one pass over M readable images.

    ``pictures`` all have one small size; ``shape`` is the image's height and width in pixels; ``content`` is a checksum
    of all its pixels and of the shape; ``numbers`` are the images' numbers in the source.
    """

    pictures: UInt8[Tensor, "M 3 32 32"]
    shape: Int64[Tensor, "M 2"]
    content: Int64[Tensor, " M"]
    numbers: Int64[Tensor, " M"]


def scan(
    images: Images,
    bad_files: BadFiles,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    elsewhere: Opened | None = None,
) -> ScanResult:
    """Pass over the images once, some at a time; 3 KB of each are kept.

    ``elsewhere`` are the same images for the machines of a cluster, whose results are joined here.

    Raises:
        SourceError: fewer than 2 images can be read.

    """
    total, count = len(images), 0
    pictures, shape = torch.empty(total, 3, SIDE, SIDE, dtype=torch.uint8), torch.empty(total, 2, dtype=torch.int64)
    content, numbers = torch.empty(total, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
    for batch, glances in records(
        images, glance, _AT_A_TIME, bad_files=bad_files, workers=workers, elsewhere=elsewhere
    ):
        new = slice(count, count + len(batch))
        pictures[new], shape[new], content[new], numbers[new] = *glances, batch
        count = new.stop
        progress(int(batch[-1]) + 1)
    if count < 2:
        raise SourceError(
            f"{images.name}: needs at least 2 images, only {count} of {total} can be read{bad_files.first}"
        )
    return ScanResult(pictures[:count], shape[:count], content[:count], numbers[:count])


class Glance(NamedTuple):
    """One scanned image: a small picture, height and width in pixels, and a checksum of all its pixels."""

    picture: UInt8[Tensor, "3 32 32"]
    shape: Int64[Tensor, 2]
    content: Int64[Tensor, ""]


def glance(image: UInt8[Tensor, "3 H W"], content: int | None = None) -> Glance:
    """The record of an image; ``content`` is its checksum, if it is known already."""
    small = tvf.resize(as_rgb(image), [SIDE, SIDE], antialias=True)
    checksum = content_of(image) if content is None else content
    return Glance(small, torch.tensor(image.shape[1:]), torch.tensor(checksum))


def content_of(image: UInt8[Tensor, "3 H W"]) -> int:
    """A checksum of 64 bits of the pixels and of the shape."""
    shape = "x".join(map(str, image.shape[1:])).encode()
    digest = hashlib.blake2b(image.contiguous().numpy().data, digest_size=8, person=shape).digest()
    return int.from_bytes(digest, "little", signed=True)
