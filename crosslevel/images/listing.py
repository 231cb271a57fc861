"""Which image files lie in a folder, found once: kept in the user's cache until a folder of the tree changes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.images.indexes import Paths, Table, remembered

EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"))

# File systems write times in steps of up to two seconds: a folder that changed as lately may change again unseen.
SETTLED = 2_000_000_000  # nanoseconds


class SourceError(ValueError):
    """A source that gives no images: what is wrong with it and what to do, in one line."""


class Watch(NamedTuple):
    """Paths below ``root`` and when each changed (``st_mtime_ns``; -1 where there is nothing).

    A folder's time changes when anything in it comes, goes or is renamed: looking at the folders alone tells whether
    a list of files still holds. What it does not tell is that a file was written again under its name: files that are
    watched themselves have ``sizes`` in bytes too (-1 where there is nothing; of a folder, 0).
    """

    root: str
    paths: Paths
    times: Int64[Tensor, " N"]
    sizes: Int64[Tensor, " N"] | None = None

    @classmethod
    def of(cls, root: str, paths: Sequence[str]) -> Watch:
        """These paths as they are now; "" is ``root`` itself."""
        return cls(root, Paths.of(paths), _times(root, paths))

    @classmethod
    def of_files(cls, files: Sequence[str], folder: str | None = None) -> Watch:
        """These files and folders as they are now; with ``folder``, which holds all, also what else comes there."""
        files = [os.path.abspath(file) for file in files]
        root = os.path.commonpath(map(os.path.dirname, files)) if folder is None else os.path.abspath(folder)
        paths = [os.path.relpath(file, root) for file in files]
        if folder is not None:
            paths = ["", *sorted({above for path in paths for above in _folders_above(path)}), *paths]
        return cls(root, Paths.of(paths), _times(root, paths), _sizes(root, paths))

    def holds(self) -> bool:
        """Whether nothing has changed."""
        same = torch.equal(self.times, _times(self.root, self.paths))
        return same and (self.sizes is None or torch.equal(self.sizes, _sizes(self.root, self.paths)))

    def gone(self) -> bool:
        """Whether nothing of it is there any more, as where a disk is not mounted."""
        return bool((_times(self.root, self.paths) < 0).all())


class Listing(NamedTuple):
    """The image files of a folder, relative to it, their labels and classes where it has them, and what to watch."""

    files: Paths
    labels: Int64[Tensor, " N"] | None
    classes: list[str] | None
    watch: Watch


def folder(root: str) -> Listing:
    """Every image under ``root``, sorted by path, "/" between folders.

    Linked folders come after all real ones, and no folder is entered twice: so links cannot make loops, and a link to
    a folder inside the source does not list its images again.

    Raises:
        SourceError: ``root`` cannot be listed.

    """
    place = os.path.abspath(root)
    table = remembered("folder", place, "1", lambda: _listed(root), lambda found: _still(place, found))
    classes = list(_paths(table, "classes")) if "labels" in table else None
    watch = Watch(place, _paths(table, "watched"), table["times"])
    return Listing(_paths(table, "files"), table.get("labels"), classes, watch)


def labels_of(files: Iterable[str]) -> tuple[Int64[Tensor, " N"] | None, list[str] | None]:
    """Labels and classes by the top-level folders; none if there are fewer than two, or a file lies outside."""
    first: dict[str, int] = {}
    tops = (file.split("/", 1)[0] if "/" in file else "" for file in files)
    met = torch.from_numpy(np.fromiter((first.setdefault(top, len(first)) for top in tops), np.int64))
    classes = sorted(first)
    if "" in first or ".." in first or len(classes) < 2:
        return None, None
    label = {top: c for c, top in enumerate(classes)}
    return torch.tensor([label[top] for top in first])[met], classes


def below(paths: Sequence[str]) -> Iterable[str]:
    """The paths relative to the deepest folder that holds them all; unchanged where there is none."""
    folders = {os.path.dirname(os.path.normpath(path)) for path in paths}
    if len({os.path.isabs(folder) for folder in folders}) > 1:
        return (os.path.normpath(path) for path in paths)
    shared = os.path.commonpath(list(folders))
    return (os.path.normpath(path).removeprefix(shared).removeprefix("/") for path in paths)


def _times(root: str, paths: Iterable[str]) -> Int64[Tensor, " N"]:
    return torch.tensor([_time(f"{root}/{path}" if path else root) for path in paths], dtype=torch.int64)


def _sizes(root: str, paths: Iterable[str]) -> Int64[Tensor, " N"]:
    return torch.tensor([_size(f"{root}/{path}" if path else root) for path in paths], dtype=torch.int64)


def _size(path: str) -> int:
    try:
        return 0 if os.path.isdir(path) else os.stat(path).st_size
    except OSError:
        return -1


def _folders_above(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def _time(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def _still(place: str, found: Table) -> bool:
    """Whether what was listed is there unchanged, and had not changed just before it was listed."""
    settled = int(found["times"].max()) + SETTLED < int(found["begun"]) and not found["left_out"]
    return settled and Watch(place, _paths(found, "watched"), found["times"]).holds()


def _listed(root: str) -> Table:
    begun = time.time_ns()
    search = _Search(root)
    files = Paths.of(sorted(search.found))
    labels, classes = labels_of(files)
    table = {
        "begun": torch.tensor(begun),
        "times": torch.tensor(search.times, dtype=torch.int64),
        "left_out": torch.tensor(search.left_out),
        **_columns("files", files),
        **_columns("watched", Paths.of(search.watched)),
    }
    if labels is not None and classes is not None:
        table |= {"labels": labels, **_columns("classes", Paths.of(classes))}
    return table


def _columns(name: str, paths: Paths) -> Table:
    return {f"{name}.text": paths.text, f"{name}.ends": paths.ends}


def _paths(table: Table, name: str) -> Paths:
    return Paths(table[f"{name}.text"], table[f"{name}.ends"])


class _Search:
    """One walk through a tree; no system call for a single file."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.found: list[str] = []
        self.left_out = False
        self.watched: list[str] = []
        self.times: list[int] = []
        self._seen: set[tuple[int, int]] = set()
        self._folders: list[str] = [""]
        self._links: list[str] = []
        while self._folders or self._links:
            self._enter(self._folders.pop() if self._folders else self._links.pop())

    def _enter(self, prefix: str) -> None:
        try:
            status = os.stat(os.path.join(self.root, prefix))
            # The time before the listing: what comes during it makes the folder newer than that.
            self.watched.append(prefix)
            self.times.append(status.st_mtime_ns)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
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
        elif name.rpartition(".")[2].lower() in EXTENSIONS and "." in name:
            # A link that leads nowhere is listed, so that it is named among the bad files.
            if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                self.found.append(prefix + name)
        elif entry.is_symlink():
            if os.path.isdir(entry.path):  # entry.is_dir() raises on a link to itself
                self._links.append(f"{prefix}{name}/")
            else:
                self._watch_link(entry, f"{prefix}{name}/")

    def _watch_link(self, entry: os.DirEntry[str], path: str) -> None:
        """A link to no folder may lead to one later, without any change in this tree."""
        self.watched.append(path)
        self.times.append(_time(f"{entry.path}/"))
