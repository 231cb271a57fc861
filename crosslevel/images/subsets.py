"""Parts of a source."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.images.sources import Images, Packed


class Subset(Images):
    """The images ``index`` of another source, in that order."""

    def __init__(self, images: Images, index: Int64[Tensor, " M"]) -> None:
        self.images, self.index = images, index
        self.name, self.classes = images.name, images.classes
        self.paths = [images.paths[i] for i in index.tolist()]
        self.labels = None if images.labels is None else images.labels[index]
        self.tracks = None if images.tracks is None else images.tracks[index]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i of the subset and its label (-1 without labels)."""
        return self.images[int(self.index[i])]

    def _content(self) -> Iterable[bytes | memoryview]:
        return [self.images.identity().encode(), self.index.numpy().tobytes()]


def take(images: Images, index: Int64[Tensor, " M"]) -> Images:
    """The images ``index``: packed images stay packed."""
    part = Subset(images, index)
    if not isinstance(images, Packed):
        return part
    packed = Packed(images.batch(index), part.paths, part.labels, part.classes, part.name)
    packed.tracks = part.tracks
    return packed


def unlabelled(images: Images) -> Images:
    """The same images without labels and classes; what is known of tracks stays."""
    bare = copy.copy(images)
    bare.labels = bare.classes = None
    if isinstance(bare, Subset):
        bare.images = unlabelled(bare.images)
    return bare


def sample(images: Images, most: int, generator: torch.Generator) -> Int64[Tensor, " M"]:
    """At most ``most`` different indices, drawn uniformly, in ascending order."""
    return torch.randperm(len(images), generator=generator)[:most].sort().values


def long_tailed(
    labels: Int64[Tensor, " N"], imbalance: float, generator: torch.Generator | None = None
) -> Int64[Tensor, " M"]:
    """Indices of a long-tailed part: class c of C keeps n * imbalance^(-c / (C - 1)) images, n the largest class's.

    The convention of the long-tailed CIFAR sets (Cui et al., CVPR 2019, section 5.1): at imbalance 100, 12,406
    of CIFAR-10's training images.

    Args:
        labels: of all images, in [0, C).
        imbalance: how many times larger the largest class is than the smallest, at least 1.
        generator: draws which images stay.

    Raises:
        ValueError: an imbalance below 1, or one that leaves a class empty.

    """
    if imbalance < 1:
        raise ValueError(f"imbalance={imbalance} must be at least 1")
    counts = torch.bincount(labels)
    most, last = int(counts.max()), max(1, len(counts) - 1)
    order = torch.randperm(len(labels), generator=generator)
    kept = []
    for c, count in enumerate(counts.tolist()):
        wanted = min(count, int(most * imbalance ** (-c / last)))
        if wanted == 0:
            raise ValueError(f"imbalance={imbalance} leaves nothing of class {c}: lower it")
        kept.append(order[labels[order] == c][:wanted])
    return torch.cat(kept).sort().values
