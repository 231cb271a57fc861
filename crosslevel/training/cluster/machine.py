"""Ray's actor for one machine of a training. It imports nothing heavy, as the command does that itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any

PREFIX = "crosslevel train: "
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the actor is killed, as its machine's others are
os.execv(sys.argv[1], sys.argv[1:])
"""


class Machine:
    """An actor of Ray's: one machine's command, in a process of its own."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: SimpleQueue[tuple[bool, str]] = SimpleQueue()
        self.last = ""

    def address(self) -> tuple[str, int]:
        """This machine's address, and a free port."""
        import ray  # noqa: PLC0415

        with socket.socket() as free:
            free.bind(("", 0))
            return str(ray.util.get_node_ip_address()), int(free.getsockname()[1])

    def run(self, line: list[str], variables: dict[str, str], folder: str) -> tuple[int, str]:
        """Run a command in ``folder``; return its exit status, and the reason of a failure."""
        # Ray may have been started by SLURM, whose variables must be ignored here.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        if sys.platform == "linux":
            line = [sys.executable, "-c", _ENDS_WITH_PARENT, *line]
        self.process = subprocess.Popen(line, cwd=folder, env=inherited | variables, start_new_session=True, **pipes)
        readers = [
            threading.Thread(target=self._read, args=(file, of_errors), daemon=True)
            for file, of_errors in ((self.process.stdout, False), (self.process.stderr, True))
        ]
        for reader in readers:
            reader.start()
        status = self.process.wait()
        for reader in readers:
            reader.join(timeout=5)  # a process that the command started may hold the pipe open
        return status, self.last or (f"the command ended with status {status}" if status else "")

    def output(self) -> list[tuple[bool, str]]:
        """The lines since the last call; each with a flag for stderr."""
        return [self.lines.get() for _ in range(self.lines.qsize())]

    def stop(self, number: int) -> None:
        """Send a signal to the command and all processes that it started."""
        with suppress(ProcessLookupError):
            if self.process is not None:
                os.killpg(self.process.pid, number)

    def _read(self, file: IO[str], of_errors: bool) -> None:
        for text in file:
            self.lines.put((of_errors, text.rstrip("\n")))
            if of_errors and text.startswith(PREFIX) and ": warning: " not in text:
                self.last = text.removeprefix(PREFIX).rstrip()
