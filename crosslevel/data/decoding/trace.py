"""Which image a process is decoding, where its parent can read it after the process has died."""

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
        """Leave a text in the row of process ``number``, where its parent can read it."""
        if (row := self.row(number)) is not None:
            _put(row, text)

    def clear(self, number: int) -> None:
        """Forget what process ``number`` was decoding."""
        if (row := self.row(number)) is not None:
            row[:2] = bytes(2)

    def __getstate__(self) -> dict[str, object]:
        """A process that is not forked has no part in it."""
        return {"_rows": None}


refused: dict[str, str] = {}
"""Images that crashed a process, and how: they are not decoded again. Forked processes begin with their parent's."""

_slot: memoryview | None = None


def enter(board: Board, number: int) -> None:
    """Write to the board from now on, as process ``number``."""
    global _slot  # noqa: PLW0603 - one a process
    board.clear(number)  # one that was here before may have ended in the middle
    _slot = board.row(number)


def begin(path: str) -> None:
    """Say what is decoded now."""
    if _slot is not None:
        _put(_slot, path)


def _put(row: memoryview, text: str) -> None:
    name = text.encode("utf-8", "surrogateescape")[: ROW - 2]
    row[2 : 2 + len(name)] = name
    row[:2] = len(name).to_bytes(2, "little")


def end() -> None:
    """Say that it is done."""
    if _slot is not None:
        _slot[:2] = bytes(2)
