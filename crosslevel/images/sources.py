"""Where images come from: folders and lists of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.images import listing
from crosslevel.images.health import PIXEL_LIMIT, BadFiles, BadImage, read_image
from crosslevel.images.indexes import Paths
from crosslevel.images.listing import EXTENSIONS, SourceError, Watch

__all__ = ["EXTENSIONS", "BadImage", "Files", "Images", "Packed", "SourceError"]


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

    def _content(self) -> Iterable[bytes | memoryview]:
        for chunk in self.data.split(4096):
            yield memoryview(chunk.contiguous().numpy()).cast("B")


class Files(Images):
    """Image files, decoded when they are asked for.

    ``files`` are relative to ``root`` (absolute ones stand for themselves); a file with more than
    ``max_pixels`` pixels is bad.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: Int64[Tensor, " N"] | None = None,
        classes: list[str] | None = None,
        *,
        name: str | None = None,
        max_pixels: int = PIXEL_LIMIT,
    ) -> None:
        if labels is not None and len(labels) != len(files):
            raise ValueError(f"{len(files)} files, {len(labels)} labels: the lengths must agree")
        self.root, self.paths, self.labels, self.classes = root, files, labels, classes
        self.name, self.max_pixels = root if name is None else name, max_pixels

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the file cannot be opened or decoded.

        """
        image = read_image(os.path.join(self.root, self.paths[i]), self.paths[i], self.max_pixels)
        return image, -1 if self.labels is None else int(self.labels[i])

    def _content(self) -> Iterable[bytes | memoryview]:
        """Names, sizes and times of change: reading every file would take as long as decoding it."""
        for path in self.paths:
            try:
                found = os.stat(os.path.join(self.root, path))
                state = f"{found.st_size} {found.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            yield f"{path}\0{state}\0".encode(errors="surrogateescape")

    @classmethod
    def from_folder(cls, root: str) -> Files:
        """Every image under ``root``, sorted by path; its classes where the layout has them.

        If every image lies in a sub-folder, and at least two top-level sub-folders hold images, the
        top-level sub-folder is the class. The list is kept in the user's cache until a folder in the tree changes: then
        no file is looked at.

        Raises:
            SourceError: ``root`` cannot be listed, or holds fewer than 2 images.

        """
        found = listing.folder(root)
        if not found.files:
            known = ", ".join(sorted(EXTENSIONS))
            raise SourceError(f"{root}: no image found in this folder or below it (looked for {known})")
        if len(found.files) < 2:
            raise SourceError(f"{root}: needs at least 2 images, found only {found.files[0]}")
        images = cls(root, found.files, found.labels, found.classes)
        images.watch = found.watch
        return images

    @classmethod
    def from_list(cls, files: Sequence[str | os.PathLike[str]]) -> Files:
        """The listed files, in the order given, relative to the working directory.

        Raises:
            SourceError: fewer than 2 files.

        """
        if len(files) < 2:
            raise SourceError(f"a list of {len(files)} files: needs at least 2 images")
        return cls("", [os.fspath(file) for file in files], name=f"a list of {len(files):,} files")

    @classmethod
    def from_text(cls, file: str) -> Files:
        """The files that a text file names, one a line, relative to its own folder.

        Classes come from the folders below the one that all files share, as in `from_folder`.

        Raises:
            SourceError: the text file cannot be read, or names fewer than 2 files.

        """
        try:
            text = Path(file).read_text("utf-8-sig", "surrogateescape")
        except OSError as error:
            raise SourceError(f"{file}: {error.strerror or error}") from error
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise SourceError(f"{file}: needs at least 2 images, one path a line; it names {len(lines)}")
        images = cls(os.path.dirname(file), Paths.of(lines), *_labels(_below_shared_folder(lines)), name=file)
        images.watch = Watch.of(os.path.abspath(file), [""])
        return images


# Files of other kinds get their labels by the same rule.
_labels, _below_shared_folder = listing.labels_of, listing.below
