"""The list of a folder's image files: made once, and cached until a folder of the tree changes."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT, read_image
from crosslevel.data.decoding.formats import EXTENSIONS, can_be_image, ending_of, is_image_file, left_alone
from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths, Table, remembered
from crosslevel.data.sources.labels import below, labels_of
from crosslevel.data.watch import Watch, _time
from crosslevel.utils.errors import SourceError, UserError


def files_of(images: Images) -> list[tuple[str, str | None]]:
    """Each image's name and file; None if the image lies inside another file, or cannot be found."""
    root = images.name.partition("@")[0]
    files = [os.path.join(root, path) for path in images.paths]
    return [(path, file if os.path.isfile(file) else None) for path, file in zip(images.paths, files, strict=True)]


class Files(Images):
    """Image files, decoded on demand.

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
            raise UserError(f"{len(files)} files, {len(labels)} labels: the lengths must agree")
        self.root, self.paths, self.labels, self.classes = root, files, labels, classes
        self.name, self.max_pixels = root if name is None else name, max_pixels

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the file cannot be opened or decoded.

        """
        image = read_image(os.path.join(self.root, self.paths[i]), self.paths[i], self.max_pixels, self.reading)
        return image, -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """Names, sizes and times of change: reading every file would take as long as decoding it."""
        for path in self.paths:
            try:
                status = os.stat(os.path.join(self.root, path))
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            yield f"{path}\0{state}\0".encode(errors="surrogateescape")

    @classmethod
    def from_folder(cls, root: str, arrays: bool = False) -> Files:
        """Every image under ``root``, sorted by path; its classes where the layout has them.

        Known extensions are trusted until an image is decoded; files with other extensions, or none, are recognized by
        their first bytes. One warning counts the files that are no images, by extension.

        If every image lies in a sub-folder, and at least two top-level sub-folders hold images, the
        top-level sub-folder is the class. The list is cached until a folder in the tree changes; while it is valid, no
        file is opened. Arrays (.npy) are images only with ``arrays``.

        Raises:
            SourceError: ``root`` cannot be listed, or holds fewer than 2 images.

        """
        listing = folder(root, arrays)
        if listing.left_alone:
            warnings.warn(f"{root}: {left_alone(listing.left_alone)}", stacklevel=2)
        if not listing.files:
            extensions = ", ".join(sorted(EXTENSIONS))
            raise SourceError(f"{root}: no image found in this folder or below it (looked for {extensions})")
        if len(listing.files) < 2:
            raise SourceError(f"{root}: needs at least 2 images, found only {listing.files[0]}")
        images = cls(root, listing.files, listing.labels, listing.classes)
        images.watch = listing.watch
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
        images = cls(os.path.dirname(file), Paths.of(lines), *labels_of(below(lines)), name=file)
        images.watch = Watch.of(os.path.abspath(file), [""])
        return images


# File systems store times in steps of up to two seconds, so that a second change soon after the first may go unnoticed.
SETTLED = 2_000_000_000  # nanoseconds


class Listing(NamedTuple):
    """The image files of a folder, relative to it, their labels and classes where it has them, and what to watch.

    ``left_alone`` counts the files that are no images, by extension.
    """

    files: Paths
    labels: Int64[Tensor, " N"] | None
    classes: list[str] | None
    watch: Watch
    left_alone: dict[str, int]


def folder(root: str, arrays: bool = False) -> Listing:
    """Every image under ``root``, sorted by path, "/" between folders; arrays (.npy) only with ``arrays``.

    Linked folders come after all real ones, and no folder is entered twice: so links cannot make loops, and a link to
    a folder inside the source does not list its images again.

    Raises:
        SourceError: ``root`` cannot be listed.

    """
    path = os.path.abspath(root)
    kind = "arrays" if arrays else "folder"
    table = remembered(kind, path, "2", lambda: _listed(root, arrays), lambda table: _still(path, table))
    classes = list(_paths(table, "classes")) if "labels" in table else None
    watch = Watch(path, _paths(table, "watched"), table["times"])
    other_counts = dict(zip(_paths(table, "others"), table["counts"].tolist(), strict=True))
    return Listing(_paths(table, "files"), table.get("labels"), classes, watch, other_counts)


def _still(path: str, table: Table) -> bool:
    """Whether the listed folders are unchanged, and had not changed just before they were listed."""
    settled = int(table["times"].max()) + SETTLED < int(table["begun"]) and not table["left_out"]
    return settled and Watch(path, _paths(table, "watched"), table["times"]).holds()


def _listed(root: str, arrays: bool) -> Table:
    started = time.time_ns()
    search = _Search(root, arrays)
    files = Paths.of(sorted(search.files))
    labels, classes = labels_of(files)
    table = {
        "begun": torch.tensor(started),
        "times": torch.tensor(search.times, dtype=torch.int64),
        "left_out": torch.tensor(search.left_out),
        **_columns("files", files),
        **_columns("watched", Paths.of(search.watched)),
        **_columns("others", Paths.of(search.other_counts)),
        "counts": torch.tensor(list(search.other_counts.values()), dtype=torch.int64),
    }
    if labels is not None and classes is not None:
        table |= {"labels": labels, **_columns("classes", Paths.of(classes))}
    return table


def _columns(name: str, paths: Paths) -> Table:
    return {f"{name}.text": paths.text, f"{name}.ends": paths.ends}


def _paths(table: Table, name: str) -> Paths:
    return Paths(table[f"{name}.text"], table[f"{name}.ends"])


class _Search:
    """One walk through a tree, without a system call for any file with a known extension."""

    def __init__(self, root: str, arrays: bool) -> None:
        self.root, self.arrays = root, arrays
        self.files: list[str] = []
        self.other_counts: Counter[str] = Counter()
        self.left_out = False
        self.watched: list[str] = []
        self.times: list[int] = []
        self._visited: set[tuple[int, int]] = set()
        self._folders: list[str] = [""]
        self._links: list[str] = []
        while self._folders or self._links:
            self._enter(self._folders.pop() if self._folders else self._links.pop())

    def _enter(self, prefix: str) -> None:
        try:
            status = os.stat(os.path.join(self.root, prefix))
            # The time is read before the listing: a file added meanwhile makes the folder newer.
            self.watched.append(prefix)
            self.times.append(status.st_mtime_ns)
            if (status.st_dev, status.st_ino) in self._visited:
                return
            self._visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(self.root, prefix)) as entries:
                for entry in entries:
                    self._sort_in(entry, prefix)
        except OSError as error:
            if not prefix:
                raise SourceError(f"{self.root}: {error.strerror or error}") from error
            self.left_out = True
            warnings.warn(f"{self.root}/{prefix} is left out: {error.strerror or error}", stacklevel=8)

    def _sort_in(self, entry: os.DirEntry[str], prefix: str) -> None:
        name = entry.name
        if name.startswith("."):
            return
        if entry.is_dir(follow_symlinks=False):
            self._folders.append(f"{prefix}{name}/")
        elif (by_name := can_be_image(name, self.arrays)) is True:
            # A broken link is listed, so that it is reported among the bad files.
            if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                self.files.append(prefix + name)
        elif entry.is_symlink():
            if os.path.isdir(entry.path):  # entry.is_dir() raises on a link to itself
                self._links.append(f"{prefix}{name}/")
            elif os.path.isfile(entry.path):
                self._look(entry, prefix, by_name)
            else:
                self._watch_link(entry, f"{prefix}{name}/")
        elif entry.is_file(follow_symlinks=False):
            self._look(entry, prefix, by_name)

    def _look(self, entry: os.DirEntry[str], prefix: str, by_name: bool | None) -> None:
        """Check the first bytes of a file with an unknown extension."""
        if by_name is None and is_image_file(entry.path):
            self.files.append(prefix + entry.name)
        else:
            self.other_counts[ending_of(entry.name)] += 1

    def _watch_link(self, entry: os.DirEntry[str], path: str) -> None:
        """Watch a broken link: its target may appear later, without any change in this tree."""
        self.watched.append(path)
        self.times.append(_time(f"{entry.path}/"))
