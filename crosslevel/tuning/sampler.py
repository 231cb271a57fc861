"""Samples the settings of the next trial, and stops bad trials, consistently for any number of workers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from crosslevel.tuning.plan import Plan
from crosslevel.tuning.search_space import Numbers, Range
from crosslevel.tuning.trials import earlier_equal
from crosslevel.utils.rng import trial_seed

REDUCTION = 3  # successive halving continues one in this many trials


class Fresh(BaseSampler):
    """TPE or random search over one known space; it begins with given points, and avoids repetitions.

    Every trial is drawn from (seed, number): any number of workers draw different trials, and the same ones again.
    Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011.
    """

    def __init__(self, plan: Plan, tries: int = 20) -> None:
        self.plan, self.space, self.tries = plan, distributions(plan.space), tries

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters, from the first trial on."""
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """All parameters' values."""
        trials = study.get_trials(deepcopy=False)
        points = [past.params for past in trials if past.number < trial.number and past.params]
        fixed = next((point for point in self.plan.start if not any(point.items() <= p.items() for p in points)), {})
        if len(points) > 10 * len(self.plan.start):
            fixed = {}  # by now each of them has been tried, whatever the result
        point: dict[str, Any] = {}
        for attempt in range(self.tries):
            point = self._draw(study, trial, trial_seed(self.plan.seed, trial.number, attempt)) | fixed
            if earlier_equal(trials, point, trial.number) is None:
                break
        return point

    def _draw(self, study: optuna.Study, trial: FrozenTrial, seed: int) -> dict[str, Any]:
        by_chance = RandomSampler(seed)
        point = {name: by_chance.sample_independent(study, trial, name, d) for name, d in self.space.items()}
        if self.plan.sampler == "random":
            return point
        with _quiet():
            return point | TPESampler(multivariate=True, constant_liar=True, seed=seed).sample_relative(
                study, trial, self.space
            )

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value; used only for parameters whose given value is out of range."""
        seed = trial_seed(self.plan.seed, trial.number, len(param_name))
        return RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """The ranges as Optuna's distributions."""
    out: dict[str, BaseDistribution] = {}
    for name, searched in space.items():
        if not isinstance(searched, Numbers):
            out[name] = CategoricalDistribution(searched)
        elif searched.integral:
            out[name] = IntDistribution(int(searched.low), int(searched.high), log=searched.log)
        else:
            out[name] = FloatDistribution(searched.low, searched.high, log=searched.log)
    return out


def pruner(epochs: int, enabled: bool) -> BasePruner:
    """Successive halving with rungs at a ninth and a third of all epochs, rounded up.

    Of the trials that reached a rung, the best third goes on; with fewer than three there, the best one does (Li et
    al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020).
    """
    if not enabled:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=-(-epochs // REDUCTION**2), reduction_factor=REDUCTION)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
