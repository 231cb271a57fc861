"""Messages that C libraries for decoding print on stderr: captured, since printed they would not name the file.

libjpeg and libtiff fill in what is damaged and only print a line about it. While an image is decoded, the C library's
``stderr`` is a stream in memory. Python's own is another one, and is left alone. Where the C library cannot be reached
like this, nothing is captured.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

_NAMES = ("stderr", "__stderrp")  # glibc and musl; macOS
_LONGEST = 200  # characters of a message that are kept


class _Ear:
    """The C library's stderr, and a stream in memory that replaces it."""

    def __init__(self) -> None:
        self.library = library = ctypes.CDLL(None)
        self.stderr = self._locate(library)
        self.saved = self.stderr.value
        self._text, self._size = ctypes.c_char_p(), ctypes.c_size_t()
        library.open_memstream.restype = ctypes.c_void_p
        library.open_memstream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        for function in (library.fflush, library.rewind):
            function.argtypes = [ctypes.c_void_p]
        self._stream = library.open_memstream(ctypes.byref(self._text), ctypes.byref(self._size))
        if not self._stream:
            raise OSError("no stream in memory")

    @staticmethod
    def _locate(library: Any) -> Any:
        for name in _NAMES:
            try:
                return ctypes.c_void_p.in_dll(library, name)
            except ValueError:
                continue
        raise OSError("no stderr in the C library")

    def begin(self) -> None:
        self.stderr.value = self._stream

    def end(self) -> str:
        """Return the captured output."""
        self.stderr.value = self.saved
        self.library.fflush(self._stream)
        size = self._size.value
        if not size:
            return ""
        output = ctypes.string_at(self._text, size).decode("utf-8", "replace")
        self.library.rewind(self._stream)
        return output


class Complaints:
    """The first message of a decoder about one image; empty if there is none."""

    text: str = ""

    def add(self, output: str) -> None:
        """Keep the first line of a message."""
        if not output:
            return
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        if lines and not self.text:
            self.text = lines[0].removeprefix("tempfile.tif: ")[:_LONGEST]


_lock = threading.Lock()
_ear: _Ear | None = None
_deaf = False


class heard:
    """Collect decoders' messages while the block runs; one thread at a time. A generator took 4 us more an image."""

    def __enter__(self) -> Complaints:
        """Begin to listen."""
        self.complaints, self.lock = Complaints(), _lock
        self.lock.acquire()
        try:
            self.ear = _listener()
            if self.ear is not None:
                self.ear.begin()
        except BaseException:
            self.lock.release()
            raise
        return self.complaints

    def __exit__(self, *error: object) -> None:
        """Keep what was said."""
        try:
            if self.ear is not None:
                self.complaints.add(self.ear.end())
        finally:
            self.lock.release()


def reason(error: Exception, messages: str = "") -> str:
    """Why an image cannot be decoded, by the error and what was heard meanwhile."""
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = str(error).strip().split("\n")[0]
    # torchvision's messages begin with a location in its source.
    text = text.rsplit(": ", 1)[-1] if ".cpp" in text else text
    text = f"{text} ({messages})" if messages and messages not in text else text
    if "truncated" in text.lower() or "incomplete" in text.lower():
        return f"truncated: {text}"
    return f"cannot be decoded: {text or type(error).__name__}"


def _listener() -> _Ear | None:
    global _ear, _deaf  # noqa: PLW0603 - one C library a process
    if _ear is None and not _deaf:
        try:
            _ear = _Ear()
        except (OSError, AttributeError, TypeError):
            _deaf = True
    return _ear


def _after_fork() -> None:
    """Another thread of the parent may have been decoding."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _ear is not None:
        _ear.stderr.value = _ear.saved


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
