"""A file that is read at any offset, by several threads at once, on every platform."""

from __future__ import annotations

import os
import threading


class RandomFile:
    """An open file, which is closed when nothing refers to it any more.

    If the system can read at an offset in one call (``preadv``), neither threads nor forked processes wait for each
    other. Elsewhere, as on Windows (where no process is forked), a lock keeps seek and read together.
    """

    def __init__(self, file: str) -> None:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self.number, self._lock = os.open(file, flags), threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read_into(self, buffer: bytearray, offset: int) -> int:
        """Read from ``offset`` into ``buffer``; return the number of bytes, fewer only at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self.number, [buffer], offset)
        data = self.read(len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def read(self, count: int, offset: int) -> bytes:
        """At most ``count`` bytes at ``offset``."""
        if hasattr(os, "pread"):
            return os.pread(self.number, count, offset)
        with self._lock:
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, count)
