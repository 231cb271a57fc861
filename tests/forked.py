"""A Python program in a process that is forked from the test's own: it has all imports ready, which take seconds."""

import os
import runpy
import subprocess
import sys
from contextlib import suppress

from forks import end_with, fork

from crosslevel.data.decoding import memory

PIPE = subprocess.PIPE


class Forked:
    """Stands in for `subprocess.Popen` of ``[sys.executable, "-m", MODULE, *ARGUMENTS]``, in a session of its own."""

    def __init__(self, line, stdin, stdout, stderr, text, env, start_new_session):
        assert (line[:2], stdin, stdout, text, start_new_session) == ([sys.executable, "-m"], PIPE, PIPE, True, True)
        (answers, write), (read, told), (begun, begins) = os.pipe(), os.pipe(), os.pipe()
        self.returncode = None
        self.pid = fork()
        if self.pid == 0:
            _become(line[2:], answers, told, stderr.fileno(), env)
        for file in (answers, told, begins):
            os.close(file)
        os.read(begun, 1)  # its end is let go of when the session is begun
        os.close(begun)
        self.stdin, self.stdout = os.fdopen(write, "w"), os.fdopen(read)

    def wait(self):
        """The exit status, negative if a signal ended the process."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def forked_training(*arguments):
    """A trial's training as `crosslevel.tuning.trial.training`, forked where the system says which files are open."""
    from crosslevel.tuning import trial

    return trial.training(*arguments, popen=Forked if sys.platform == "linux" else subprocess.Popen)


def _become(line, stdin, stdout, stderr, env):
    """In the child: the program, with nothing of its parent's open but what it is given."""

    def program():
        os.setsid()
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file, number)
        _let_go()
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "rww"[i], closefd=False) for i in range(3))
        os.environ.clear()
        os.environ.update(env)
        sys.argv = list(line)
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)

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
