"""What every source of images offers (`Images`), a selection of another source, and images that are in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.index_cache import take_strings
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import UserError


class Images(Dataset[tuple[Tensor, int]]):
    """N images as uint8 (C, H, W), with labels only where the source has them; C is 3 unless ``reading`` sets it.

    - ``name``: the source as the user wrote it.
    - ``paths[i]``: the name of image i, relative to the source.
    - ``labels``, ``classes``: the label of each image, and the name of each label; None where the source has none.
    - ``tracks``: the same number for images of one track, such as the frames of one video; None if there are no tracks.
    - ``blocks``: consecutive images that are read together far faster than one by one, such as those of one compressed
      group; they cover all images in order. None if every order is equally fast.
    - ``left_out``: files that were damaged when the source was opened, and why; some or all of their images are
      missing.
    - ``reading``: how the images are decoded; ``decodes`` is False if the images are not encoded.
    - ``watch``: whether the source has changed since it was opened; None if that cannot be known.
    """

    name: str
    paths: Sequence[str]
    labels: Int64[Tensor, " N"] | None = None
    classes: list[str] | None = None
    tracks: Int64[Tensor, " N"] | None = None
    blocks: Sequence[range] | None = None
    left_out: Mapping[str, str] = MappingProxyType({})
    watch: Watch | None = None
    reading: Reading = USUAL
    decodes: bool = True
    _identity: str | None = None

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    @property
    def channels(self) -> int:
        """C, the channels of every image."""
        return self.reading.channels

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "C H W"], int]:
        """Image i and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be decoded.

        """
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when an image, its label or the order does; it does not depend on where the source lies."""
        digest = hashlib.sha256(self.reading.text.encode())
        for column in (self.labels, self.tracks):
            digest.update(b"-" if column is None else column.numpy().tobytes())
        digest.update("\n".join(self.classes or []).encode(errors="surrogateescape"))
        for part in self.content():
            digest.update(part)
        return digest.hexdigest()

    def identity_once(self) -> str:
        """The identity when this was first called: `identity` reads the state of every file each time."""
        if self._identity is None:
            self._identity = self.identity()
        return self._identity

    def bad_files(self) -> BadFiles:
        """A new list of unreadable files, which begins with those in ``left_out``."""
        bad_files = BadFiles()
        bad_files.leave_out(self.left_out)
        return bad_files

    def content(self) -> Iterable[bytes | memoryview]:
        """Bytes that identify the images themselves, whatever their labels, tracks and classes."""
        raise NotImplementedError


class ImageView(Images):
    """The images ``index`` of another source in that order, or all of them, with that source's attributes.

    All attributes of `Images` are carried over here, and nowhere else; the caller then changes only those that differ.
    ``paths`` are the source's own unless given.
    """

    def __init__(
        self, images: Images, index: Int64[Tensor, " M"] | None = None, *, paths: Sequence[str] | None = None
    ) -> None:
        self.images, self.index = images, index
        self.reading = images.reading
        _carry(images, self, index)
        if index is None:
            self.paths, self.blocks = images.paths if paths is None else paths, images.blocks
            return
        self.paths = take_strings(images.paths, index) if paths is None else paths
        self.blocks = None if images.blocks is None else _blocks_of(images.blocks, index)

    @property
    def channels(self) -> int:
        """C, the channels of the source."""
        return self.images.channels

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "C H W"], int]:
        """Image i of the view and its label (-1 without labels)."""
        image, _ = self.images[i if self.index is None else int(self.index[i])]
        return image, -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """The source's identity, and the indices of the selected images."""
        return [self.images.identity().encode(), b"" if self.index is None else self.index.numpy().tobytes()]


def _carry(images: Images, to: Images, index: Int64[Tensor, " M"] | None = None) -> None:
    """Copy a source's attributes except paths, blocks and reading, for the images ``index`` or for all."""
    to.name, to.classes, to.left_out, to.watch = images.name, images.classes, images.left_out, images.watch
    columns = (images.labels, images.tracks)
    to.labels, to.tracks = (c if c is None or index is None else c[index] for c in columns)


def _blocks_of(blocks: Sequence[range], index: Int64[Tensor, " M"]) -> list[range] | None:
    """The part of each block that ``index`` selects; None if ``index`` goes back and forth between blocks."""
    if (index.diff() < 0).any():
        return None
    ends = torch.searchsorted(index, torch.tensor([block.stop for block in blocks])).tolist()
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False) if first < end]


class InMemoryImages(Images):
    """Images of one size in one uint8 tensor in memory: a batch is one index operation."""

    decodes = False

    def __init__(
        self,
        data: UInt8[Tensor, "N C S S"],
        paths: Sequence[str],
        labels: Int64[Tensor, " N"] | None = None,
        classes: list[str] | None = None,
        name: str = "packed",
    ) -> None:
        if len(data) != len(paths) or (labels is not None and len(labels) != len(data)):
            raise UserError(f"{len(data)} images, {len(paths)} paths: the lengths must agree")
        self.data, self.paths, self.labels, self.classes, self.name = data, paths, labels, classes, name

    @staticmethod
    def of(data: UInt8[Tensor, "N C S S"], images: Images) -> InMemoryImages:
        """Images with the pixels ``data`` and the attributes of ``images``."""
        result = InMemoryImages(data, images.paths, images.labels)
        _carry(images, result)
        return result

    @property
    def channels(self) -> int:
        """C, the channels of the pixels."""
        return int(self.data.shape[1])

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "C S S"], int]:
        """Image i and its label (-1 without labels)."""
        return self.data[i], -1 if self.labels is None else int(self.labels[i])

    def batch(self, index: Int64[Tensor, " B"]) -> UInt8[Tensor, "B C S S"]:
        """The images of ``index``, copied once."""
        return torch.index_select(self.data, 0, index.to(self.data.device))

    def on(self, device: torch.device) -> InMemoryImages:
        """The same images with their pixels on another device, where batches are then indexed.

        Raises:
            SourceError: they are damaged.

        """
        self.check()
        moved = InMemoryImages.of(self.data.to(device), self)
        moved.blocks = self.blocks
        return moved

    def check(self) -> None:
        """Check ``data`` before all of it is read: whether data on a disk is still as it was written.

        Raises:
            SourceError: it is damaged.

        """

    def content(self) -> Iterable[bytes | memoryview]:
        """All pixels."""
        for chunk in self.data.split(4096):
            yield memoryview(chunk.contiguous().numpy()).cast("B")
