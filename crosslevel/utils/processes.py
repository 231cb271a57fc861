"""How the processes of one command live together: which one this is, and who answers signals that ask it to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from crosslevel.utils.errors import UserError

ENDING = tuple(
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if (number := getattr(signal, name, None)) is not None
)
"""Ctrl-C, `kill`, systemd and Kubernetes (TERM), a closed terminal (HUP), SLURM's --signal (USR1, USR2)."""


def local_rank() -> int:
    """Which of the processes that one command started this is, also before they know each other; the first is 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def refuse_tasks() -> None:
    """Refuse to be one of several tasks that SLURM started: a training starts its own processes.

    Raises:
        UserError: with what to ask SLURM for.

    """
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        tasks = os.environ.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"{name}={tasks}: SLURM is to start this command once, and it starts a process for each device itself: "
                f"give sbatch --ntasks=1, and crosslevel train --devices {tasks}"
            )
        if tasks:
            return


class StopRequest:
    """While the block runs, a signal of `ENDING` is a wish, noted in ``number``, that is carried out where it suits.

    A second Ctrl-C ends the process at once. Others may come several times, to the process and to its group.
    Outside the main thread nothing is noted: Python has signals only there.
    """

    def __init__(self, told: Callable[[int], None] = lambda number: None) -> None:
        self.told = told
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            listened = [number for number in ENDING if not _is_nohup(number)]
            self._before = {number: signal.signal(number, self._note) for number in listened}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            sys.exit(128 + number)
        if not self.number:
            self.number = number
            self.told(number)


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, raised where the main thread is, as Ctrl-C is by Python itself.

    ``number`` is the signal's; ``kept`` says what there is, and how to go on.
    """

    def __init__(self, number: int = signal.SIGINT, kept: str = "") -> None:
        self.number, self.kept = number, kept
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        super().__init__(f"stopped{by}{kept and f': {kept}'}")


@contextmanager
def raising_stopped() -> Iterator[None]:
    """While the block runs, signals of `ENDING` raise `Stopped`, once: several may come, to the process and its group.

    Ctrl-C is as before. Outside the main thread nothing is raised, and a process that is forked from here ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, raised = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not raised:
            raised = True
            raise Stopped(number)

    listened = [number for number in ENDING if number != signal.SIGINT and not _is_nohup(number)]
    before = {number: signal.signal(number, stop) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Let what asks the process to end while the block runs say what is kept, and how to go on.

    Raises:
        Stopped: in the place of any `KeyboardInterrupt`.

    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(getattr(stop, "number", signal.SIGINT), kept()) from None


@contextmanager
def without_main() -> Iterator[None]:
    """While the block runs, processes that are spawned do not import this one's main module.

    Ours need nothing of it: a script without a guard would begin anew in each of them, and what came from a notebook or
    a pipe cannot be imported at all.
    """
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


def _is_nohup(number: int) -> bool:
    """Whether the process was started to outlive its terminal, as `nohup` does it."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def leave_to_parent() -> None:
    """In a process that works for another: what asks the whole group to end is for the other one to answer.

    SIGTERM from that other one still ends this process: so does Python end what is left of its processes, and it waits
    for them. Only where the system says who sent a signal (Linux) can both be had; elsewhere SIGTERM ends it whoever
    sends it.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Blocked in all threads that this one starts, it reaches the thread that waits for it, and no handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True, name="crosslevel-signals").start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # anything else torch takes for a worker that died
