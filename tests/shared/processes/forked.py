"""A Python program in a process that is forked from the test's own: it has all imports ready, which take seconds."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from contextlib import suppress

from forks import end_with, fork

from crosslevel.data.decoding import memory

PIPE = subprocess.PIPE
PATIENCE = 600  # seconds


class Forked:
    """Stands in for `subprocess.Popen` of ``[sys.executable, "-m", MODULE, ...]`` or of a script that is Python.

    What it writes to a pipe it gets from stdout alone; stderr, where a pipe is asked for, can be read at the end.
    """

    def __init__(
        self, args, stdin=None, stdout=None, stderr=None, text=True, env=None, cwd=None, start_new_session=False
    ):
        assert text
        line = list(map(str, args))
        self.returncode, self._asked = None, threading.Lock()
        (answers, write), (read, told), (begun, begins) = os.pipe(), os.pipe(), os.pipe()
        self.stderr = tempfile.TemporaryFile("w+") if stderr is PIPE else None  # noqa: SIM115
        streams = [answers if stdin is PIPE else 0, told if stdout is PIPE else stdout or 1, self.stderr or stderr or 2]
        self.pid = fork()
        if self.pid == 0:
            numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
            become(line[1:] if line[0] == sys.executable else line, numbers, env, cwd, start_new_session)
        for file in (answers, told, begins):
            os.close(file)
        os.read(begun, 1)  # its end is let go of when the session is begun
        os.close(begun)
        self.stdin, self.stdout = os.fdopen(write, "w"), os.fdopen(read)

    def poll(self):
        """The exit status, negative if a signal ended the process; None as long as it runs."""
        return self._ended(os.WNOHANG)

    def wait(self, timeout=None):
        """The exit status, once there is one.

        Raises:
            subprocess.TimeoutExpired: there is none after so many seconds.

        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is not None and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.02)
        return self._ended(0)

    def _ended(self, how):
        with self._asked:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, how)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def communicate(self, timeout=None):
        """What the process says until its end."""
        said = self.stdout.read()
        self.wait()
        self.stderr.seek(0)
        return said, self.stderr.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def forked_training(*arguments):
    """A trial's training as `crosslevel.tuning.trial.training`, forked where the system says which files are open."""
    from crosslevel.tuning import trial

    return trial.training(*arguments, popen=Forked if sys.platform == "linux" else subprocess.Popen)


def fork_ranks(patch):
    """While the ``patch`` is in force, and in forks of then, what Lightning and torchrun start are forks, too."""
    started = types.SimpleNamespace(Popen=Forked)
    patch.setattr("lightning_fabric.strategies.launchers.subprocess_script.subprocess", started)
    elastic = "torch.distributed.elastic"
    patch.setattr(f"{elastic}.multiprocessing.subprocess_handler.subprocess_handler.Popen", Forked)
    # For a line of its log it looks through all modules that there are, which are thousands here.
    patch.setattr(f"{elastic}.rendezvous.dynamic_rendezvous.get_method_name", lambda depth=2: "", raising=False)


def become(line, streams, env, cwd, new_session):
    """In the child: the program, with nothing of its parent's open but what it is given."""

    def program():
        if new_session:
            os.setsid()
        signal.alarm(PATIENCE)
        kept = [os.dup(number) for number in streams]
        for number, file in enumerate(kept):
            os.dup2(file, number)
        _let_go()
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "rww"[i], closefd=False) for i in range(3))
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        os.chdir(cwd or ".")
        if line[0] == "-m":
            sys.argv = line[1:]
            runpy.run_module(line[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = line
            runpy.run_path(line[0], run_name="__main__")

    end_with(program, crashed=1)


def _let_go():
    """Let go of all other files, as a program that is started anew does not have them: pipes, and locks.

    Their numbers stay taken: whatever thinks that it holds one may still close it. What decoders have in common stays.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    kept = {0, 1, 2, nothing, memory._file}
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
        with suppress(OSError):  # the one that was listed with
            os.fstat(number)
            os.dup2(nothing, number)
