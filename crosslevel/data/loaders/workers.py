"""Worker processes that decode: how they begin and end, and the error when one dies."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import queues
from types import TracebackType
from typing import Any, TypeVar

from torch.utils.data import Dataset

from crosslevel.utils.errors import MachineError
from crosslevel.utils.processes import leave_to_parent

Key = TypeVar("Key")


@dataclass
class Keys(Dataset[Key]):
    """The keys to decode, batch by batch: the only thing that changes for persistent workers."""

    keys: Iterable[Key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)


def leave_interrupts(worker: int, leave: Callable[[], None] = leave_to_parent) -> None:
    """Let only the main process end a worker process; ``leave`` sets the worker's handling of signals."""
    # Ctrl-C and a cluster's signals reach the whole process group; the main process ends its workers itself.
    leave()
    report = sys.excepthook

    def hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The main process may be interrupted while it receives a batch, and close the connection: no error is printed
        # for that.
        if not issubclass(kind, EOFError | ConnectionError):
            report(kind, error, trace)

    sys.excepthook = hung_up


def hand_over_or_end(tell: Callable[[str], None]) -> None:
    """End a worker process that cannot hand over its result, and report the reason.

    By default Python prints a traceback and drops the batch, and the main process would wait for ever.
    """

    def failed(error: BaseException, batch: object) -> None:
        tell(" ".join(str(error).split()) or type(error).__name__)
        os._exit(1)

    queues.Queue._on_queue_feeder_error = staticmethod(failed)  # type: ignore[attr-defined]


@contextmanager
def worker_trouble() -> Iterator[None]:
    """Turn the error of a dead decoding process into one line.

    Raises:
        MachineError: a process died, or could not hand over its result.

    """
    try:
        yield
    except RuntimeError as error:
        message = trouble(error)
        if not message:
            raise
        raise MachineError(message) from error


def trouble(error: RuntimeError) -> str:
    """The reason why a decoding process died, in one line; empty if the error is another one."""
    text = " ".join(str(error).split())
    killed = re.search(r"DataLoader worker .*?(is killed by signal: [\w ]+|exited unexpectedly)", text)
    if "No space left on device" in text or "out of shared memory" in text or "Bus error" in text:
        reason = "/dev/shm is full: enlarge it (docker run --shm-size=8g), or give --workers 0 or fewer"
    elif handed := re.search(r"DataLoader worker could not hand over a batch: (.*)", text):
        reason = f"it could not hand over a batch: {handed[1]}"
    elif killed:
        reason = f"it {killed[1].rstrip(' .')}; if memory is short, give --workers 0 or fewer"
    else:
        return ""
    return f"a process that decodes images has died: {reason}"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth_workers(job: Dataset[Any], count: int) -> int:
    """The number of processes for ``job`` on ``count`` images: one for each core, or 0 if a thread needs less than 5 s.

    ``job`` takes a range of images; its time is measured on 17 of them. Processes take seconds to start.
    """
    job[range(1)]  # the first image includes one-time loading
    sample = range(0, count, max(1, count // 16))
    start = time.perf_counter()
    for i in sample:
        job[range(i, i + 1)]
    estimate = (time.perf_counter() - start) / max(1, len(sample)) * count
    return cores() if estimate > 5 else 0
