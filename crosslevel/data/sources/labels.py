"""Names and labels of images inside containers."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.data.index_cache import Names


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
    """The paths relative to the deepest common folder; unchanged if there is none."""
    folders = {os.path.dirname(os.path.normpath(path)) for path in paths}
    if len({os.path.isabs(folder) for folder in folders}) > 1:
        return (os.path.normpath(path) for path in paths)
    shared = os.path.commonpath(list(folders))
    return (os.path.normpath(path).removeprefix(shared).removeprefix("/") for path in paths)


_DENSE = 100_000  # labels below this number keep their numbers


class RowNames(Names):
    """``file/row`` for the rows of several files one after the other: a million names take no memory."""

    def __init__(self, files: Sequence[str], rows: Sequence[int]) -> None:
        self.files, self.ends = list(files), list(accumulate(rows))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def name(self, i: int) -> str:
        """The name of row i."""
        k = bisect_right(self.ends, i)
        return f"{self.files[k]}/{i - (self.ends[k - 1] if k else 0)}"


def known_labels(
    labels: Int64[Tensor, " N"], names: list[str] | None, source: str
) -> tuple[Int64[Tensor, " N"] | None, list[str] | None]:
    """Labels and the names of their classes; both None unless every image has a label.

    Negative labels are missing ones. Without ``names`` a class is named by its number; numbers too large for classes
    are renumbered in ascending order.
    """
    missing = int((labels < 0).sum())
    if missing == len(labels):
        return None, None
    if missing or (names is not None and int(labels.max()) >= len(names)):
        reason = (
            f"{missing:,} of {len(labels):,} images have none" if missing else f"one is beyond its {len(names or [])}"
        )
        warnings.warn(f"{one_line(source)}: the labels are left out: {reason}", stacklevel=4)
        return None, None
    if names is not None:
        return labels, names
    if int(labels.max()) < _DENSE:
        return labels, [str(c) for c in range(int(labels.max()) + 1)]
    values, labels = labels.unique(return_inverse=True)
    return labels, [str(value) for value in values.tolist()]


def below_shared_folder(files: Sequence[str]) -> list[str]:
    """Absolute paths relative to their deepest common folder, so that moving that folder does not change them."""
    shared = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, shared) for file in files]


def state_of(file: str | int) -> str:
    """A file's size and time of change.

    Raises:
        OSError: there is no such file.

    """
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns}"


def one_line(text: str) -> str:
    """A name with its line breaks escaped, for messages."""
    return text.replace("\n", "\\n").replace("\r", "\\r")
