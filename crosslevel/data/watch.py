"""Recorded states of files and folders, which later show whether these have changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.data.index_cache import Paths


class Watch(NamedTuple):
    """Paths below ``root``, and the time of change of each (``st_mtime_ns``; -1 if it does not exist).

    A folder's time changes when something in it is added, removed or renamed, so the folders alone show whether a list
    of files is still valid. They do not show that a file has new content under its old name: files that are watched
    themselves have ``sizes`` in bytes too (-1 if there is no such file, 0 for a folder).
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
        """These files and folders as they are now; with ``folder``, which holds them all, also new entries there."""
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

    def is_missing(self) -> bool:
        """Whether nothing of it exists any more, as when a disk is not mounted."""
        return bool((_times(self.root, self.paths) < 0).all())


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
