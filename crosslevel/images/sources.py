"""Where images come from: folders, lists of files, CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset


class BadImage(Exception):
    """One image that cannot be read: ``path`` names it, ``reason`` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Images(Dataset[tuple[Tensor, int]]):
    """N images as uint8 (3, H, W), with labels only where the source has them.

    ``name`` is the source as the user wrote it; ``paths[i]`` names image i relative to the source;
    ``labels`` is None where the source has none; ``classes[c]`` names label c.
    """

    name: str
    paths: Sequence[str]
    labels: Int64[Tensor, " N"] | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be decoded.
        """
        raise NotImplementedError


class Packed(Images):
    """Images of one size in one uint8 tensor in memory: a batch is one index operation."""

    def __init__(
        self,
        data: UInt8[Tensor, "N 3 S S"],
        paths: Sequence[str],
        labels: Int64[Tensor, " N"] | None = None,
        classes: list[str] | None = None,
        name: str = "packed",
    ) -> None:
        if len(data) != len(paths) or (labels is not None and len(labels) != len(data)):
            raise ValueError(f"{len(data)} images, {len(paths)} paths: the lengths must agree")
        self.data, self.paths, self.labels, self.classes, self.name = data, paths, labels, classes, name

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 S S"], int]:
        """Image i and its label (-1 without labels)."""
        return self.data[i], -1 if self.labels is None else int(self.labels[i])

    def batch(self, index: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
        """The images of ``index``, copied once."""
        return torch.index_select(self.data, 0, index)
