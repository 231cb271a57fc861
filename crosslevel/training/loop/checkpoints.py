"""Checkpoints: what is written is read back before it counts, and what is read is checked before it is used."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from crosslevel.runs import Run
from crosslevel.utils import files
from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.tensors import damage_of, load_tensors, save_to

PARTS = {"state_dict", "optimizer_states", "callbacks", "epoch", "global_step"}
"""Of a checkpoint's tree; ``callbacks`` has the best epoch so far, under the name that former versions gave it."""

COUNT = "Checkpoints"
_NOTHING = "no checkpoint beside it is whole: start the run anew"


class BestEpoch:
    """The mean loss of the epoch that is under way, and the lowest one of those before."""

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        self.lowest, self.total, self.count = (
            (float("inf"), torch.zeros(()), 0)
            if state is None
            else (float(state["best"]), torch.tensor(float(state["sum"])), int(state["count"]))
        )

    def add(self, loss: Tensor) -> None:
        """Count one step's loss; nothing waits for the device."""
        self.total = self.total.to(loss.device) + loss
        self.count += 1

    def end(self) -> bool:
        """End the epoch; whether it is the best so far."""
        mean = float(self.total) / self.count
        best = mean < self.lowest
        self.lowest, self.total, self.count = min(mean, self.lowest), torch.zeros(()), 0
        return best

    def state(self) -> dict[str, float]:
        """What a continued run needs."""
        return {"best": self.lowest, "sum": float(self.total), "count": self.count}


def write(run: Run, state: dict[str, Any], best: bool) -> None:
    """Put ``state`` in the place of ``last.ckpt``, whose content becomes ``previous.ckpt``.

    The new file is synced and read back before it takes the old one's place: a kill, a full disk or a cut of power
    leaves one of the two, whole.

    Raises:
        MachineError: it cannot be written, or not read back as it was written; ``last.ckpt`` is as it was.

    """
    with files.replacing(run.last) as file:
        _save(state, file, run.last)
        if run.last.exists():
            _also_named(run.last, run.previous)
    if best:
        _also_named(run.last, run.best)


def _save(state: dict[str, Any], file: BinaryIO, name: Path) -> None:
    save_to(file, state, name)
    damage = damage_of(file)
    if damage:
        raise MachineError(f"{name}: what was written is not what is read back ({damage}): check the disk")


def read(run: Run) -> dict[str, Any]:
    """The tree of ``last.ckpt``, of tensors and plain values.

    Raises:
        UserError: it is missing, damaged or no checkpoint; the line names a whole one beside it, if there is one.

    """
    if not run.last.is_file():
        hint = _offer(run) or "there is nothing to resume; start the run anew"
        raise UserError(f"{run.last} does not exist: {hint}")
    damage = damage_of(run.last)
    try:
        state = _tree(run.last)
    except ValueError as error:
        raise UserError(f"{error}; {_offer(run) or _NOTHING}") from error
    if damage:
        raise UserError(f"{run.last} is {damage}; {_offer(run) or _NOTHING}")
    return state


def _tree(file: Path) -> dict[str, Any]:
    state = load_tensors(file, mmap=True)
    lacks = PARTS - state.keys() if isinstance(state, dict) else PARTS
    if lacks:
        raise UserError(f"{file} is no checkpoint of a run: it lacks {', '.join(sorted(lacks))}")
    return dict(state)


def _offer(run: Run) -> str:
    """Which other checkpoint is whole, and how to go on from it."""
    for file in (run.previous, run.best):
        if not file.is_file() or damage_of(file):
            continue
        with suppress(UserError):
            step = _tree(file)["global_step"]
            move = f"cp {shlex.quote(str(file))} {shlex.quote(str(run.last))}"
            return f"{file.name} beside it is whole (step {step:,}); to go on from there: {move}, then --resume again"
    return ""


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load ``state`` into ``module``.

    Raises:
        UserError: it is of other parts, or of other sizes; the message names the first.

    """
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        theirs, mine = (list(tree[name].shape) if name in tree else "missing" for tree in (state, own))
        if theirs != mine:
            raise UserError(
                f"{file} does not fit: {name} is {theirs} in it and {mine} here: it was begun with other images or "
                "settings; take those again, or start a new run"
            )
    module.load_state_dict(state)


def _also_named(file: Path, name: Path) -> None:
    """Another name for what ``file`` is now; a copy where the file system has no second names."""
    part = name.with_name(f".{name.name}.{os.getpid():08x}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(file, part)
    except OSError:
        with files.replacing(name) as copy, file.open("rb") as opened:
            shutil.copyfileobj(opened, copy)
        return
    os.replace(part, name)
    part.unlink(missing_ok=True)  # where both are names of one file already, POSIX renames nothing
    files.sync_folder(name.parent)
