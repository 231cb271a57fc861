"""A lock on a folder for one writer: it names its holder, and is free as soon as that process ends.

The lock is filelock's. We add the holder's name, and continue with a warning where locks are missing: filelock's own
fallback, a file whose presence is the lock, would remain after its process is killed.
"""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from crosslevel.utils.errors import FolderInUse, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
"""Whether an open file can be locked for as long as its process lives."""

LOCK = ".crosslevel.lock"
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
_UNKNOWN = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(path: str | os.PathLike[str], task: str, keep: bool = True, patient: bool = False) -> Iterator[None]:
    """Hold a folder while the block runs, so that no other process writes there.

    The lock is the operating system's (`flock`) on a file in the folder, so that a killed process does not keep it. If
    the file system has no locks, or an existing folder cannot be written, a warning says so and the block runs without
    a lock.

    Args:
        path: the folder; it is created if missing.
        task: the holder's task, such as ``train``; other processes' errors have this name and the process's number.
        keep: whether the lock's file stays; otherwise it is removed, and so is an empty folder.
        patient: wait until the lock is free.

    Raises:
        FolderInUse: another process holds it.
        OSError: the folder does not exist, and cannot be created.

    """
    folder = Path(path)
    lock = FileLock(folder / LOCK, timeout=-1 if patient else 0, fallback_to_soft=False)
    try:
        _acquire(lock, folder)
    except Timeout:
        who = _written(folder) or "another process"
        raise FolderInUse(f"{folder} is in use by {who}: wait until it has ended, or take another folder") from None
    except OSError as error:
        if error.errno not in (*_DENIED, *_UNKNOWN) or not folder.is_dir():
            raise
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): make sure that no other process writes there", stacklevel=3
        )
        yield
        return
    try:
        (folder / LOCK).write_text(f"{task} (process {os.getpid()} on {socket.gethostname()})\n", encoding="utf-8")
        yield
    finally:
        if not keep:
            # A process that opened the file just before notices that it was removed, and opens a new one.
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            return
        except FileNotFoundError:
            continue  # the former holder has just removed the folder


def hold(number: int) -> None:
    """Lock an open file, by its descriptor, while this process lives, without waiting.

    filelock opens the file itself; here the file is one that is being written.

    On Windows this does nothing: there, another process cannot remove or replace an open file.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no locks.

    """
    if HAS_LOCKS:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holder(path: str | os.PathLike[str]) -> str | None:
    """The current holder of a folder's lock, from the lock's file; None if it is free."""
    folder = Path(path)
    if not (folder / LOCK).exists():
        return None
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return _written(folder) or "another process"
    except OSError:
        return None  # without locks, nobody holds one
    lock.release()
    return None


def _written(folder: Path) -> str:
    return printable((folder / LOCK).read_text(encoding="utf-8", errors="replace").strip())
