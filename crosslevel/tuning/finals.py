"""Selection of the best settings: the best trials are trained once more, as one training's score is partly luck."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from crosslevel.tuning.plan import Plan
from crosslevel.tuning.trials import outcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


REPEATS = "repeats"  # key of the trial that another one repeats with the seed `SEED`
SEED = "seed"


def is_search(trial: FrozenTrial) -> bool:
    """Whether the trial belongs to the search: it has its own settings, and repeats no other trial."""
    return REPEATS not in trial.user_attrs


def finalists(trials: Sequence[FrozenTrial], plan: Plan) -> list[FrozenTrial]:
    """The best ``plan.finalists`` completed trials of the search, and the trial of the settings as given."""
    if not plan.finalists:
        return []
    complete = [trial for trial in trials if is_search(trial) and outcome(trial) == "complete"]
    best = sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[: plan.finalists]
    as_given_trial = as_given(trials, plan)
    return best if as_given_trial is None or as_given_trial in best else [*best, as_given_trial]


def as_given(trials: Sequence[FrozenTrial], plan: Plan) -> FrozenTrial | None:
    """The completed trial of the settings as given: the first trial, or a retry of it."""
    if not (plan.as_given and plan.start):
        return None
    alike = (trial for trial in trials if is_search(trial) and trial.params == plan.start[0])
    return next((trial for trial in alike if outcome(trial) == "complete"), None)


def repeated(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[FrozenTrial]:
    """The trials that repeat this one, without interrupted ones."""
    return [t for t in trials if t.user_attrs.get(REPEATS) == trial.number and outcome(t) != "killed"]


def score(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> float:
    """The mean of the trial's score and of its repetitions'."""
    scores = [t.value for t in repeated(trials, trial) if outcome(t) == "complete" and t.value is not None]
    return mean([trial.value or 0.0, *scores])


def best(trials: Sequence[FrozenTrial], plan: Plan) -> FrozenTrial | None:
    """The trial whose settings win.

    Once all finalists have been trained again, that is the one with the best mean score. Before, and in a search
    without finalists, it is the trial with the best score.
    """
    complete = [trial for trial in trials if is_search(trial) and outcome(trial) == "complete"]
    last = finalists(trials, plan)
    done = [any(repeat.state.is_finished() for repeat in repeated(trials, trial)) for trial in last]
    sure = [t for t in last if any(outcome(repeat) == "complete" for repeat in repeated(trials, t))]
    if sure and all(done):
        return max(sure, key=lambda trial: (score(trials, trial), -trial.number))
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def reserve(plan: Plan) -> int:
    """The number of full trainings reserved for repetitions."""
    return plan.finalists + 1 if plan.finalists else 0
