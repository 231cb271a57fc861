"""The study: what is tried next, by whichever worker asks, within a budget; and what became of every trial.

Any number of workers share one study in a database. Each asks for a trial, trains, reports after every epoch, and
tells how it ended. A worker that dies leaves a trial that another one, or the next call, marks and tries again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from crosslevel.tune.ranges import Numbers, Range, matches
from crosslevel.tune.trial import Failed

Sampler = Literal["tpe", "random"]
Training = Callable[[int, dict[str, Any]], Iterator[dict[str, Any]]]
"""A trial's number and parameters to the scores after each epoch; raises `Failed`. Closing it stops it."""

SCORE = "combined"
BEAT, GRACE = 20.0, 120.0  # seconds between signs of life, and without one until a worker counts as dead
ATTEMPTS = 3  # a trial whose worker died as often may be what kills it
REDUCTION = 3  # successive halving goes on with one in so many
COLLAPSED = 1.01  # effective rank: features that are all but equal
ABANDONED = 5  # failures in a row that end the search: no setting is the cause
CUT_OFF = ("its worker died", "stopped")


@dataclass
class Plan:
    """What all workers of a study agree on, and where they work."""

    folder: Path
    storage: str
    space: dict[str, Range]
    start: list[dict[str, Any]]
    epochs: int
    budget: float
    trials: int | None
    sampler: Sampler
    pruning: bool
    seed: int
    agreed: dict[str, Any]
    stop: threading.Event = field(default_factory=threading.Event)
    beat: float = BEAT
    grace: float = GRACE


class Search:
    """One process's part in a study; `work` may run in several threads of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.study = _opened(plan)
        self.worker = uuid.uuid4().hex
        self.seen: dict[int, tuple[Any, float]] = {}
        self.alive = _locked_file(self._sign(self.worker))

    def close(self) -> None:
        """This process is done: nothing of it can be left behind."""
        self._sign(self.worker).unlink(missing_ok=True)
        self.alive.close()

    def work(self, train: Training, told: Callable[[FrozenTrial], None] = lambda trial: None) -> None:
        """Take trial after trial until the budget is spent; ``told`` gets each that has ended.

        Raises:
            ValueError: the first trial, the settings as given, is refused, or trial after trial fails.

        """
        while (trial := self._next()) is not None:
            self._attempt(trial, train)
            ended = self._frozen(trial)
            told(ended)
            self._give_up(ended)

    def _next(self) -> Trial | None:
        """The next trial to train, or None when there is none; waits where that hangs on what others still do."""
        while not self.plan.stop.is_set():
            with _locked(self.plan.folder / "study.lock"):
                self._reclaim()
                trials = self.study.get_trials(deepcopy=False)
                if not self._is_room(trials):
                    if not any(trial.state == TrialState.RUNNING for trial in trials):
                        return None
                elif (trial := self._asked()) is not None:
                    return trial
                elif self._exhausted():
                    return None
                else:
                    continue
            self.plan.stop.wait(min(1.0, self.plan.beat))
        return None

    def _is_room(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether one more full training keeps within the budget, when all that run come to their end."""
        if self.plan.trials is not None:
            tried = [t for t in trials if t.state != TrialState.WAITING and outcome(t) not in ("killed", "repeated")]
            if len(tried) >= self.plan.trials:
                return False
        return spent(trials, self.plan.epochs) + 1 <= self.plan.budget + 1e-9

    def _asked(self) -> Trial | None:
        """A new trial, or one that waits to be tried again; None if all that came is what was tried before."""
        trial = self.study.ask(distributions(self.plan.space))
        trial.set_user_attr("worker", self.worker)
        trial.set_user_attr("began", time.time())
        twin = _same(self.study.get_trials(deepcopy=False), trial)
        if twin is None:
            return trial
        self._end(trial, TrialState.PRUNED, "repeated", f"the same settings as trial {twin.number}")
        return None

    def _exhausted(self) -> bool:
        """Whether there is nothing new to try: the last trials all repeated others."""
        last = self.study.get_trials(deepcopy=False)[-3:]
        return len(last) == 3 and all(outcome(trial) == "repeated" for trial in last)

    def _attempt(self, trial: Trial, train: Training) -> None:
        began = time.monotonic()
        figures: dict[str, Any] = {}
        state, kind, reason = TrialState.FAIL, "failed", "an error in crosslevel tune"
        steps, taken = train(trial.number, trial.params), optuna.exceptions.UpdateFinishedTrialError
        try:
            with contextlib.suppress(taken), self._beating(trial), contextlib.closing(steps):  # type: ignore[type-var]
                for epoch, figures in enumerate(steps, 1):
                    trial.report(figures[SCORE], epoch)
                    if (verdict := self._verdict(trial, epoch, figures)) is not None:
                        state, kind, reason = verdict
                        break
                else:
                    state, kind, reason = self._whole(trial)
        except Failed as error:
            # What diverged is a bad setting, and the sampler learns from it; what failed otherwise says nothing.
            state = TrialState.PRUNED if error.kind == "diverged" else TrialState.FAIL
            kind, reason = error.kind, str(error)
        finally:
            # Taken from us as dead, or ended by Ctrl-C, it is no longer ours to tell of.
            with contextlib.suppress(taken):
                trial.set_user_attr("seconds", round(time.monotonic() - began, 1))
                trial.set_user_attr("figures", figures)
                self._end(trial, state, kind, reason)
                if kind == "killed":
                    self._again(self._frozen(trial))

    def _verdict(self, trial: Trial, epoch: int, figures: dict[str, Any]) -> tuple[TrialState, str, str] | None:
        """Why the trial ends here, or None."""
        if figures["effective_rank"] < COLLAPSED:
            rank = f"effective rank {figures['effective_rank']:.3f} after epoch {epoch}"
            return TrialState.PRUNED, "collapsed", f"all features are alike: {rank}"
        if epoch < self.plan.epochs and self.plan.pruning and trial.should_prune():
            return TrialState.PRUNED, "pruned", f"behind the others after epoch {epoch}"
        return None

    def _whole(self, trial: Trial) -> tuple[TrialState, str, str]:
        done = self._frozen(trial).last_step or 0
        if done >= self.plan.epochs:
            return TrialState.COMPLETE, "complete", ""
        return TrialState.FAIL, "failed", f"the training ended after {done} of {self.plan.epochs} epochs"

    def _end(self, trial: Trial, state: TrialState, kind: str, reason: str) -> None:
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("outcome", kind)
        values = [self._frozen(trial).intermediate_values[self.plan.epochs]] if state == TrialState.COMPLETE else None
        self.study.tell(trial, values, state, skip_if_finished=True)

    def _again(self, trial: FrozenTrial) -> None:
        """Queue a trial that was cut off, for whichever worker asks next; not for ever."""
        attempt = trial.user_attrs.get("attempt", 1)
        if attempt < ATTEMPTS:
            about = {"attempt": attempt + 1, "again": trial.number}
            self.study.enqueue_trial(dict(trial.params), user_attrs=about)

    def _give_up(self, ended: FrozenTrial) -> None:
        if ended.number == 0 and outcome(ended) == "refused":
            raise ValueError(ended.user_attrs["reason"])
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished() and outcome(t) != "repeated"]
        last = [(outcome(t), t.user_attrs.get("reason")) for t in done[-ABANDONED:]]
        bad = [kind in ("failed", "refused") or (kind == "killed" and why not in CUT_OFF) for kind, why in last]
        if len(bad) == ABANDONED and all(bad):
            raise ValueError(f"{ABANDONED} trials in a row failed, the last one: {ended.user_attrs.get('reason')}")

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return next(t for t in self.study.get_trials(deepcopy=False) if t.number == trial.number)

    def _reclaim(self) -> None:
        """Mark the trials whose worker is dead, and queue them again; the caller holds the study's lock."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get("worker")
            if owner != self.worker and self._is_dead(trial, owner):
                self._cut_off(trial, CUT_OFF[0])

    def abandon(self) -> None:
        """Ctrl-C: what this process was at is marked, and waits for the next call."""
        self.plan.stop.set()
        with _locked(self.plan.folder / "study.lock"):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("worker") == self.worker:
                    self._cut_off(trial, CUT_OFF[1])

    def _cut_off(self, trial: FrozenTrial, reason: str) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            storage = self.study._storage
            storage.set_trial_user_attr(trial._trial_id, "outcome", "killed")
            storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            if storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                self._again(trial)

    def _is_dead(self, trial: FrozenTrial, owner: str | None) -> bool:
        """By its lock, which the system frees, where the worker shares this folder; elsewhere by its silence."""
        if owner is not None and self._sign(owner).exists():
            try:
                _locked_file(self._sign(owner)).close()
            except BlockingIOError:
                return False
            return True
        sign, now = (trial.user_attrs.get("alive"), trial.last_step), time.monotonic()
        if self.seen.get(trial.number, (None, 0.0))[0] != sign:
            self.seen[trial.number] = (sign, now)
        return now - self.seen[trial.number][1] > self.plan.grace

    @contextlib.contextmanager
    def _beating(self, trial: Trial) -> Iterator[None]:
        """Signs of life in the study, for those who cannot see this process."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.plan.beat):
                # A database that is busy or away for a moment is asked again at the next beat.
                with contextlib.suppress(SQLAlchemyError, optuna.exceptions.OptunaError):
                    trial.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _sign(self, worker: str) -> Path:
        return self.plan.folder / "workers" / f"{worker}.lock"


class Fresh(BaseSampler):
    """TPE or random search over one known space, from given points on, that avoids what was tried.

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
        others = study.get_trials(deepcopy=False)
        place = sum("again" not in other.user_attrs for other in others if other.number < trial.number)
        given = self.plan.start[place] if place < len(self.plan.start) else {}
        point: dict[str, Any] = {}
        for attempt in range(self.tries):
            point = self._draw(study, trial, hash_of(self.plan.seed, trial.number, attempt)) | given
            if twin(others, point, trial.number) is None:
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
        """By chance; nothing is drawn alone but what the given points had out of range."""
        seed = hash_of(self.plan.seed, trial.number, len(param_name))
        return RandomSampler(seed).sample_independent(study, trial, param_name, param_distribution)


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """The ranges as Optuna has them."""
    out: dict[str, BaseDistribution] = {}
    for name, searched in space.items():
        if not isinstance(searched, Numbers):
            out[name] = CategoricalDistribution(searched)
        elif searched.whole:
            out[name] = IntDistribution(int(searched.low), int(searched.high), log=searched.log)
        else:
            out[name] = FloatDistribution(searched.low, searched.high, log=searched.log)
    return out


def within(space: Mapping[str, Range], point: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``point`` what lies in the space, as the study keeps it: a choice as it is written."""
    out: dict[str, Any] = {}
    for name, value in point.items():
        searched = space.get(name)
        if isinstance(searched, Numbers):
            if value in searched:
                out[name] = int(value) if searched.whole else float(value)
        elif (choice := next((c for c in searched or () if matches(c, value)), None)) is not None:
            out[name] = choice
    return out


def outcome(trial: FrozenTrial) -> str:
    """How a trial ended: complete, pruned, collapsed, diverged, refused, failed, killed, repeated; or running."""
    if not trial.state.is_finished():
        return trial.state.name.lower()
    return str(trial.user_attrs.get("outcome", "failed"))


def cost(trial: FrozenTrial, epochs: int) -> float:
    """The share of a full training that a trial took; of one that runs, a whole one."""
    if trial.state == TrialState.WAITING:
        return 0.0
    return 1.0 if trial.state == TrialState.RUNNING else (trial.last_step or 0) / epochs


def spent(trials: Sequence[FrozenTrial], epochs: int) -> float:
    """All that was trained, and all that will be by what runs, in full trainings."""
    return sum(cost(trial, epochs) for trial in trials)


def twin(trials: Sequence[FrozenTrial], point: Mapping[str, Any], number: int) -> FrozenTrial | None:
    """An earlier trial of the same settings that has ended well or badly, or runs; not one that was cut off."""
    alike = (t for t in trials if t.number < number and t.params == point)
    return next((t for t in alike if outcome(t) not in ("killed", "waiting", "repeated")), None)


def _same(trials: Sequence[FrozenTrial], trial: Trial) -> FrozenTrial | None:
    return twin(trials, trial.params, trial.number)


def pruner(epochs: int, wanted: bool) -> BasePruner:
    """Successive halving with rungs at a ninth and a third of all epochs, rounded up.

    Of the trials that reached a rung, the best third goes on; with fewer than three there, the best one does (Li et
    al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020).
    """
    if not wanted:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=-(-epochs // REDUCTION**2), reduction_factor=REDUCTION)


def hash_of(*numbers: int) -> int:
    """A seed of 32 bits that differs between neighbours."""
    mixed = 0x9E3779B9
    for number in numbers:
        mixed = (mixed ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed & 0xFFFFFFFF


def url(storage: str | None, folder: Path) -> str:
    """The database's address as SQLAlchemy wants it: a file in the folder, or PostgreSQL by psycopg."""
    if storage is None:
        return f"sqlite:///{(folder / 'study.db').resolve()}"
    scheme, mark, rest = storage.partition("://")
    if not mark:
        raise ValueError(f"--storage {storage}: give an address such as postgresql://user:password@host/database")
    return f"postgresql+psycopg://{rest}" if scheme in ("postgresql", "postgres") else storage


def _opened(plan: Plan, tries: int = 8) -> optuna.Study:
    """The study, made by whichever worker comes first.

    Raises:
        ValueError: there is one of other settings, or the database cannot be reached.

    """
    (plan.folder / "workers").mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for attempt in range(tries):
        try:
            with _locked(plan.folder / "study.lock"):
                return _made(plan)
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            # Workers on other machines that make the same tables at the same time get in each other's way.
            if attempt == tries - 1:
                reason = " ".join(str(error.__cause__ or error).split())
                raise ValueError(f"{plan.storage.rpartition('@')[2]}: the study cannot be opened: {reason}") from error
            time.sleep(0.1 * (attempt + 1))
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is missing: pip install 'crosslevel[tune]'") from error
    raise AssertionError("unreachable")


def _made(plan: Plan) -> optuna.Study:
    name = plan.folder.name
    own = {"connect_args": {"timeout": 60, "factory": _File}}
    options = own if plan.storage.startswith("sqlite") else {"pool_pre_ping": True}
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(plan.storage, engine_kwargs=options),
        study_name=name, direction="maximize", load_if_exists=True,
        sampler=Fresh(plan), pruner=pruner(plan.epochs, plan.pruning),
    )  # fmt: skip
    before = study.user_attrs.get("agreed")
    if before is None:
        study.set_user_attr("agreed", plan.agreed)
    elif before != json.loads(json.dumps(plan.agreed)):
        names = [k for k in sorted({*before, *plan.agreed}) if before.get(k) != plan.agreed.get(k)]
        told = ", ".join(f"{k}={before.get(k)}, not {plan.agreed.get(k)}" for k in names)
        raise ValueError(f"{plan.folder}: its study began with other settings: {told}: give another --output")
    return study


class _File(sqlite3.Connection):
    """A database that waits for the disk at times, not at every figure: a kill loses nothing, a power cut little."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among this machine's workers, threads included."""
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _locked_file(file: Path) -> Any:
    """The file, locked for as long as this process lives; BlockingIOError if another's is."""
    opened = file.open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.close()
        raise
    os.set_inheritable(opened.fileno(), False)
    return opened


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
