"""A fork of the test's own process, which has all imports ready."""

import ctypes
import gc
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing import util


def fork():
    """As `os.fork`. What `multiprocessing` shares among processes begins anew in the child.

    Else a child whose parent has ever sent a tensor to a worker lets its own workers ask that parent for theirs.
    The parent's garbage is left alone: an object of another test whose end goes wrong in the child prints a traceback
    at any time, and parses for it: in Python 3.11.7 that breaks an `ast.parse` that it interrupts ("AST constructor
    recursion depth mismatch").
    """
    pid = os.fork()
    if pid == 0:
        gc.freeze()
        util._run_after_forkers()
    return pid


def begun(call, files):
    """`call` in a fork in a session of its own, whose number it returns; what it says is added to the two files."""
    child = fork()
    if child == 0:

        def alone():
            os.setsid()
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # ignored under nohup, or behind a shell's &
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            for stream, file in zip((1, 2), files, strict=True):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
            call()

        end_with(alone)
    return child


def end_with(call, crashed=99):
    """In a fork: do `call`, and end as a program does, with ``crashed`` as the status after a traceback."""
    code = crashed
    try:
        call()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)


def started(folder, call):
    """`begun`, with new files ``out`` and ``err`` in the folder."""
    files = [folder / "out", folder / "err"]
    for file in files:
        file.unlink(missing_ok=True)
    return begun(call, files)


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
