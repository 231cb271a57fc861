"""Kills a command at every change of a file, and looks whether the same command then ends as if nothing had been.

    survey(["embed.parquet"], ("kill", "half"), every=5)

A `Job` (see jobs.py, where more are added) says what is run, and what has to be equal afterwards. It runs in a process
that a shim (shim.c, compiled here with gcc, `LD_PRELOAD`) watches; imports are done once, then each try is a fork:

1. an empty folder `out`; the command runs, and at its n-th change of a file below `out` the fault strikes;
2. `Job.check` looks at what a user finds then;
3. the command runs again, undisturbed: it must end well, `Job.outcome` must be as without the fault, and no other files
   may lie in `out`. What runs again can be killed a second time (`twice`), at a random change.

Faults: "kill" before the n-th change (creating, writing, renaming, removing ...; SIGKILL to the process group); "half":
killed when half of the n-th write is written; "once": the n-th write fails for want of space; "full": all writes from
the n-th on do. After the last two the command must say so in plain words, without a traceback, unless it ends well and
the outcome is right.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

shared = Path(__file__).parents[2] / "shared"
sys.path += [str(shared), str(shared / "processes")]  # where this is started by itself

from forks import end_with, fork
from tries import Counts, Log, table

HERE = Path(__file__).parent
FAULTS = ("kill", "half", "once", "full")
_CODES = {"count": 1, **{name: code for code, name in enumerate(FAULTS, 2)}}
_CONTROL = struct.Struct("@5l4096s")
OF_SQLITE = ("-wal", "-shm")  # beside a study while a process has it open, and until the next one where that was killed
_TOO_LONG = 300  # seconds


class Job:
    """One command under test. Where things lie: `inputs` is made once and only read, `out` is watched.

    ``maps`` names the files that it may write through memory, where no fault reaches, and why that loses nothing.
    """

    maps = ""
    slow = 1  # where points are left out, so many times as many of this one, each of which takes seconds

    def prepare(self, inputs: Path) -> None:
        """Make what the command reads."""

    def before(self, inputs: Path, out: Path) -> None:
        """Put something into the empty `out`, unwatched: what an earlier call left, for instance."""

    def run(self, inputs: Path, out: Path) -> Any:
        """The command, as a user would type it, and type again after a kill."""
        raise NotImplementedError

    def outcome(self, inputs: Path, out: Path) -> Any:
        """What must be equal in the end: plain values or a digest."""
        raise NotImplementedError

    def files(self, out: Path) -> list[str]:
        """The files that must be there in the end, and no others."""
        return sorted(str(file.relative_to(out)) for file in out.rglob("*") if not file.name.endswith(OF_SQLITE))

    def check(self, inputs: Path, out: Path) -> str | None:
        """What is wrong in `out` right after the fault, None if nothing is."""
        return None


class Ended(NamedTuple):
    """How a forked call ended."""

    code: int  # negative: the signal
    said: str
    value: Any


def missing() -> str | None:
    """Why nothing can be tried on this machine, None if it can."""
    return None if sys.platform == "linux" and shutil.which("gcc") else "needs Linux and gcc, for the shim"


def compiled(folder: Path) -> Path:
    """The shim, compiled into `folder`."""
    if (why := missing()) is not None:
        raise RuntimeError(why)
    shim = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    return shim


def survey(
    jobs: Sequence[str],
    faults: Sequence[str] = FAULTS,
    every: int = 1,
    seed: int = 0,
    twice: bool = False,
    at: int | None = None,
    disk: bool = False,
    log: Path | None = None,
) -> dict[str, dict[str, Counts]]:
    """Try every `every`-th point of each fault, beginning at a random one, on `jobs` of jobs.py (none: all).

    Args:
        jobs: names in `jobs.JOBS`.
        faults: of `FAULTS`.
        every: leaves out points.
        seed: of the first point, and of the second kill.
        twice: kill the second call as well.
        at: the first point, to look at one again.
        disk: write to the disk and not to memory: slower, but folders are listed, and cleared, in another order.
        log: a file with a line for each try; what it has already is not tried again, but counted.

    Returns:
        counts by job and fault.

    Raises:
        RuntimeError: there is no gcc (look with `missing` first), or a command fails undisturbed.

    """
    memory = None if disk or not os.access("/dev/shm", os.W_OK) else "/dev/shm"  # on a disk, syncs take minutes
    with tempfile.TemporaryDirectory(dir=memory) as made:
        folder = Path(made)
        shim, control = compiled(folder), folder / "control"
        control.write_bytes(bytes(_CONTROL.size))
        asked = [f"--every={every}", f"--seed={seed}", f"--faults={','.join(faults)}", *(["--twice"] if twice else [])]
        asked += [] if at is None else [f"--at={at}"]
        asked += [] if log is None else [f"--log={log.resolve()}"]
        ended = subprocess.run(
            [sys.executable, __file__, *jobs, *asked, f"--watched={folder}"],
            env={**os.environ, "LD_PRELOAD": str(shim), "FAULTS_CONTROL": str(control), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        found = json.loads((folder / "counts.json").read_text())
    return {job: {fault: Counts(**counts) for fault, counts in row.items()} for job, row in found.items()}


class _Control:
    """The memory that the shim shares with this process."""

    def __init__(self, file: Path, root: Path) -> None:
        with file.open("r+b") as opened:
            self.memory, self.root = mmap.mmap(opened.fileno(), _CONTROL.size), os.fsencode(root.resolve())

    def set(self, fault: str | None, at: int = 0) -> None:
        self.memory[:] = _CONTROL.pack(0 if fault is None else _CODES[fault], at, 0, 0, 0, self.root)

    def seen(self) -> tuple[int, int, int]:
        """Changes, writes among them, shared writable maps."""
        return _CONTROL.unpack(self.memory[:])[2:5]


class _Survey:
    def __init__(self, job: Job, folder: Path, control: Path, seed: int, twice: bool, log: Log) -> None:
        self.log = log
        self.job, self.inputs, self.out, self.twice = job, folder / "inputs", folder / "out", twice
        self.said, self.value = folder / "said", folder / "value"
        self.control, self.rng = _Control(control, self.out), random.Random(seed)

    def all(self, faults: Sequence[str], every: int, first: int | None) -> dict[str, Counts]:
        self.inputs.mkdir()
        self.job.prepare(self.inputs)
        expected, changes, writes = self._undisturbed()
        counts = {}
        every *= self.job.slow if every > 1 else 1
        for fault in faults:
            points = changes if fault == "kill" else writes
            counts[fault] = Counts(points)
            begin = first or 1 + self.rng.randrange(min(every, points))
            for at in range(begin, points + 1, every):
                name = f"{fault} {at}"
                if name not in self.log.known:
                    self.log.add(name, *self._lost(fault, at, expected, changes))
                lost, reached = self.log.known[name]
                counts[fault].tried += 1
                counts[fault].unreached += not reached
                if lost is None:
                    counts[fault].survived += 1
                else:
                    counts[fault].lost.append(f"{fault} {at}: {lost}")
        return counts

    def _undisturbed(self) -> tuple[Any, int, int]:
        self._empty()
        ended = self._forked(self._run_and_modules, "count")
        changes, writes, mapped = self.control.seen()
        if ended.code:
            raise RuntimeError(f"undisturbed, the command fails: {ended.said}")
        if mapped and not self.job.maps:
            raise RuntimeError(f"it writes {mapped} files through memory, which no fault reaches")
        for module in ended.value:  # what the command imports is imported once, and not in each fork
            with suppress(Exception):
                importlib.import_module(module)
        gc.freeze()  # the collector would touch, and so copy, every page that a fork shares
        found = self._forked(self._found)
        if found.code:
            raise RuntimeError(f"its outcome cannot be read: {found.said}")
        return found.value, changes, writes

    def _run_and_modules(self, inputs: Path, out: Path) -> list[str]:
        before = set(sys.modules)
        self.job.run(inputs, out)
        return [name for name in sys.modules if name not in before]

    def _lost(self, fault: str, at: int, expected: Any, changes: int) -> tuple[str | None, bool]:
        """What went wrong, and whether the fault was reached."""
        self._empty()
        ended = self._forked(self.job.run, fault, at)
        reached = self.control.seen()[0 if fault == "kill" else 1] >= at
        if reached and fault in ("kill", "half") and ended.code != -signal.SIGKILL:
            return f"ended with {ended.code} instead of being killed: {ended.said}", reached
        if "Traceback" in ended.said:
            return f"traceback: {ended.said[-400:]}", reached
        if ended.code == 0:
            found = self._forked(self._found)
            if found.code or found.value[0] != expected[0]:
                return f"SILENT: exit 0 and another outcome {found.value or found.said}", reached
        if self.twice:
            self._forked(self.job.run, "kill", self.rng.randrange(1, changes + 1))
        again = self._forked(self._again)
        if again.code:
            return f"run again: exit {again.code}: {again.said[-400:]}", reached
        complaint, outcome, files = again.value
        if complaint is not None:
            return f"found after it: {complaint}", reached
        if outcome != expected[0]:
            return f"SILENT: run again: exit 0 and another outcome {outcome}: {again.said[-400:]}", reached
        if files != expected[1]:
            return f"run again: files {files} instead of {expected[1]}", reached
        return None, reached

    def _again(self, inputs: Path, out: Path) -> list[Any]:
        """One fork for what a user finds after the fault, running the command again, and what is there then."""
        complaint = self.job.check(inputs, out)
        self.job.run(inputs, out)
        return [complaint, *self._found(inputs, out)]

    def _found(self, inputs: Path, out: Path) -> list[Any]:
        return [self.job.outcome(inputs, out), self.job.files(out)]

    def _empty(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self.job.before(self.inputs, self.out)

    def _forked(self, function: Callable[[Path, Path], Any], fault: str | None = None, at: int = 0) -> Ended:
        """Call `function` in a fork of this process, with a fault that strikes at a change or write."""
        sys.stdout.flush()
        self.control.set(None)
        child = fork()
        if child == 0:
            self._child(function, fault, at)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = self.said.read_text(errors="replace")
        return Ended(code, said, json.loads(self.value.read_text()) if code == 0 else None)

    def _child(self, function: Callable[[Path, Path], Any], fault: str | None, at: int) -> None:
        def call() -> None:
            os.setpgid(0, 0)
            signal.alarm(_TOO_LONG)
            said = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(said, stream)
            if fault is not None:
                self.control.set(fault, at)
            self.value.write_text(json.dumps(function(self.inputs, self.out), default=str))

        end_with(call, crashed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help="of jobs.py; all unless given")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twice", action="store_true", help="kill the second call as well")
    parser.add_argument("--at", type=int, help="the first point")
    parser.add_argument("--disk", action="store_true", help="write to the disk and not to memory")
    parser.add_argument("--log", type=Path, help="a line for each try; what it has is not tried again")
    parser.add_argument("--watched", type=Path, help=argparse.SUPPRESS)  # this process is the one that forks
    asked = parser.parse_args()
    faults = asked.faults.split(",")
    if asked.watched is None:
        found = survey(asked.jobs, faults, asked.every, asked.seed, asked.twice, asked.at, asked.disk, asked.log)
        print(table(found))
        sys.exit(any(counts.lost for row in found.values() for counts in row.values()))
    from jobs import JOBS

    counted = {}
    for number, job in enumerate(asked.jobs or JOBS):
        folder = asked.watched / str(number)
        folder.mkdir()
        kept = Log(asked.log, f"{job}{', twice' if asked.twice else ''}")
        counted[job] = _Survey(JOBS[job], folder, asked.watched / "control", asked.seed, asked.twice, kept).all(
            faults, asked.every, asked.at
        )
    text = json.dumps({job: {name: asdict(counts) for name, counts in row.items()} for job, row in counted.items()})
    (asked.watched / "counts.json").write_text(text)
    os._exit(0)  # what was imported says a lot when it goes


if __name__ == "__main__":
    main()
