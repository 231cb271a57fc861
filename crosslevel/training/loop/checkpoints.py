"""Checkpoints: a written file is read back before it counts, and a read file is checked before it is used."""

from __future__ import annotations

import importlib
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from crosslevel.runs import Run
from crosslevel.utils import files
from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.tensors import damage_of, load_tensors, save_to

if TYPE_CHECKING:
    from crosslevel.training.loop.shards import Shards

PARTS = {"state_dict", "optimizer_states", "callbacks", "epoch", "global_step"}
"""The keys of a checkpoint's tree; ``callbacks`` has the best epoch so far, a name from former versions."""

COUNT = "Checkpoints"
SLOW, LARGE = 0.2, 2**23
"""Seconds and bytes from which on a checkpoint is costly."""

RARE = 20  # times its own seconds have to pass before a costly checkpoint is written again

SHARDS = "shards"  # key of the folder beside the checkpoint that has its sharded tensors
_NOTHING = "no checkpoint beside it is whole: start the run anew"


class BestEpoch:
    """The mean loss of the current epoch, and the lowest one of those that ended with a checkpoint."""

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        self.lowest, self.total, self.count = (
            (float("inf"), torch.zeros(()), 0)
            if state is None
            else (float(state["best"]), torch.tensor(float(state["sum"])), int(state["count"]))
        )

    def add(self, loss: Tensor) -> None:
        """Add one step's loss, without waiting for the device."""
        self.total = self.total.to(loss.device) + loss
        self.count += 1

    def end(self, saved: bool = True) -> bool:
        """End the epoch, which is ``saved`` or not; return whether it is the best of those that were."""
        mean = float(self.total) / self.count
        best = saved and mean < self.lowest
        self.lowest, self.total, self.count = mean if best else self.lowest, torch.zeros(()), 0
        return best

    def state(self) -> dict[str, float]:
        """The state that a continued run needs."""
        return {"best": self.lowest, "sum": float(self.total), "count": self.count}


class Pace:
    """When a checkpoint is due: after each epoch, and so many minutes after the last one at the latest.

    Where an epoch is short and writing takes long, epochs are skipped: a costly checkpoint (`SLOW`, `LARGE`) is written
    again after `RARE` times its own seconds.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest, self.clock = 60 * minutes, clock
        self.cost, self.last = 0.0, clock()

    def due(self, ended: bool) -> bool:
        """Whether to write one after this step; ``ended``: it was an epoch's last."""
        passed = self.clock() - self.last
        return passed > self.longest or (ended and passed >= RARE * self.cost)

    @contextmanager
    def writing(self, file: Path) -> Iterator[None]:
        """Measure what it costs to write ``file``."""
        start = self.clock()
        yield
        self.last = self.clock()
        seconds = self.last - start
        self.cost = seconds if seconds > SLOW and file.is_file() and file.stat().st_size >= LARGE else 0.0


def write(run: Run, state: dict[str, Any], best: bool) -> None:
    """Write ``state`` to ``last.ckpt``; the former one becomes ``previous.ckpt``.

    The new file is synced and read back before it replaces the old one: after a kill, a full disk or a power failure,
    one of the two is intact.

    Raises:
        MachineError: it cannot be written, or is not read back as it was written; ``last.ckpt`` is unchanged.

    """
    with files.replacing(run.last) as file:
        _save(state, file, run.last)
        if run.last.exists():
            _also_named(run.last, run.previous)
    if best:
        _also_named(run.last, run.best)
    if SHARDS in state:
        _sweep(run, state)


def _sweep(run: Run, state: Mapping[str, Any]) -> None:
    """Remove the folders of parts that no checkpoint refers to any more."""
    referenced = {str(state[SHARDS])}
    for file in (run.previous, run.best):
        try:
            referenced.add(str(_tree(file).get(SHARDS)) if file.is_file() else "")
        except UserError:
            return  # it may refer to any of them
    _shards().sweep(run.checkpoints, referenced)


def _save(state: dict[str, Any], file: BinaryIO, name: Path) -> None:
    save_to(file, state, name)
    damage = damage_of(file)
    if damage:
        raise MachineError(f"{name}: it reads back differently from what was written ({damage}): check the disk")


def write_parts(run: Run, step: int, tensors: dict[str, Tensor], draw: Callable[[str], str], process: int) -> str:
    """Write the sharded tensors beside the checkpoint that will refer to them; all processes must call it.

    Args:
        run: the run.
        step: the number of finished steps.
        tensors: the sharded tensors by name.
        draw: sends the first process's text to all processes.
        process: the number of this process.

    Returns:
        the folder's name, to be stored in the checkpoint's tree as `SHARDS`.

    Raises:
        MachineError: it cannot be written, or is not read back as it was written.

    """
    shards = _shards()
    name = draw(f"{step:08}-{secrets.token_hex(4)}{shards.SUFFIX}")
    shards.write(run.checkpoints / name, tensors, process)
    return name


def read(run: Run, check_parts: bool = True) -> dict[str, Any]:
    """The tree of ``last.ckpt``, of tensors and plain values.

    ``check_parts``: if it has sharded tensors (`parts_of`), verify their checksums; one process does it for all.

    Raises:
        UserError: it is missing, damaged or no checkpoint; the message names an intact one beside it, if there is one.

    """
    if not run.last.is_file():
        hint = _offer(run) or "there is nothing to resume; start the run anew"
        raise UserError(f"{run.last} does not exist: {hint}")
    damage = damage_of(run.last)
    try:
        state = _tree(run.last)
    except UserError as error:
        raise UserError(f"{error}; {_offer(run) or _NOTHING}") from error
    if damage:
        raise UserError(f"{run.last} is {damage}; {_offer(run) or _NOTHING}")
    try:
        parts_of(run, state, check_parts)
    except UserError as error:
        raise UserError(f"{error}; {_offer(run) or _NOTHING}") from error
    return state


def parts_of(run: Run, state: Mapping[str, Any], check: bool = False) -> Shards | None:
    """The sharded part of a checkpoint.

    Raises:
        UserError: it is damaged or missing.

    """
    if SHARDS not in state:
        return None
    name = str(state[SHARDS])
    if Path(name).name != name:
        raise UserError(f"{run.last} names parts elsewhere: {name}")
    opened = _shards().Shards(run.checkpoints / name)
    damage = opened.damage() if check else ""
    if damage:
        raise UserError(f"{opened.folder} is {damage}")
    return opened


def _shards() -> Any:
    """Import the module of shards only when needed: it takes a tenth of a second."""
    return importlib.import_module("crosslevel.training.loop.shards")


def _tree(file: Path) -> dict[str, Any]:
    state = load_tensors(file, mmap=True)
    lacks = PARTS - state.keys() if isinstance(state, dict) else PARTS
    if lacks:
        raise UserError(f"{file} is no checkpoint of a run: it lacks {', '.join(sorted(lacks))}")
    return dict(state)


def _offer(run: Run) -> str:
    """A message about another, intact checkpoint, and how to continue from it."""
    for file in (run.previous, run.best):
        if not file.is_file() or damage_of(file):
            continue
        with suppress(UserError):
            state = _tree(file)
            step = state["global_step"]
            parts_of(run, state, check=True)
            move = f"cp {shlex.quote(str(file))} {shlex.quote(str(run.last))}"
            return (
                f"{file.name} beside it is whole (step {step:,}); to continue from there: {move}, then --resume again"
            )
    return ""


def _also_named(file: Path, name: Path) -> None:
    """A second name (hard link) of ``file``; a copy if the file system has no links."""
    part = name.with_name(f".{name.name}.{os.getpid():08x}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(file, part)
    except OSError:
        with files.replacing(name) as copy, file.open("rb") as opened:
            shutil.copyfileobj(opened, copy)
        return
    os.replace(part, name)
    part.unlink(missing_ok=True)  # if both are links to one file already, POSIX renames nothing
    files.sync_folder(name.parent)
