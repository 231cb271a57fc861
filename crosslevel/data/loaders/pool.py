"""Processes that decode images: a crash loses the image that caused it, and not the run.

Ours, around PyTorch's `DataLoader`, which raises an error when one of its processes dies: here the others' work goes on
without the image.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from crosslevel.data.decoding import trace
from crosslevel.data.decoding.memory import limit_process
from crosslevel.data.loaders.workers import Keys, hand_over_or_end, leave_interrupts
from crosslevel.utils.errors import MachineError, printable
from crosslevel.utils.processes import without_main

Result = TypeVar("Result")

MOST_CRASHES = 20
"""The most images that may crash the processes of one loader; more crashes than that end the run."""

# Signals by which a fault in a decoder ends a process. SIGKILL is not among them: a user or the system sends it.
_FAULTS = frozenset(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE", "SIGSYS")
    if hasattr(signal, name)  # Windows has fewer
)


def _start() -> str | None:
    """How processes start: forked unless set otherwise, since forked processes share the memory limit and the board."""
    forks = sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None
    return "fork" if forks else None


class Pool(Generic[Result]):
    """Runs ``job`` on the ``keys`` in order, in ``workers`` processes, which live on if ``persistent``.

    Each process has a limit of memory of its own. If one dies of a fault while it decodes an image, that image is bad
    from then on (`trace.refused`); up to ``most_crashes`` images may be. The processes are started again, and the
    results not yet delivered are made anew.

    Raises:
        MachineError: while iterating, if a process was killed while it decoded, or too many images crash.
        RuntimeError: while iterating, if a process died for another reason; `worker_trouble` describes it.

    """

    def __init__(
        self,
        job: Dataset[Result],
        keys: Iterable[Any],
        workers: int,
        persistent: bool,
        most_crashes: int = MOST_CRASHES,
    ) -> None:
        self.job, self.keys, self.workers, self.persistent = job, keys, workers, persistent
        self.most_crashes = most_crashes
        self._feed: Keys[Any] = Keys([])
        self._board, self._lost = trace.Board(workers), trace.Board(workers)
        self._loader: DataLoader[Result] | None = None
        self._crashed: list[str] = []
        self._processes: list[Any] = []

    def __iter__(self) -> Iterator[Result]:
        source, waiting = iter(self.keys), deque[Any]()
        while True:
            self._feed.keys = _noted(list(waiting), source, waiting)
            try:
                for result in self._results():
                    waiting.popleft()
                    yield result
                return
            except RuntimeError as error:
                self._loader = None
                self._answer(error)

    def _results(self) -> Iterator[Result]:
        iterator = self._started()
        while True:
            try:
                with _noticed(self._processes):
                    result = next(iterator)
            except StopIteration:
                return
            yield result

    def _started(self) -> Iterator[Result]:
        if self._loader is None:
            # Without a batch size each key makes one whole batch in the worker: collating single small images in
            # the main process costs more than decoding them.
            with _any_number():
                self._loader = DataLoader(
                    self.job,
                    batch_size=None,
                    sampler=self._feed,
                    num_workers=self.workers,
                    collate_fn=_unchanged,
                    worker_init_fn=_Begin(self._board, self._lost),
                    multiprocessing_context=_start(),
                    persistent_workers=self.persistent,
                    pin_memory=torch.cuda.is_available(),
                )
        # torch would raise that a process has died wherever this one is, such as in the middle of a step; without its
        # handler that is raised where results are waited for (`_noticed`).
        ended = getattr(signal, "SIGCHLD", None)
        before = None if ended is None else signal.getsignal(ended)
        with without_main(), _any_number():  # whatever the main module is
            iterator = iter(self._loader)
        if ended is not None and threading.current_thread() is threading.main_thread():
            torchs = getattr(before, "__module__", "").startswith("torch.utils.data")  # of another loader
            signal.signal(ended, signal.SIG_DFL if before is None or torchs else before)
        self._processes = getattr(iterator, "_workers", [])
        return iterator

    def _answer(self, error: RuntimeError) -> None:
        """Go on without the image that crashed a process.

        Raises:
            MachineError: as from this class.
            RuntimeError: the error itself, or what killed the process.

        """
        lost = [message for i in range(len(self._processes)) if (message := self._lost.read(i))]
        if lost:
            raise RuntimeError(f"DataLoader worker could not hand over a batch: {lost[0]}") from error
        died = [(i, process) for i, process in enumerate(self._processes) if (process.exitcode or 0) < 0]
        if not died:
            raise error
        for i, process in died:
            number, path = -process.exitcode, self._board.read(i)
            self._board.clear(i)
            message = signal.strsignal(number) or f"signal {number}"
            if path is None:
                raise RuntimeError(f"DataLoader worker (pid {process.pid}) is killed by signal: {message}. ") from error
            name = printable(path)
            if number not in _FAULTS:
                raise MachineError(
                    f"a process that decodes images has died: it is killed by signal: {message}, while it decoded "
                    f"{name}; if memory is short, give --workers 0 or fewer"
                ) from error
            self._crashed.append(path)
            if len(self._crashed) > self.most_crashes or path in trace.refused:
                raise MachineError(
                    f"{len(self._crashed)} images crashed the processes that decode, the last one {name} ({message}): "
                    "leave them out, or install the decoders anew: pip install -U pillow torchvision"
                ) from error
            trace.refused[path] = f"its decoder crashed the process that read it: {message}"
            warnings.warn(f"{name}: its decoder crashed the process that read it ({message}): left out", stacklevel=2)


@contextmanager
def _any_number() -> Iterator[None]:
    """Without torch's warning: whoever requests more processes than cores has a reason."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@contextmanager
def _noticed(processes: Sequence[Any]) -> Iterator[None]:
    """Raise as soon as one of the processes has died, while results are waited for.

    torch itself checks every five seconds. Its check alone is used outside the main thread, the only one that receives
    signals, and on Windows, which has no such signal.
    """
    ended = getattr(signal, "SIGCHLD", None)
    if ended is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def died(*_: object) -> None:
        if any(process.exitcode for process in processes):
            raise RuntimeError("DataLoader worker exited unexpectedly")

    before = signal.signal(ended, died)
    try:
        died()  # since results were last waited for
        yield
    finally:
        signal.signal(ended, signal.SIG_DFL if before is None else before)


@dataclass
class _Begin:
    """The set-up of a worker process."""

    board: trace.Board
    lost: trace.Board
    refused: dict[str, str] = field(default_factory=lambda: trace.refused)

    def __call__(self, worker: int) -> None:
        leave_interrupts(worker)
        hand_over_or_end(lambda message: self.lost.write(worker, message))
        limit_process()
        trace.refused.update(self.refused)
        trace.enter(self.board, worker)
        for number in _FAULTS & {getattr(signal, name, None) for name in ("SIGSEGV", "SIGBUS", "SIGFPE")}:
            signal.signal(number, signal.SIG_DFL)  # torch's handlers only print a line without a name


def _noted(resubmitted: list[Any], source: Iterator[Any], waiting: deque[Any]) -> Iterator[Any]:
    """Yield the ``resubmitted`` keys, then the rest of ``source``; each is recorded until its result comes."""
    waiting.clear()
    for key in chain(resubmitted, source):
        waiting.append(key)
        yield key


def _unchanged(done: Any) -> Any:
    return done
