"""Where images come from: folders and lists of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.watch import Watch


class Images(Dataset[tuple[Tensor, int]]):
    """N images as uint8 (3, H, W), with labels only where the source has them.

    ``name`` is the source as the user wrote it; ``paths[i]`` names image i relative to the source;
    ``labels`` is None where the source has none; ``classes[c]`` names label c; images of one track, such as the
    frames of one film, have the same number in ``tracks``, which is None where nothing is known of any. ``blocks``
    are the runs of images that are read together far faster than one by one, such as those compressed as one; they
    cover all images in order, and are None where any order is as fast. ``left_out`` says of files whose images are
    missing, all or some of them, why: a shard that is cut off, a film that cannot be decoded. ``watch`` tells later
    whether the source has changed since it was opened, and is None where nothing could.
    """

    name: str
    paths: Sequence[str]
    labels: Int64[Tensor, " N"] | None = None
    classes: list[str] | None = None
    tracks: Int64[Tensor, " N"] | None = None
    blocks: Sequence[range] | None = None
    left_out: Mapping[str, str] = MappingProxyType({})
    watch: Watch | None = None

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be decoded.

        """
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when an image, its label or the order does; the same wherever the source lies."""
        digest = hashlib.sha256()
        for column in (self.labels, self.tracks):
            digest.update(b"-" if column is None else column.numpy().tobytes())
        digest.update("\n".join(self.classes or []).encode(errors="surrogateescape"))
        for part in self._content():
            digest.update(part)
        return digest.hexdigest()

    def bad_files(self) -> BadFiles:
        """A new list of what cannot be read: it begins with what is left out."""
        bad = BadFiles()
        bad.leave_out(self.left_out)
        return bad

    def _content(self) -> Iterable[bytes | memoryview]:
        """What tells these images from others."""
        raise NotImplementedError


class InMemoryImages(Images):
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

    def _content(self) -> Iterable[bytes | memoryview]:
        for chunk in self.data.split(4096):
            yield memoryview(chunk.contiguous().numpy()).cast("B")
