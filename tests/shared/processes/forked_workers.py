"""Workers of pytest-xdist that are forked from its main process, which has imported the tests once for all of them."""

import atexit
import contextlib
import importlib
import os
import sys
import types
from pathlib import Path

import pytest
from forks import end_with, fork


def fork_workers(config, count):
    """Let the next ``count`` workers be forks from here; where that is not safe, nothing is done."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists() or config.getoption("cov_source", None):
        return
    gateways = importlib.import_module("execnet.gateway_io")
    capture = config.pluginmanager.getplugin("capturemanager")
    import_tests(config)
    capture.suspend_global_capture(in_=True)
    waiting = []
    for _ in range(count):
        waiting.append(forked([end for worker in waiting for end in worker[1:]]))
    capture.resume_global_capture()

    class Worker(gateways.Popen2IO):
        """Stands in for a Python that execnet starts, of which ``args`` are the command line."""

        def __init__(self, args, execmodel):
            self.pid, write, read = waiting.pop(0)
            super().__init__(os.fdopen(write, "wb"), os.fdopen(read, "rb"), execmodel)

        def wait(self):
            with contextlib.suppress(ChildProcessError):
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

        def kill(self):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)

    started = gateways.Popen2IOMaster

    def start(args, execmodel):
        """A worker; once there is none that waits, as where one has crashed, a new process."""
        return Worker(args, execmodel) if waiting else started(args, execmodel)

    gateways.Popen2IOMaster = start


def import_tests(config):
    """As collecting them does; what cannot be imported is told by the workers, which try again."""
    for place in config.args:
        path = config.invocation_params.dir / place.partition("::")[0]
        for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
            if str(file.parent) not in sys.path:
                sys.path.insert(0, str(file.parent))
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(file.stem)


def forked(others):
    """A fork that waits for what execnet tells it: its number, and where it is told and answers."""
    (told, tells), (answers, answered) = os.pipe(), os.pipe()
    pid = fork()
    if pid == 0:
        for end in (*others, tells, answers):
            os.close(end)
        for number, end in enumerate((told, answered)):
            os.dup2(end, number)
            os.close(end)
        end_with(work)
    os.close(told)
    os.close(answered)
    return pid, tells, answers


def work():
    """What ``python -c`` would do with the line that execnet starts its processes with."""
    atexit._clear()  # these are the first process's own
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(eval(sys.stdin.readline()), vars(main))
    finally:
        atexit._run_exitfuncs()
