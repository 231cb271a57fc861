"""A training in a process of its own, and the line with which one is refused."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from forks import begun

from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.train import train

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false", "--precision=fp32", "--monitor_every=0", "--workers=0"]


class Training:
    """`crosslevel train` in a session of its own."""

    def __init__(self, folder, arguments, environment=None, limit=None):
        self.run, self.said = Run(folder), folder.with_name(f"{folder.name}.said")

        def call():
            os.environ.update(environment or {})
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run(train, [*arguments, f"--run={folder}"])

        self.pid = begun(call, [self.said, self.said])

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
