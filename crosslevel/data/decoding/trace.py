"""Records which image a process is decoding, so that its parent can read it after the process has died."""

from __future__ import annotations

import mmap

ROW = 4096  # bytes for the name of one image


class Board:
    """A row for each process, in memory that forked processes have in common."""

    def __init__(self, rows: int) -> None:
        self._rows: mmap.mmap | None = mmap.mmap(-1, rows * ROW)

    def row(self, number: int) -> memoryview | None:
        """The slot that process ``number`` writes to."""
        return None if self._rows is None else memoryview(self._rows)[number * ROW : (number + 1) * ROW]

    def read(self, number: int) -> str | None:
        """The path that process ``number`` was decoding; None if there is none or it is not known."""
        row = self.row(number)
        length = 0 if row is None else int.from_bytes(row[:2], "little")
        return None if row is None or not length else bytes(row[2 : 2 + length]).decode("utf-8", "surrogateescape")

    def write(self, number: int, text: str) -> None:
        """Write a text into the row of process ``number``, which its parent can read."""
        if (row := self.row(number)) is not None:
            _put(row, text)

    def clear(self, number: int) -> None:
        """Forget what process ``number`` was decoding."""
        if (row := self.row(number)) is not None:
            row[:2] = bytes(2)

    def __getstate__(self) -> dict[str, object]:
        """Pickle nothing: a process that is not forked does not share the board."""
        return {"_rows": None}


refused: dict[str, str] = {}
"""Images that crashed a process, and how: they are not decoded again. Forked processes begin with their parent's."""

_slot: memoryview | None = None


def enter(board: Board, number: int) -> None:
    """Write to the board from now on, as process ``number``."""
    global _slot  # noqa: PLW0603 - one a process
    board.clear(number)  # a former process of this number may have died while writing
    _slot = board.row(number)


def begin(path: str) -> None:
    """Record the image that is decoded now."""
    if _slot is not None:
        _put(_slot, path)


def _put(row: memoryview, text: str) -> None:
    name = text.encode("utf-8", "surrogateescape")[: ROW - 2]
    row[2 : 2 + len(name)] = name
    row[:2] = len(name).to_bytes(2, "little")


def end() -> None:
    """Record that decoding is done."""
    if _slot is not None:
        _slot[:2] = bytes(2)
