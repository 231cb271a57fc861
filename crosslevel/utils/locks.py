"""One writer a folder: a lock that its process holds, told by name, and free as soon as that process is gone.

The lock is filelock's. Ours is who holds it, in words, and going on with a warning where a file system has no locks:
filelock's own way out there, a file whose presence is the lock, can be left behind by a process that is killed.
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

    The lock is the operating system's (`flock`) on a file in the folder: who is killed holds it no longer.
    Where a file system has no locks, or a folder that is there cannot be written, a warning says so and the block runs
    without.

    Args:
        path: the folder; it is made where it is missing.
        task: who holds it, such as ``train``: others are told this name and the process's number.
        keep: whether the lock's file stays; else it goes, and so does the folder where nothing else is left in it.
        patient: wait for who holds it.

    Raises:
        FolderInUse: another process holds it.
        OSError: it is not there, and cannot be made.

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
            # Whoever opened it just before finds that it is no file's name any more, and takes a new one.
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
            continue  # who held it until now has just removed the folder


def hold(number: int) -> None:
    """Lock an open file, by its number, while this process lives: at once, or not at all.

    On Windows nothing happens: there a file that is open cannot be removed or replaced by another process.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no locks.

    """
    if HAS_LOCKS:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holder(path: str | os.PathLike[str]) -> str | None:
    """The current holder of a folder's lock, as written in it; None if it is free."""
    folder = Path(path)
    if not (folder / LOCK).exists():
        return None
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return _written(folder) or "another process"
    except OSError:
        return None  # where there are no locks, nobody holds one
    lock.release()
    return None


def _written(folder: Path) -> str:
    return printable((folder / LOCK).read_text(encoding="utf-8", errors="replace").strip())
