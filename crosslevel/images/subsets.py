"""Parts of a source."""

from __future__ import annotations

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

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i of the subset and its label (-1 without labels)."""
        return self.images[int(self.index[i])]


def take(images: Images, index: Int64[Tensor, " M"]) -> Images:
    """The images ``index``: packed images stay packed."""
    part = Subset(images, index)
    if not isinstance(images, Packed):
        return part
    return Packed(images.batch(index), part.paths, part.labels, part.classes, part.name)


def sample(images: Images, most: int, generator: torch.Generator) -> Int64[Tensor, " M"]:
    """At most ``most`` different indices, drawn uniformly, in ascending order."""
    return torch.randperm(len(images), generator=generator)[:most].sort().values
