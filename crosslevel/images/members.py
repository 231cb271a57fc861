"""What images inside containers have in common: their names, and labels that stand beside them."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from jaxtyping import Int64
from torch import Tensor

from crosslevel.images.indexes import Names

__all__ = ["RowNames", "below_shared_folder", "known_labels", "one_line", "state_of"]

_DENSE = 100_000  # label numbers below are kept as they are


class RowNames(Names):
    """``place/row`` for the rows of several places one after the other: a million names take no memory."""

    def __init__(self, places: Sequence[str], rows: Sequence[int]) -> None:
        self.places, self.ends = list(places), list(accumulate(rows))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def name(self, i: int) -> str:
        """Of row i of all."""
        k = bisect_right(self.ends, i)
        return f"{self.places[k]}/{i - (self.ends[k - 1] if k else 0)}"


def known_labels(
    labels: Int64[Tensor, " N"], names: list[str] | None, source: str
) -> tuple[Int64[Tensor, " N"] | None, list[str] | None]:
    """Labels and the names of their classes; none of both unless every image has one.

    Negative labels are missing ones. Without ``names`` a class is named by its number; numbers too large to be
    those of classes are renumbered in ascending order.
    """
    missing = int((labels < 0).sum())
    if missing == len(labels):
        return None, None
    if missing or (names is not None and int(labels.max()) >= len(names)):
        why = f"{missing:,} of {len(labels):,} images have none" if missing else f"one is beyond its {len(names or [])}"
        warnings.warn(f"{one_line(source)}: the labels are left out: {why}", stacklevel=4)
        return None, None
    if names is not None:
        return labels, names
    if int(labels.max()) < _DENSE:
        return labels, [str(c) for c in range(int(labels.max()) + 1)]
    values, labels = labels.unique(return_inverse=True)
    return labels, [str(value) for value in values.tolist()]


def below_shared_folder(files: Sequence[str]) -> list[str]:
    """Absolute paths relative to the deepest folder that holds them all: the same wherever that folder lies."""
    shared = os.path.commonpath([os.path.dirname(file) for file in files])
    return [os.path.relpath(file, shared) for file in files]


def state_of(file: str | int) -> str:
    """Changes when a file does, as far as its size and time of change tell.

    Raises:
        OSError: there is no such file.

    """
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns}"


def one_line(text: str) -> str:
    """A name with its line breaks escaped, for messages."""
    return text.replace("\n", "\\n").replace("\r", "\\r")
