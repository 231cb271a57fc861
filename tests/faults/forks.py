"""A fork of the test's own process, which has all imports ready."""

import ctypes
import os
import sys
import traceback
from multiprocessing import util


def fork():
    """As `os.fork`. What `multiprocessing` shares among processes begins anew in the child.

    Else a child whose parent has ever sent a tensor to a worker lets its own workers ask that parent for theirs.
    """
    pid = os.fork()
    if pid == 0:
        util._run_after_forkers()
    return pid


def started(folder, call):
    """`call` in a fork in a session of its own, whose number it returns; what it says is in the folder."""
    child = fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
            call()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return child


def ended(folder, call):
    """`call` in a fork: its exit status, and what it said on stderr."""
    return waited_for(folder, started(folder, call))


def waited_for(folder, child):
    """The exit status of what was `started`, and what it said on stderr."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, (folder / "err").read_text()


def mounted(place, size):
    """Only for this process, a small file system in memory at ``place``.

    Raises:
        OSError: the machine does not allow it.

    """
    library, own, private = ctypes.CDLL(None, use_errno=True), 0x20000, 0x4000 | 0x40000
    _done(library.unshare(own))
    _done(library.mount(b"none", b"/", None, private, None))
    _done(library.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))


def frozen(place):
    """What is mounted there can be read only from here on."""
    _done(ctypes.CDLL(None, use_errno=True).mount(b"none", os.fsencode(place), None, 0x20 | 0x1, None))


def _done(failed):
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def can_mount(folder):
    """Whether a process may mount here."""
    return sys.platform == "linux" and ended(folder, lambda: mounted(folder, "64k"))[0] == 0
