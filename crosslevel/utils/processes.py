"""The processes of one command: the number of this one, and the handling of signals that end them."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from crosslevel.utils.errors import UserError

ENDING = tuple(
    number
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if (number := getattr(signal, name, None)) is not None
)
"""Ctrl-C, `kill`, systemd and Kubernetes (TERM), a closed terminal (HUP), SLURM's --signal (USR1, USR2)."""


BROKEN_PIPE = 141  # the shells' status for a process ended by SIGPIPE


def local_rank() -> int:
    """This process's number on its machine, also before the processes are connected; the first is 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the first process of all, which prints for them."""
    node = os.environ.get("GROUP_RANK", "0") if by_torchrun() else os.environ.get(_NODE, "0")
    return local_rank() == 0 and node == "0"


_NODE = "CROSSLEVEL_NODE"
"""The number of this machine, for processes started by the first one: NODE_RANK may be set by other programs."""


def by_torchrun() -> bool:
    """Whether `torchrun` started this process, as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Call(NamedTuple):
    """One call of torchrun, the same on all machines and after each restart: ``name``, and whether a user chose it.

    Without --rdzv-id it is named after the store that its agents share; a store that is new for each restart gives no
    name.
    """

    name: str
    is_users_own: bool


def torchrun_call() -> Call | None:
    """The call of torchrun that started this process; None if none did."""
    if not by_torchrun():
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name not in ("", "none"):
        return Call(name, True)
    return Call(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", False)


def shares_store() -> bool:
    """Whether torchrun's processes use the one store of its first agent again after each restart."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def warn_of_restarts() -> None:
    """Warn if a torchrun on several machines could not continue after one of them is replaced."""
    call = torchrun_call()
    if call is None or not is_first() or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if shares_store() or not call.is_users_own:
        warnings.warn(
            "torchrun may not restart a training of several machines: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "before it, and give it --rdzv-id NAME",
            stacklevel=3,
        )


ATTEMPT = "CROSSLEVEL_ATTEMPT"
"""The number of former starts of a training's commands, if a launcher starts them."""


def launched() -> bool:
    """Whether Crosslevel's launcher started this command, as one of a training's."""
    return ATTEMPT in os.environ


def attempt() -> int:
    """The number of former starts of this training's processes, by torchrun or Crosslevel's launcher."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT" if by_torchrun() else ATTEMPT, "0"))


class World(NamedTuple):
    """The processes of a training: ``devices`` on each of ``nodes`` machines, and the numbers of this one."""

    devices: int
    nodes: int
    rank: int

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.devices * self.nodes


def world(devices: int, nodes: int) -> World:
    """This process among all: from torchrun's variables, or one of ``devices`` on this of ``nodes`` machines.

    On several machines, SLURM's variables give this machine's number and the first one's address, or `NODE_RANK`,
    `MASTER_ADDR` and `MASTER_PORT` do.

    Raises:
        UserError: the variables are missing or do not fit, or SLURM has started too many tasks.

    """
    if devices < 1 or nodes < 1:
        raise UserError(f"devices={devices}, nodes={nodes}: at least 1 each")
    if by_torchrun():
        local, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        if devices not in (1, local) or nodes not in (1, size // local):
            raise UserError(
                f"devices={devices}, nodes={nodes}: torchrun started {local} processes on each of {size // local} "
                "machines: leave both out"
            )
        return World(local, size // local, int(os.environ["RANK"]))
    _refuse_tasks(devices, nodes)
    if nodes == 1:
        if "LOCAL_RANK" not in os.environ:  # left-over variables for several machines would make it wait
            for name in ("NODE_RANK", "MASTER_ADDR", _NODE):
                os.environ.pop(name, None)
        return World(devices, 1, local_rank())
    if "SLURM_NODEID" in os.environ:
        _from_slurm()
    lacks = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacks:
        raise UserError(
            f"--nodes {nodes}: {', '.join(lacks)} not set: start one command a machine with srun, or with torchrun "
            f"--nnodes {nodes}, or set NODE_RANK (0 to {nodes - 1}) and the first machine's MASTER_ADDR and MASTER_PORT"
        )
    os.environ[_NODE] = os.environ["NODE_RANK"]
    return World(devices, nodes, int(os.environ["NODE_RANK"]) * devices + local_rank())


def _from_slurm() -> None:
    """Set PyTorch's variables from SLURM's; existing ones stay."""
    os.environ.setdefault("NODE_RANK", os.environ["SLURM_NODEID"])
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    # The first of a list such as gpu[07-09,12],login1.
    if first := re.match(r"([^\[,]+)(?:\[(\w+))?([^\[,\]-]*)", nodes):
        os.environ.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
    os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000))


def _refuse_tasks(devices: int, nodes: int) -> None:
    """Refuse several tasks of SLURM on one machine: a training starts its own processes."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        tasks = os.environ.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1 and int(tasks) != nodes:
            raise UserError(
                f"{name}={tasks}: SLURM is to start this command once a machine, and it starts a process for each "
                f"device itself: give sbatch --ntasks=1, and crosslevel train --devices {tasks}; or "
                "on several machines --ntasks-per-node=1 and --nodes"
            )
        if tasks:
            return


class StopRequest:
    """While the block runs, a signal of `ENDING` is only recorded in ``number``; the caller ends at a suitable point.

    A second Ctrl-C raises `Stopped` at once, a KeyboardInterrupt. Other signals may come several times, to the process
    and to its group.
    Outside the main thread nothing is recorded, as Python handles signals only there.
    """

    def __init__(self, notify: Callable[[int], None] = lambda number: None) -> None:
        self.notify = notify
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
            raise Stopped(number)
        if not self.number:
            self.number = number
            self.notify(number)


class Stopped(KeyboardInterrupt):
    """A signal that ends the process, raised as an exception in the main thread, as Python does for Ctrl-C.

    ``number`` is the signal's; ``message`` says what was saved, and how to continue.
    """

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        self.number, self.message = number, message
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        super().__init__(f"stopped{by}{message and f': {message}'}")


@contextmanager
def raising_stopped() -> Iterator[None]:
    """While the block runs, signals of `ENDING` raise `Stopped`, once: several may come, to the process and its group.

    Ctrl-C is unchanged. Outside the main thread nothing is raised, and a process forked from here just ends.
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
def keeping(message: Callable[[], str]) -> Iterator[None]:
    """Give a signal that ends the process during the block a message: what was saved, and how to continue.

    Raises:
        Stopped: in place of any `KeyboardInterrupt`.

    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(getattr(stop, "number", signal.SIGINT), message()) from None


@contextmanager
def without_main() -> Iterator[None]:
    """While the block runs, processes that are spawned do not import this one's main module.

    Crosslevel's processes do not need it: a script without a guard would run again in each of them, and code from a
    notebook or a pipe cannot be imported at all.
    """
    main = vars(sys.modules["__main__"])
    saved: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(saved)


class CommandLine:
    """Whether the command line runs, and not a function that a program calls: the process is then its own to end."""

    runs = False


@contextmanager
def unread() -> Iterator[None]:
    """End a command quietly, with the shells' status, if nobody reads the output any more, as after ``| head``.

    Raises:
        SystemExit: nobody reads it.

    """
    before, CommandLine.runs = CommandLine.runs, True
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        sys.exit(BROKEN_PIPE)
    finally:
        CommandLine.runs = before


def output_is_broken() -> bool:
    """Whether the output goes into a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))  # poll always reports errors and a closed end
    except (OSError, ValueError):  # no file
        return False


def _is_nohup(number: int) -> bool:
    """Whether the process was started to outlive its terminal, as `nohup` does it."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def leave_to_parent() -> None:
    """Ignore signals that end the whole process group, in a worker process; the parent handles them.

    SIGTERM from the parent still ends it, which Python needs to end its workers. On Linux the sender is known, and
    SIGTERM from others is ignored; elsewhere SIGTERM from anybody ends it.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # The signal is blocked in all threads that this one starts, so that it reaches the waiting thread, and no
        # handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True, name="crosslevel-signals").start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # torch takes any other status for a dead worker
