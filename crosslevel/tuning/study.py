"""The study: gives each worker the next trial, within a budget, and records how every trial ended.

Any number of workers share one study in a database. Each requests a trial, trains, reports after every epoch, and
records how it ended. The trial of a dead worker is marked and tried again by another worker, or by the next call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from crosslevel.tuning import finals
from crosslevel.tuning.plan import Plan
from crosslevel.tuning.sampler import distributions
from crosslevel.tuning.search_space import foreign
from crosslevel.tuning.storage import address, locked, locked_everywhere, locked_file, opened, patiently
from crosslevel.tuning.trial import Failed
from crosslevel.tuning.trials import earlier_equal, outcome, spent
from crosslevel.utils.errors import FolderInUse, UserError, printable

Training = Callable[[int, dict[str, Any]], Iterator[dict[str, Any]]]
"""A trial's number and parameters to the scores after each epoch; raises `Failed`. Closing it stops it."""

SCORE = "combined"
ATTEMPTS = 3  # a trial whose worker died this often may be the cause
COLLAPSED = 1.01  # effective rank of almost equal features
ABANDONED = 5  # failures in a row that end the search, as no setting is the cause then
NOTED = ("collapse", "symptoms")
CUT_OFF = ("its worker died", "stopped", "the database was away")


class Search:
    """One process's part in a study; `work` may run in several threads of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.study = opened(plan)
        self.worker = uuid.uuid4().hex
        self.heartbeats: dict[int, tuple[Any, float]] = {}
        self.running: set[int] = set()  # the trials that this process is training
        with locked(plan.folder / "study.lock"):  # a search for dead workers never finds an unlocked file
            self._refuse_other_study()
            self.alive = locked_file(self.life_sign(self.worker))
            who = f"crosslevel tune (process {os.getpid()} on {socket.gethostname()})"
            self.alive.write(f"{_study_id(plan)} {who}\n")
            self.alive.flush()

    def close(self) -> None:
        """End this process's part in the study, and remove its sign of life."""
        self.life_sign(self.worker).unlink(missing_ok=True)
        self.alive.close()

    def work(self, train: Training, on_end: Callable[[FrozenTrial], None] = lambda trial: None) -> None:
        """Run trial after trial until the budget is spent; ``on_end`` is called with each ended trial.

        Raises:
            ValueError: the first trial, the settings as given, is refused, or trial after trial fails.

        """
        while (trial := self.next_trial()) is not None:
            self._attempt(trial, train)
            self.running.discard(trial.number)
            ended = patiently(self.plan, partial(self._frozen, trial))
            on_end(ended)
            patiently(self.plan, partial(self._give_up, ended))

    def next_trial(self) -> Trial | None:
        """The next trial to train; None if there is none. It waits while other workers may still leave a trial."""
        while not self.plan.stop.is_set():
            with locked(self.plan.folder / "study.lock"):
                trial, wait = patiently(self.plan, self._next_if_room)
                if trial is not None:
                    self.running.add(trial.number)
            if trial is not None or wait is None:
                return trial
            self.plan.stop.wait(wait)
        return None

    def _next_if_room(self) -> tuple[Trial | None, float | None]:
        """A trial to train; or None, and the seconds to wait before the next request (None: do not try again)."""
        with locked_everywhere(self.plan):
            return (None, None) if self.plan.stop.is_set() else self._claim()

    def _claim(self) -> tuple[Trial | None, float | None]:
        self.reclaim()
        trials = self.study.get_trials(deepcopy=False)
        running = any(t.state == TrialState.RUNNING for t in trials)
        wait = min(1.0, self.plan.beat) if running else None
        if not self._is_room(trials) or self._exhausted(trials):
            if any(t.state == TrialState.RUNNING and finals.is_search(t) for t in trials):
                return None, wait
            self._repeat(trials)
            queued = any(t.state == TrialState.WAITING for t in self.study.get_trials(deepcopy=False))
            if not queued or spent(trials, self.plan.epochs) + 1 > self.plan.budget + 1e-9:
                return None, wait
        return self._new_trial(), 0.0

    def _is_room(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether the budget has room for one more full training, if all running ones are completed."""
        search_trials = [t for t in trials if finals.is_search(t)]
        if self.plan.trials is not None:
            started = [
                t for t in search_trials if t.state != TrialState.WAITING and outcome(t) not in ("killed", "repeated")
            ]
            if len(started) >= self.plan.trials:
                return False
        return spent(search_trials, self.plan.epochs) + 1 <= self.plan.budget - finals.reserve(self.plan) + 1e-9

    def _repeat(self, trials: Sequence[FrozenTrial]) -> None:
        """Queue those finalists with another seed that are not queued yet; the search itself is over."""
        for trial in finals.finalists(trials, self.plan):
            if not finals.repeated(trials, trial):
                attributes = {finals.REPEATS: trial.number, finals.SEED: self.plan.seed + 1}
                self.study.enqueue_trial(dict(trial.params), user_attrs=attributes)

    def _new_trial(self) -> Trial | None:
        """A new trial, or one that waits for a retry; None if only repetitions were sampled."""
        trial = self.study.ask(distributions(self.plan.space))
        trial.set_user_attr("worker", self.worker)
        trial.set_user_attr("began", time.time())
        trials = self.study.get_trials(deepcopy=False)
        repeats = trial.user_attrs.get(finals.REPEATS)
        earlier = _same([t for t in trials if t.user_attrs.get(finals.REPEATS) == repeats], trial)
        if earlier is None:
            return trial
        self._end(trial, TrialState.FAIL, "repeated", f"the same settings as trial {earlier.number}")
        return None

    def _exhausted(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether there is nothing new to try: the last trials all repeated others."""
        last = [t for t in trials if finals.is_search(t)][-3:]
        return len(last) == 3 and all(outcome(trial) == "repeated" for trial in last)

    def _attempt(self, trial: Trial, train: Training) -> None:
        start_time = time.monotonic()
        figures: dict[str, Any] = {}
        state, kind, reason = TrialState.FAIL, "failed", "an error in crosslevel tune"
        repeats, seed = (trial.user_attrs.get(name) for name in (finals.REPEATS, finals.SEED))
        parameters = trial.params if repeats is None else {**trial.params, "seed": seed}
        steps, already_finished = train(trial.number, parameters), optuna.exceptions.UpdateFinishedTrialError
        try:
            if strange := foreign(self.plan.space, trial.params):
                raise Failed("refused", strange)
            with contextlib.suppress(already_finished), self._beating(trial), contextlib.closing(steps):  # type: ignore[type-var]
                for epoch, figures in enumerate(steps, 1):
                    if (verdict := patiently(self.plan, partial(self._verdict, trial, epoch, figures))) is not None:
                        state, kind, reason = verdict
                        break
                else:
                    state, kind, reason = patiently(self.plan, partial(self._finished, trial, figures))
        except Failed as error:
            # A divergence is due to bad settings, and the sampler learns from it; other failures are not used.
            state = TrialState.PRUNED if error.kind == "diverged" else TrialState.FAIL
            kind, reason = error.kind, str(error)
        finally:
            if repeats is not None:
                reason = "; ".join([f"trial {repeats} once more, with seed {seed}", *([reason] if reason else [])])
            figures = {name: value for name, value in figures.items() if name not in NOTED}  # in the reason
            attributes = {"seconds": round(time.monotonic() - start_time, 1), "figures": figures}
            with locked(self.plan.folder / "study.lock"):
                patiently(self.plan, lambda: self._finish(trial, state, kind, reason, **attributes))

    def _verdict(self, trial: Trial, epoch: int, figures: dict[str, Any]) -> tuple[TrialState, str, str] | None:
        """The reason to stop a trial after its newest score; None if it continues."""
        trial.report(figures[SCORE], epoch)
        if figures["effective_rank"] < COLLAPSED:
            rank = f"effective rank {figures['effective_rank']:.3f} after epoch {epoch}"
            return TrialState.PRUNED, "collapsed", f"all features are alike: {rank}"
        if figures.get("collapse") and epoch > self.plan.warmup:
            return TrialState.PRUNED, "collapsed", f"epoch {epoch}: {figures['collapse']}"
        search = finals.REPEATS not in trial.user_attrs
        if epoch < self.plan.epochs and search and self.plan.pruning and trial.should_prune():
            return TrialState.PRUNED, "pruned", f"behind the others after epoch {epoch}"
        return None

    def _finished(self, trial: Trial, figures: dict[str, Any]) -> tuple[TrialState, str, str]:
        done = self._frozen(trial).last_step or 0
        if done >= self.plan.epochs:
            # If one branch has collapsed, the features may still be good, and the score decides.
            return TrialState.COMPLETE, "complete", figures.get("symptoms", "")
        return TrialState.FAIL, "failed", f"the training ended after {done} of {self.plan.epochs} epochs"

    def _finish(self, trial: Trial, state: TrialState, kind: str, reason: str, **attributes: Any) -> None:
        """Record how a trial ended, and queue it again if it was interrupted; atomic for other workers."""
        with locked_everywhere(self.plan):
            # The trial was recorded before the database was lost, or this worker was taken for dead: nothing is left to
            # record.
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._end(trial, state, kind, reason, **attributes)
            if kind == "killed":
                self._requeue(self._frozen(trial))

    def _end(self, trial: Trial, state: TrialState, kind: str, reason: str, **attributes: Any) -> None:
        for name, value in {**attributes, "reason": reason, "outcome": kind}.items():
            trial.set_user_attr(name, value)
        values = [self._frozen(trial).intermediate_values[self.plan.epochs]] if state == TrialState.COMPLETE else None
        self.study.tell(trial, values, state, skip_if_finished=True)

    def _requeue(self, trial: FrozenTrial, fault: bool = True) -> None:
        """Queue an interrupted trial for the next worker; only a few times, as the trial may be the cause.

        A trial that is queued or was tried again is not queued twice.
        """
        if any(t.user_attrs.get("again") == trial.number for t in self.study.get_trials(deepcopy=False)):
            return
        attempt = trial.user_attrs.get("attempt", 1) + fault
        if attempt <= ATTEMPTS:
            repeat_of = {
                name: trial.user_attrs[name] for name in (finals.REPEATS, finals.SEED) if name in trial.user_attrs
            }
            attributes = {"attempt": attempt, "again": trial.number, **repeat_of}
            self.study.enqueue_trial(dict(trial.params), user_attrs=attributes)

    def _give_up(self, ended: FrozenTrial) -> None:
        if ended.number == 0 and outcome(ended) == "refused":
            raise UserError(ended.user_attrs["reason"])
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished() and outcome(t) != "repeated"]
        last = [(outcome(t), t.user_attrs.get("reason")) for t in done[-ABANDONED:]]
        bad = [kind in ("failed", "refused") or (kind == "killed" and reason not in CUT_OFF) for kind, reason in last]
        if len(bad) == ABANDONED and all(bad):
            raise UserError(f"{ABANDONED} trials in a row failed, the last one: {ended.user_attrs.get('reason')}")

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return next(t for t in self.study.get_trials(deepcopy=False) if t.number == trial.number)

    def reclaim(self) -> None:
        """Mark the trials whose worker is dead, and queue them again; the caller must hold the study's locks."""
        abandoned = [sign for sign in (self.plan.folder / "workers").glob("*.lock") if _is_free(sign)]
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get("worker")
            if owner in (self.worker, None):
                # The trial was requested, and the database was lost before it began.
                if trial.number not in self.running:
                    self._cut_off(trial, CUT_OFF[2])
            elif self._is_dead(trial, owner):
                self._cut_off(trial, CUT_OFF[0])
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if outcome(trial) == "killed" and trial.params:  # and the database may have been lost before it was queued
                self._requeue(trial, fault=trial.user_attrs.get("reason") not in CUT_OFF[1:])
        for sign in abandoned:  # files of workers that died, during a trial or between two
            for file in (sign, sign.with_suffix(".yaml")):
                file.unlink(missing_ok=True)

    def abandon(self) -> None:
        """After Ctrl-C: mark the trials that this process was training, so that the next call takes them up."""
        self.plan.stop.set()
        # If the database is unreachable, the trial will be found as a dead worker's later.
        away = contextlib.suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError)
        with away, locked(self.plan.folder / "study.lock"), locked_everywhere(self.plan):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("worker") == self.worker:
                    self._cut_off(trial, CUT_OFF[1])

    def _cut_off(self, trial: FrozenTrial, reason: str) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            storage = self.study._storage
            storage.set_trial_user_attr(trial._trial_id, "outcome", "killed")
            storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            # A trial without parameters cannot be tried again: it was lost while it was requested.
            if storage.set_trial_state_values(trial._trial_id, TrialState.FAIL) and trial.params:
                self._requeue(trial, fault=reason == CUT_OFF[0])

    def _is_dead(self, trial: FrozenTrial, owner: str) -> bool:
        """Whether a worker is dead: on this machine if its lock is free, elsewhere if it gives no sign of life."""
        if self.life_sign(owner).exists():
            return _is_free(self.life_sign(owner))
        sign, now = (trial.user_attrs.get("alive"), trial.last_step), time.monotonic()
        if self.heartbeats.get(trial.number, (None, 0.0))[0] != sign:
            self.heartbeats[trial.number] = (sign, now)
        return now - self.heartbeats[trial.number][1] > self.plan.grace

    @contextlib.contextmanager
    def _beating(self, trial: Trial) -> Iterator[None]:
        """While the block runs, write signs of life into the study, for workers on other machines."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.plan.beat):
                # If the database is busy or unreachable for a moment, the next beat tries again.
                with contextlib.suppress(SQLAlchemyError, optuna.exceptions.OptunaError):
                    trial.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _refuse_other_study(self) -> None:
        """Refuse a folder that is in use by another study, whose workers would overwrite its trials.

        Raises:
            FolderInUse: a worker of another database uses the folder.

        """
        for sign in (self.plan.folder / "workers").glob("*.lock"):
            study, _, who = sign.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
            if who and study != _study_id(self.plan) and not _is_free(sign):
                raise FolderInUse(
                    f"{self.plan.folder} is in use by {printable(who)}, with another --storage: wait until it has "
                    "ended, or give another --output"
                )

    def life_sign(self, worker: str) -> Path:
        """The file that a worker locks while it lives."""
        return self.plan.folder / "workers" / f"{worker}.lock"


def _study_id(plan: Plan) -> str:
    """The identity of the study, without a password."""
    return hashlib.sha256(address(plan).encode()).hexdigest()[:16]


def _is_free(sign: Path) -> bool:
    """Whether the worker of this file has ended; the system then frees its lock."""
    try:
        locked_file(sign).close()
    except BlockingIOError:
        return False
    return True


def _same(trials: Sequence[FrozenTrial], trial: Trial) -> FrozenTrial | None:
    return earlier_equal(trials, trial.params, trial.number)
