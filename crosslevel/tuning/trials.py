"""Trials of the study: how each ended, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended: complete, pruned, collapsed, diverged, refused, failed, killed, repeated; or running."""
    if not trial.state.is_finished():
        return trial.state.name.lower()
    return str(trial.user_attrs.get("outcome", "failed"))


def cost(trial: FrozenTrial, epochs: int) -> float:
    """The share of a full training that a trial took; 1 for one that runs.

    0 for a killed trial, since its retry counts. The epoch in which a training diverged counts too.
    """
    if outcome(trial) in ("waiting", "killed"):
        return 0.0
    done = (trial.last_step or 0) + (outcome(trial) == "diverged")
    return 1.0 if trial.state.name == "RUNNING" else min(1.0, done / epochs)


def spent(trials: Sequence[FrozenTrial], epochs: int) -> float:
    """The cost of all trials in full trainings, with running trials counted as complete."""
    return sum(cost(trial, epochs) for trial in trials)


def earlier_equal(trials: Sequence[FrozenTrial], point: Mapping[str, Any], number: int) -> FrozenTrial | None:
    """An earlier trial of the same settings that has ended or still runs; not one that was interrupted."""
    alike = (t for t in trials if t.number < number and t.params == point)
    return next((t for t in alike if outcome(t) not in ("killed", "waiting", "repeated")), None)
