"""A study's database: its address, and what becomes of a search while it is away."""

import time
from collections import Counter

import pytest
from study_samples import made_up, plan, searched

sqlalchemy = pytest.importorskip("sqlalchemy", reason="needs optuna: pip install 'crosslevel[tune]'")
optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning.plan import url
from crosslevel.tuning.storage import locked_everywhere, patiently
from crosslevel.tuning.study import Search
from crosslevel.tuning.trial import Failed
from crosslevel.tuning.trials import outcome


def test_a_lock_that_was_lost_counts_as_a_database_that_is_away(tmp_path, postgresql):
    told, tries = plan(tmp_path / "s", storage=url(postgresql, tmp_path), silent=1), []

    def call():
        with locked_everywhere(told):
            tries.append(len(tries))
            time.sleep(0 if len(tries) > 1 else 2)
            return len(tries)

    assert patiently(told, call) >= 2
    tries.clear()
    told.stop.set()
    with pytest.raises(ValueError, match="the study cannot be reached"):
        patiently(told, call)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgresql://u:p@h:1/d", "postgresql+psycopg://u:p@h:1/d"),
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql+psycopg://h/d", "postgresql+psycopg://h/d"),
        ("sqlite:////x/y.db", "sqlite:////x/y.db"),
    ],
)
def test_a_databases_address_is_one_that_sqlalchemy_reads(given, expected, tmp_path):
    assert url(given, tmp_path) == expected
    assert url(None, tmp_path) == f"sqlite:///{tmp_path}/study.db"


def test_a_database_that_cannot_be_reached_ends_in_one_line_without_its_password(tmp_path):
    told = plan(tmp_path / "s", storage=url("postgresql://me:secret@127.0.0.1:1/none", tmp_path))
    with pytest.raises(ValueError, match=r"127.0.0.1:1/none: the study cannot be opened: ") as error:
        Search(told)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give an address such as postgresql://"):
        url("somewhere", tmp_path)


def test_a_database_that_is_away_for_a_moment_costs_nothing(tmp_path, monkeypatch):
    """At every call of a search in its turn."""
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("server closed the connection"))
    calls = {"count": 0, "failed": 0}
    for name in ("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_state_values", "get_all_trials"):
        real = getattr(optuna.storages.RDBStorage, name)

        def call(self, *arguments, real=real, **options):
            calls["count"] += 1
            if calls["count"] > 10 and calls["count"] % 11 < 2:
                calls["failed"] += 1
                raise optuna.exceptions.StorageInternalError from away
            return real(self, *arguments, **options)

        monkeypatch.setattr(optuna.storages.RDBStorage, name, call)
    trials = searched(plan(tmp_path / "s", trials=5, budget=100.0, pruning=False, grace=0.3, pause=0.0))
    # A trial that was begun as the line went dead is found to be nobody's.
    assert Counter(outcome(t) for t in trials if outcome(t) != "killed") == {"complete": 5}
    assert calls["failed"] > 5


@pytest.mark.parametrize("lost", ["worker", "began"])
def test_a_trial_that_the_database_lost_before_it_began_is_not_waited_for(tmp_path, monkeypatch, lost):
    """It is still running by the study, and belongs to this process, which is not at it, or to nobody."""
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("server closed the connection"))
    real, seen = optuna.storages.RDBStorage.set_trial_user_attr, []

    def call(self, number, key, value):
        if key == lost:
            seen.append(number)
            if len(seen) == 2:
                raise optuna.exceptions.StorageInternalError from away
        return real(self, number, key, value)

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_user_attr", call)
    trials = searched(plan(tmp_path / "s", pruning=False, sampler="random", budget=3.0, grace=0.3))
    outcomes = [outcome(t) for t in trials]
    assert Counter(outcomes) == {"complete": 3, "killed": 1}
    dropped = trials[outcomes.index("killed")]
    assert sum(t.params == dropped.params for t in trials) == 2  # tried again
    assert dropped.user_attrs["reason"] == "the database was away"


def test_a_killed_trial_is_tried_again_though_the_database_went_away_before_it_was_queued(tmp_path, monkeypatch):
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("server closed the connection"))
    real, failed = optuna.study.Study.enqueue_trial, []

    def call(self, params, user_attrs=None, **options):
        if "again" in (user_attrs or {}) and not failed:
            failed.append(user_attrs["again"])
            raise optuna.exceptions.StorageInternalError from away
        return real(self, params, user_attrs, **options)

    def train(number, parameters):
        if number == 1:
            raise Failed("killed", "the training was killed by signal 9")
        yield from made_up(number, parameters)

    monkeypatch.setattr(optuna.study.Study, "enqueue_trial", call)
    trials = searched(plan(tmp_path / "s", pruning=False, sampler="random", budget=3.0), train)
    assert failed == [1]
    assert Counter(outcome(t) for t in trials) == {"complete": 3, "killed": 1}
    assert [t.params for t in trials if t.user_attrs.get("again") == 1] == [trials[1].params]


def test_the_settings_as_given_are_tried_though_the_database_lost_them_at_once(tmp_path, monkeypatch):
    """Before they were stored, so that there is nothing to try again."""
    away = sqlalchemy.exc.OperationalError("select", {}, Exception("server closed the connection"))
    real, failed = optuna.storages.RDBStorage.get_trial, []

    def call(self, *arguments, **options):
        if not failed:
            failed.append(True)
            raise optuna.exceptions.StorageInternalError from away
        return real(self, *arguments, **options)

    monkeypatch.setattr(optuna.storages.RDBStorage, "get_trial", call)
    told = plan(tmp_path / "s", pruning=False, budget=2.0, grace=0.3)
    trials = searched(told)
    assert [outcome(t) for t in trials] == ["killed", "complete", "complete"]
    assert (trials[0].params, trials[1].params) == ({}, told.start[0])


def test_a_database_that_stays_away_is_named_without_its_password(tmp_path):
    told = plan(tmp_path / "s", storage="postgresql+psycopg://me:secret@host/d")

    def call():
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("no route to host"))

    with pytest.raises(ValueError, match=r"^host/d: the study cannot be reached: .*no route to host") as error:
        patiently(told, call, patience=0.3)
    assert "secret" not in str(error.value)
    with pytest.raises(ZeroDivisionError):
        patiently(told, lambda: 1 / 0)
