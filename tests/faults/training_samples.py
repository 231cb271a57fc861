"""A training in a process of its own, and the line with which one is refused."""

import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from forks import fork

from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.train import train

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false", "--precision=fp32", "--monitor_every=0", "--workers=0"]


class Training:
    """`crosslevel train` in a session of its own."""

    def __init__(self, folder, arguments, environment=None, limit=None):
        self.run, self.said = Run(folder), folder.with_name(f"{folder.name}.said")
        self.pid = fork()
        if self.pid == 0:
            self._child([*arguments, f"--run={folder}"], environment or {}, limit)

    def _child(self, arguments, environment, limit):
        code = 99
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run(train, arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def until(self, step):
        """Wait for a row of metrics.csv."""
        while not (self.run.metrics.exists() and len(self.run.metrics.read_text().splitlines()) > step):
            assert os.waitpid(self.pid, os.WNOHANG)[0] == 0, self.said.read_text()
            time.sleep(0.05)

    def children(self):
        task = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def end(self):
        """Exit status and what was said."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.said.read_text()


def refused(arguments, capsys):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(train, list(map(str, arguments)))
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    return said
