"""Python programs in forks that have all imports ready, which take seconds: for what starts processes itself, as Ray.

Run as a script, this file stands in for Python: a server, which is a fork of the test's process, runs the script's line
in a fork of its own. The two end together, with the same status.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import contextmanager, suppress


@contextmanager
def stand_in(folder):
    """While the block runs, a program in ``folder`` that stands in for Python; what is imported by now, forks have."""
    from forks import end_with, fork

    if sys.platform != "linux":
        yield sys.executable
        return
    name = f"crosslevel-forks-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen(64)
        server = fork()
        if server == 0:
            end_with(lambda: _serve(listening))
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{__file__}' {name} \"$@\"\n")
    program.chmod(0o755)
    try:
        yield str(program)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(listening):
    """Start what is asked for, tell how it ended, and end what nobody waits for any more."""
    waiting, running = selectors.DefaultSelector(), set()
    waiting.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.data is None:
                asked = listening.accept()[0]
                child = _started(asked)
                files = asked, os.pidfd_open(child)
                running.add(child)
                for file in files:
                    waiting.register(file, selectors.EVENT_READ, (child, *files))
            elif key.data[0] in running:
                child, asked, ending = key.data
                running.remove(child)
                if key.fileobj is asked:
                    os.kill(child, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                for file in (asked, ending):
                    waiting.unregister(file)
                with suppress(OSError):
                    asked.sendall(b"%d" % status)
                asked.close()
                os.close(ending)


def _started(asked):
    """The number of a fork that runs the line."""
    from forked import become
    from forks import fork

    size, streams, _, _ = socket.recv_fds(asked, 16, 3)
    told = b""
    while len(told) < int(size):
        told += asked.recv(1 << 16)
    child = fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the server
        line, variables, folder = json.loads(told)
        become(line, streams, variables, folder, new_session=True)
    for stream in streams:
        os.close(stream)
    return child


def _line(given):
    """What Python would run, without options of its own and those of Ray that one more process would take."""
    start = next(i for i, word in enumerate(given) if word == "-m" or not word.startswith("-"))
    rays = ("--serialized-runtime-env-context=", "--language=")
    return [word for word in given[start:] if not word.startswith(rays)]


def _ask():
    """Have the line run, and end as it does."""
    told = json.dumps([_line(sys.argv[2:]), dict(os.environ), os.getcwd()]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{sys.argv[1]}")
        socket.send_fds(server, [b"%16d" % len(told)], [0, 1, 2])
        server.sendall(told)
        status = int(server.recv(16) or 1)
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    _ask()
