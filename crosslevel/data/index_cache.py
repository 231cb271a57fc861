"""A cache for the index of a source, and compact lists of paths."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.files import write_tensors
from crosslevel.utils.tensors import load_safetensors

Table = dict[str, Tensor]


class Names(Sequence[str]):
    """N strings that are made on demand: a subclass gives their number, and string i."""

    def name(self, i: int) -> str:
        """String i, 0 <= i < N."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(len(self))[index]
        return self.name(numbers) if isinstance(numbers, int) else [self.name(i) for i in numbers]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as lists have none


class Paths(Names):
    """N strings in one tensor of bytes: a million paths take the memory of their letters, without a Python object each.

    ``text`` holds them one after the other in UTF-8 (file names of other encodings keep their bytes), string i at
    ``ends[i - 1]`` to ``ends[i]``.
    """

    def __init__(self, text: UInt8[Tensor, " L"], ends: Int64[Tensor, " N"]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Paths:
        """Store these strings; they are iterated once."""
        text, ends = bytearray(), []
        for string in strings:
            text += string.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(torch.frombuffer(text or bytearray(1), dtype=torch.uint8)[: len(text)], torch.tensor(ends).long())

    def take(self, index: Int64[Tensor, " M"]) -> Paths:
        """The strings of ``index``, in that order."""
        return Paths.of(self[i] for i in index.tolist())

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, i: int) -> str:
        """String i, 0 <= i < N."""
        return self._decoded(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))

    def __iter__(self) -> Iterator[str]:
        first = 0
        for end in self.ends.tolist():
            yield self._decoded(first, end)
            first = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            return torch.equal(self.ends, other.ends) and torch.equal(self.text, other.text)
        return super().__eq__(other)

    __hash__ = None  # as lists have none

    def __repr__(self) -> str:
        return f"Paths({len(self):,} strings, {len(self.text):,} bytes)"

    def _decoded(self, first: int, end: int) -> str:
        data: np.ndarray[tuple[int], np.dtype[np.uint8]] = self.text[first:end].numpy()
        return data.tobytes().decode("utf-8", "surrogateescape")


def cache_folder() -> Path:
    """The folder of cached indexes: ``$CROSSLEVEL_CACHE``, or ``crosslevel`` in ``$XDG_CACHE_HOME`` (~/.cache)."""
    setting = os.environ.get("CROSSLEVEL_CACHE")
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosslevel"


def take_strings(strings: Sequence[str], index: Int64[Tensor, " M"]) -> Sequence[str]:
    """The strings of ``index``, in that order: those of compact lists in a compact list."""
    return strings.take(index) if isinstance(strings, Paths) else [strings[i] for i in index.tolist()]


def remembered(
    kind: str, key: str, state: str, make: Callable[[], Table], holds: Callable[[Table], bool] | None = None
) -> Table:
    """The result of ``make()``, kept in a file of the cache until ``state`` changes.

    The cache only saves time: if its file cannot be read, ``make`` runs again; if it cannot be written, nothing is
    cached.

    Args:
        kind: the kind of cached result, such as ``shard``; a part of the file's name.
        key: identifies the source, such as the absolute path of a file.
        state: changes when the result is no longer valid, such as a file's size and time of change.
        make: computes the result, tensors by name.
        holds: whether a cached result is still valid, if the state alone does not show it.

    """
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    file = cache_folder() / f"{kind}-{digest[:24]}.safetensors"
    name = state.encode(errors="backslashreplace").decode()
    try:
        table, metadata = load_safetensors(file)
        if metadata.get("state") == name and (holds is None or holds(table)):
            return table
    except (OSError, UserError):
        pass  # it is made anew
    table = make()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, table, {"state": name})
        for leftover in file.parent.glob(f"{file.stem}.*.tmp"):  # left by a killed call of a former version
            leftover.unlink()
    return table
