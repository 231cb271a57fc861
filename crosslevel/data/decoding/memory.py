"""How much memory decoding may take: for one image, and for all processes of a command together."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from crosslevel.data.bad_files import _Defect

try:
    import fcntl
    import resource
except ImportError:  # Windows: each process has the limit for itself, and may take what the machine has
    fcntl = resource = None  # type: ignore[assignment]

LARGEST = 50_000_000
"""The most pixels of a decoded image; a larger one is read at a half, a quarter or an eighth of its size."""

_USUAL = 768  # MiB
SLOT = 64 * 2**20  # bytes; the common budget of all processes is divided into slots of this size
_SMALL = 32 * 2**20  # bytes; smaller images never wait
_PATIENCE = 60.0  # seconds to wait for memory, so that a stopped process cannot block the others
_TURNSTILE = 0
_RUNAWAY = 4 * 2**30  # bytes that a decoding process may allocate beyond what it has at its start
_RESERVE = 64 * 2**20  # bytes that a decoder may take beyond the estimate
_STACKS = 16 * 2**20  # and for the threads that it may start on each core

# Bytes for each pixel at the peak: the decoder's own buffers, Pillow's image and its copies. Measured, and rounded up.
PER_PIXEL = {"GIF": 12, "WEBP": 22, "HEIF": 16, "AVIF": 20, "JPEG2000": 32, "JXL": 40}
_PLAIN = 4  # all other formats, beside the result
_RGB = 3
_TURNED = 4
_FIXED = 8 * 2**20  # of any image
_PARTS = 2  # a TIFF: its largest strip or tile, and its codec's copy of it


def budget() -> int:
    """Bytes that decoding may take, all processes of a command together: 768 MiB, or $CROSSLEVEL_DECODE_MB."""
    setting = os.environ.get("CROSSLEVEL_DECODE_MB", "")
    return (int(setting) if setting.isdecimal() and int(setting) else _USUAL) * 2**20


def exceeds_budget(need: int) -> bool:
    """Whether ``need`` bytes are more than `budget`, which is at least a MiB."""
    return need > 2**20 and need > budget()


def too_many_bytes(size: int, max_pixels: int, subject: str) -> str:
    """The reason why an encoded image of ``size`` bytes is not read; empty if it is read."""
    if size > 8 * max_pixels:
        return f"{subject} has {size:,} bytes, more than {max_pixels:,} pixels can need"
    if size > budget() // 2:
        megabytes = -(-size // 2**19)
        return f"{subject} has {size:,} bytes, more than decoding has memory for: set CROSSLEVEL_DECODE_MB={megabytes}"
    return ""


def halvings(pixels: int) -> int:
    """The divisor of width and height that leaves at most `LARGEST` pixels: 1, 2, 4 or 8."""
    return 1 if pixels <= LARGEST else next((scale for scale in (2, 4) if pixels <= LARGEST * scale**2), 8)


def needed(format: str, size: tuple[int, int], encoded: int, turned: bool, part: int = 0) -> int:
    """Bytes that Pillow takes at most to decode an image of a format, and to bring it to RGB.

    ``part``: bytes of its largest strip or tile, if it is decoded in strips or tiles.
    """
    pixels = size[0] * size[1]
    result = _RGB * pixels // halvings(pixels) ** 2
    each = PER_PIXEL.get(format, _PLAIN) + (_TURNED if turned else 0)
    return each * pixels + result + _PARTS * part + 2 * encoded + (_FIXED if pixels > 2**20 else 0)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse pictures without pixels, and those of more than ``max_pixels``.

    Raises:
        _Defect: the picture is such a one.

    """
    if width < 1 or height < 1:
        raise _Defect(f"broken: a picture of {width} x {height} pixels")
    if width * height > max_pixels:
        raise _Defect(f"{width} x {height} are more than {max_pixels:,} pixels")


def check(need: int, size: tuple[int, int], format: str) -> None:
    """Refuse an image that needs more memory than `budget`.

    Raises:
        _Defect: it needs more.

    """
    if need > budget():
        raise _Defect(
            f"{size[0]:,} x {size[1]:,} pixels of {format} take about {need / 1e9:.1f} GB to decode, more than "
            f"{budget() / 1e9:.1f} GB: make it smaller, or set CROSSLEVEL_DECODE_MB={-(-need // 2**20)}"
        )


def _in_common() -> int:
    if fcntl is None:
        return -1
    if hasattr(os, "memfd_create"):
        return os.memfd_create("crosslevel-decoding")
    number, name = tempfile.mkstemp()
    os.unlink(name)
    return number


# A file in memory that forked processes have in common; not by filelock, which locks whole files. Locks on its bytes
# belong to a process and end with it, however it ends. The first byte is the turnstile; each of the others is a slot.
_file = _in_common()
_thread = threading.Lock()


def room(need: int) -> AbstractContextManager[None]:
    """Waits until there is memory for ``need`` bytes more, over all processes; small images never wait."""
    return nullcontext() if need <= _SMALL else _room(need)


@contextmanager
def _room(need: int) -> Iterator[None]:
    with _thread:
        if fcntl is None:
            yield
            return
        slots = acquire_slots(-(-min(need, budget()) // SLOT))
        try:
            yield
        finally:
            _give_back()
            for slot in slots:
                fcntl.lockf(_file, fcntl.LOCK_UN, 1, slot)


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps the blocks of one image for the next one of this process."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """The C library's `malloc_trim`; None where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None


def acquire_slots(count: int, patience: float = _PATIENCE) -> list[int]:
    """Acquire ``count`` free slots; only one process at a time waits for slots, so that none wait for each other.

    A stopped process may hold the slots. After ``patience`` seconds a warning says so, and only the free slots are
    taken.
    """
    slots: list[int] = []
    until = time.monotonic() + patience
    while not (first := _is_free(_TURNSTILE)) and time.monotonic() < until:
        time.sleep(0.005)
    try:
        while True:
            for slot in range(1, 1 + -(-budget() // SLOT)):
                if len(slots) < count and slot not in slots and _is_free(slot):
                    slots.append(slot)
            if len(slots) >= count:
                return slots
            if time.monotonic() >= until:
                warnings.warn(
                    f"waited {patience:.0f} s for memory to decode an image: another process of this command has it, "
                    "perhaps one that was stopped; it is decoded beside it, and both may take more than they should",
                    stacklevel=3,
                )
                return slots
            time.sleep(0.005)
    finally:
        if first:
            fcntl.lockf(_file, fcntl.LOCK_UN, 1, _TURNSTILE)


def _is_free(slot: int) -> bool:
    """Try to lock a slot, or the turnstile; whether this process has it now."""
    try:
        fcntl.lockf(_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
    except OSError:
        return False
    return True


def _after_fork() -> None:
    global _thread  # noqa: PLW0603 - another thread of the parent may hold it
    _thread = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def limit_to(need: int, format: str) -> Iterator[None]:
    """Limit the memory of a process that only decodes (`limit_process`) to little more than ``need`` bytes.

    ``need`` is computed from the pixels, but JPEG 2000's blocks and WebP's codes take memory too: an image of one
    megapixel could take half a gigabyte. Formats that are decoded row by row cannot do so, and have no limit.
    """
    current = _data_now() if _limited and format in PER_PIXEL else None
    if current is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    _lower(resource.RLIMIT_DATA, current + need + _RESERVE + _STACKS * (os.cpu_count() or 1))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


_limited = False


def limit_process() -> None:
    """Limit a decoding process to `_RUNAWAY` bytes more memory than it has, and turn off its core dumps.

    A decoder misled by a damaged file then fails, and not the machine. Memory that processes share, such as finished
    batches, and mapped files do not count.
    """
    global _limited  # noqa: PLW0603 - one a process
    if resource is None:
        return
    _lower(resource.RLIMIT_CORE, 0)
    current = _data_now()
    if current is not None:
        _limited = True
        _lower(resource.RLIMIT_DATA, current + _RUNAWAY + budget())


def _data_now() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)


def _lower(kind: int, value: int) -> None:
    soft, hard = resource.getrlimit(kind)
    allowed = [value, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(kind, (min(allowed), hard))
