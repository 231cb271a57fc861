"""A study: budget, pruning, workers that share it, and what becomes of trials that fail or are killed.

The trainings here are made up; `test_tune` has real ones.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import pytest

sqlalchemy = pytest.importorskip("sqlalchemy", reason="needs optuna: pip install 'crosslevel[tune]'")
optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning import finals
from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.sampler import pruner
from crosslevel.tuning.search_space import Numbers, clipped, outside
from crosslevel.tuning.storage import locked_everywhere, patiently
from crosslevel.tuning.study import Search
from crosslevel.tuning.trial import Failed
from crosslevel.tuning.trials import cost, outcome, spent

EPOCHS = 3
FORK = multiprocessing.get_context("fork")
SPACE = {"lr": Numbers(1e-3, 1.0, log=True), "cld.groups": Numbers(2, 64, log=True, whole=True)}


def plan(folder, **changed):
    folder.mkdir(exist_ok=True)
    usual = {
        "folder": folder, "storage": url(None, folder), "space": SPACE, "start": [{"lr": 0.9, "cld.groups": 4}],
        "epochs": EPOCHS, "budget": 6.0, "trials": None, "sampler": "tpe", "pruning": True, "seed": 0,
        "agreed": {"batch_size": 64}, "beat": 0.05, "grace": 60.0,
    }  # fmt: skip
    return Plan(**usual | changed)


def quality(parameters):
    return 1 - abs(parameters["lr"] - 0.1) - abs(parameters["cld.groups"] - 30) / 100


def figures(score, rank=5.0):
    return {"combined": score, "effective_rank": rank}


def made_up(number, parameters):
    for epoch in range(1, EPOCHS + 1):
        yield figures(quality(parameters) * epoch / EPOCHS)


def searched(changed, train=made_up):
    search = Search(changed)
    try:
        search.work(train)
        return search.study.get_trials()
    finally:
        search.close()


def test_a_search_finds_better_settings_than_the_given_ones_within_its_budget(tmp_path):
    told = plan(tmp_path / "s", budget=6.0)
    trials = searched(told)
    assert trials[0].params == told.start[0]
    assert outcome(trials[0]) == "complete"
    best = max((t for t in trials if outcome(t) == "complete"), key=lambda t: t.value)
    assert best.value > trials[0].value + 0.2
    assert 5 < spent(trials, EPOCHS) <= 6
    assert sum(cost(t, EPOCHS) for t in trials if outcome(t) == "pruned") > 0
    assert len(trials) > 6
    assert len({json.dumps(t.params) for t in trials}) == len(trials)


def test_without_pruning_every_trial_costs_a_full_training(tmp_path):
    trials = searched(plan(tmp_path / "s", pruning=False, sampler="random", budget=3.0))
    assert [outcome(t) for t in trials] == ["complete"] * 3
    for _ in range(2):
        assert len(searched(plan(tmp_path / "t", trials=2, budget=float("inf")))) == 2


def test_a_search_continues_where_it_stopped_and_is_repeatable(tmp_path):
    whole = searched(plan(tmp_path / "whole", trials=11, budget=50.0))
    searched(plan(tmp_path / "parts", trials=3, budget=50.0))
    parts = searched(plan(tmp_path / "parts", trials=11, budget=50.0))
    assert [t.params for t in parts] == [t.params for t in whole]
    other = searched(plan(tmp_path / "other", trials=2, seed=1))
    assert other[1].params != whole[1].params


@pytest.mark.parametrize("epochs", [1, 2, 4, 9, 10, 27, 100])
def test_successive_halving_keeps_the_best_third_of_each_rung(epochs):
    """Against the rule written out by hand, on random scores."""
    draws = random.Random(epochs)
    study = optuna.create_study(direction="maximize", pruner=pruner(epochs, True))
    rungs = [r for r in (-(-epochs // 9), 3 * -(-epochs // 9)) if r < epochs]
    at = {rung: [] for rung in rungs}
    for _ in range(12):
        trial, alive = study.ask(), True
        for epoch in range(1, epochs):
            score = draws.random()
            trial.report(score, epoch)
            if epoch in at:
                at[epoch].append(score)
                alive = score in sorted(at[epoch])[-max(1, len(at[epoch]) // 3) :]
            assert trial.should_prune() == (not alive)
            if not alive:
                break
        study.tell(trial, score if alive and epochs > 1 else 0.5)
    assert not pruner(epochs, False).prune(study, study.trials[-1])


def shared(told, out, barrier):
    barrier.wait()

    def train(number, parameters):
        with open(out, "a") as file:
            file.write(json.dumps([number, os.getpid()]) + "\n")
        for told in made_up(number, parameters):
            time.sleep(0.05)
            yield told

    searched(told, train)


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "postgresql from two machines"])
def test_two_workers_at_once_make_one_study_and_do_no_trial_twice(tmp_path, database, request):
    out, machines = tmp_path / "trained", [tmp_path / "here"] * 2
    address = request.getfixturevalue("postgresql") if database != "sqlite" else None
    if "two machines" in database:
        machines[1] = tmp_path / "there"  # no lock of the one is seen by the other
    name = "t" if "two machines" in database else "s"
    for machine in machines:
        machine.mkdir(exist_ok=True)
    plans = [plan(machine / name, budget=5.0, storage=url(address, machine / name)) for machine in machines]
    told, barrier = plans[0], FORK.Barrier(2)
    workers = [FORK.Process(target=shared, args=(own, out, barrier)) for own in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    done = [json.loads(line) for line in out.read_text().splitlines()]
    numbers = [number for number, _ in done]
    assert len({pid for _, pid in done}) == 2
    study = optuna.load_study(study_name=name, storage=told.storage)
    repeated = [t.number for t in study.trials if outcome(t) == "repeated"]
    assert sorted(numbers) == list(range(len(study.trials)))
    assert len({json.dumps(study.trials[number].params) for number in numbers}) == len(numbers)
    assert not repeated
    assert spent(study.trials, EPOCHS) <= 5
    assert not any(t.state == optuna.trial.TrialState.RUNNING for t in study.trials)


def held(told, begun, has_it):
    begun.set()
    with locked_everywhere(told):
        has_it.set()
        time.sleep(600)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_machines_that_share_a_database_wait_for_each_other_but_not_for_one_that_is_gone(
    tmp_path, monkeypatch, postgresql, fate
):
    """Dead, or cut off from the network: silent, with its connection still open."""

    def on(machine, name):
        (tmp_path / machine).mkdir(exist_ok=True)
        return plan(tmp_path / machine / name, storage=url(postgresql, tmp_path))

    monkeypatch.setattr("crosslevel.tuning.storage.SILENT", 60 if fate == signal.SIGKILL else 15)
    begun, has_it, waits, passed = (FORK.Event() for _ in range(4))
    holder = FORK.Process(target=held, args=(on("here", "lock"), begun, has_it), daemon=True)
    waiter = FORK.Process(target=held, args=(on("there", "lock"), waits, passed), daemon=True)
    try:
        holder.start()
        assert has_it.wait(120)
        waiter.start()
        assert waits.wait(120)
        with locked_everywhere(on("there", "another study")):
            assert not passed.wait(1)
        os.kill(holder.pid, fate)
        assert passed.wait(120)
    finally:
        for process in (holder, waiter):
            process.kill()


def test_a_lock_that_was_lost_counts_as_a_database_that_is_away(tmp_path, monkeypatch, postgresql):
    monkeypatch.setattr("crosslevel.tuning.storage.SILENT", 1)
    told, tries = plan(tmp_path / "s", storage=url(postgresql, tmp_path)), []

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


def lucky(number, parameters):
    """The first training of trial 2 was luck; the seed of a repetition has none."""
    for told in made_up(number, parameters):
        yield figures(told["combined"] + (number == 2 and "seed" not in parameters))


@pytest.mark.parametrize("database", ["sqlite", "postgresql from two machines"])
def test_the_best_and_the_settings_as_given_are_trained_once_more_and_the_mean_decides(tmp_path, database, request):
    address = request.getfixturevalue("postgresql") if database != "sqlite" else None
    machines = [tmp_path / name / "finals" for name in ("here", "there")][: 1 if address is None else 2]
    plans = []
    for folder in machines:
        folder.parent.mkdir()
        place = url(address, folder)
        plans.append(plan(folder, budget=9.0, finalists=2, pruning=False, sampler="random", storage=place))
    workers = [FORK.Process(target=searched, args=(told, lucky)) for told in plans]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    trials = searched(plans[0], lucky)  # which finds nothing left to do
    search = [t for t in trials if finals.is_search(t) and outcome(t) == "complete"]
    again = {t.user_attrs["repeats"]: t for t in trials if not finals.is_search(t) and outcome(t) == "complete"}
    assert len(trials) == len(search) + len(again)
    assert set(again) == {t.number for t in finals.finalists(trials, plans[0])}
    assert {0, 2} <= set(again)
    assert len(again) == 3
    assert all(t.params == trials[number].params and t.user_attrs["seed"] == 1 for number, t in again.items())
    assert again[2].user_attrs["reason"] == "trial 2 once more, with seed 1"
    assert spent([*search, *again.values()], EPOCHS) <= 9
    means = {number: (trials[number].value + t.value) / 2 for number, t in again.items()}
    assert finals.best(trials, plans[0]).number == max(means, key=means.get)
    assert finals.score(trials, trials[2]) == pytest.approx(means[2])
    assert max(search, key=lambda t: t.value).number == 2
    # Until all are repeated one score decides, and without finalists as well.
    part = [t for t in trials if t.number != max(t.number for t in again.values())]
    assert finals.best(part, plans[0]).number == 2
    assert finals.best(trials, plan(machines[0])).number == 2
    # With a larger budget the search goes on, and new finalists are repeated.
    more = searched(dataclasses.replace(plans[0], budget=12.0))
    assert len([t for t in more if finals.is_search(t) and outcome(t) == "complete"]) >= 9
    assert spent([t for t in more if outcome(t) == "complete"], EPOCHS) <= 12


def test_a_repetition_that_is_killed_is_repeated(tmp_path):
    options = {"budget": 8.0, "finalists": 1, "pruning": False}
    search = Search(plan(tmp_path / "s", **options))

    def train(number, parameters):
        for told in made_up(number, parameters):
            if "seed" in parameters:
                search.abandon()
            yield told

    search.work(train)
    search.close()
    trials = searched(plan(tmp_path / "s", **options))
    [killed] = [t for t in trials if outcome(t) == "killed"]
    assert killed.user_attrs["repeats"] in {t.user_attrs["repeats"] for t in trials if t.user_attrs.get("again")}
    assert len([t for t in trials if not finals.is_search(t) and outcome(t) == "complete"]) == 2
    assert spent(trials, EPOCHS) <= 8


def stuck(told, flag):
    def train(number, parameters):
        for epoch, found in enumerate(made_up(number, parameters), 1):
            if number == 2 and epoch == 1:
                flag.touch()
                time.sleep(600)
            yield found

    searched(told, train)


@pytest.mark.parametrize("seen", ["lock", "silence"])
def test_a_killed_workers_trial_is_marked_and_tried_again(tmp_path, seen):
    """By its lock on the same machine; by its silence where only the database is shared."""
    folder, flag = tmp_path / "s", tmp_path / "flag"
    told = plan(folder, budget=4.0, grace=0.3 if seen == "silence" else 1e6)
    worker = FORK.Process(target=stuck, args=(told, flag))
    worker.start()
    while not flag.exists():
        assert worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    if seen == "silence":
        for file in (folder / "workers").iterdir():
            file.unlink()
    trials = searched(told)
    assert (outcome(trials[2]), trials[2].user_attrs["reason"]) == ("killed", "its worker died")
    again = [t for t in trials if t.params == trials[2].params and t.number != 2]
    assert [outcome(t) for t in again] in (["complete"], ["pruned"])
    assert again[0].user_attrs["again"] == 2
    assert 3 < spent(trials, EPOCHS) <= 4
    assert not list((folder / "workers").iterdir())


def resting(told, flag):
    search = Search(told)
    search._sign(search.worker).with_suffix(".yaml").touch()
    flag.touch()
    time.sleep(600)


def test_what_a_worker_leaves_that_is_killed_between_trials_is_removed(tmp_path):
    told = plan(tmp_path / "s", trials=1)
    workers = [FORK.Process(target=resting, args=(told, tmp_path / f"flag{i}")) for i in range(2)]
    for i, worker in enumerate(workers):
        worker.start()
        while not (tmp_path / f"flag{i}").exists():
            assert worker.is_alive()
            time.sleep(0.01)
    workers[0].kill()
    workers[0].join()
    searched(told)
    assert len(list((tmp_path / "s" / "workers").iterdir())) == 2  # of the one that lives
    workers[1].kill()
    workers[1].join()
    searched(told)
    assert not list((tmp_path / "s" / "workers").iterdir())


def test_a_worker_that_lives_keeps_its_trial(tmp_path):
    """Neither its lock nor its signs of life let another one take it."""
    folder, flag = tmp_path / "s", tmp_path / "flag"
    for grace, hidden in ((0.0, False), (0.5, True)):
        flag.unlink(missing_ok=True)
        told = plan(folder, grace=grace, budget=100.0)
        worker = FORK.Process(target=stuck, args=(plan(folder, budget=100.0, beat=0.05), flag))
        worker.start()
        try:
            while not flag.exists() and worker.is_alive():
                time.sleep(0.01)
            search = Search(told)
            if hidden:
                for file in (folder / "workers").iterdir():
                    file.unlink()
            for _ in range(4):
                search._reclaim()
                time.sleep(0.2)
            assert outcome(search.study.trials[2]) == "running"
            search.close()
        finally:
            worker.kill()
            worker.join()
        folder = tmp_path / "t"


def test_what_fails_is_recorded_with_its_reason_and_the_search_goes_on(tmp_path):
    kinds = {1: "diverged", 3: "failed", 4: "refused"}

    def train(number, parameters):
        yield figures(0.2 * quality(parameters), 1.0 if number == 2 else 5.0)
        if number == 6:
            yield figures(0.5) | {"collapse": "the features collapse", "symptoms": ""}
        if number in kinds:
            raise Failed(kinds[number], f"reason {number}")
        yield figures(0.5)
        if number != 5:
            yield figures(quality(parameters)) | {"collapse": "", "symptoms": "the instance branch collapses"}

    trials = searched(plan(tmp_path / "s", pruning=False, trials=8, budget=100.0, warmup=1.0), train)
    assert [outcome(t) for t in trials] == [
        "complete", "diverged", "collapsed", "failed", "refused", "failed", "collapsed", "complete",
    ]  # fmt: skip
    reasons = [t.user_attrs["reason"] for t in trials]
    assert reasons[1] == "reason 1"
    assert "effective rank 1.000 after epoch 1" in reasons[2]
    assert reasons[5] == "the training ended after 2 of 3 epochs"
    assert reasons[6] == "epoch 2: the features collapse"
    assert reasons[7] == "the instance branch collapses"  # which is no reason to stop
    assert not {"collapse", "symptoms"} & {name for t in trials for name in t.user_attrs["figures"]}
    # The sampler learns from what diverged or collapsed; a failure says nothing about the settings.
    states = optuna.trial.TrialState
    assert [t.state for t in trials][:4] == [states.COMPLETE, states.PRUNED, states.PRUNED, states.FAIL]


def test_a_search_ends_where_the_settings_as_given_are_refused_or_nothing_works(tmp_path):
    def refusing(number, parameters):
        raise Failed("refused", "cld.groups=99 exceeds the batch")
        yield

    def failing(number, parameters):
        if number == 0:
            yield from made_up(number, parameters)
        else:
            raise Failed("failed", "out of memory")

    with pytest.raises(ValueError, match=r"^cld.groups=99 exceeds the batch$"):
        searched(plan(tmp_path / "a"), refusing)
    with pytest.raises(ValueError, match="5 trials in a row failed, the last one: out of memory"):
        searched(plan(tmp_path / "b"), failing)


def test_a_small_space_is_tried_once_and_no_more(tmp_path):
    trained = []

    def train(number, parameters):
        trained.append(parameters["views.preset"])
        for _ in range(EPOCHS):
            yield figures(0.5)

    trials = searched(
        plan(tmp_path / "s", space={"views.preset": ("a", "b", "c")}, start=[], pruning=False, budget=20.0), train
    )
    assert sorted(trained) == ["a", "b", "c"]
    assert {outcome(t) for t in trials} == {"complete", "repeated"}
    again = [t for t in trials if outcome(t) == "repeated"]
    assert all("the same settings as trial" in t.user_attrs["reason"] for t in again)
    # As pruned ones they would tell the sampler that good settings are bad.
    assert all(t.state == optuna.trial.TrialState.FAIL for t in again)


def test_an_interrupted_search_gives_its_trial_back(tmp_path):
    told = plan(tmp_path / "s")
    search = Search(told)

    def train(number, parameters):
        yield figures(0.1)
        if number == 1:
            search.abandon()
        yield figures(0.2)
        yield figures(0.3)

    search.work(train)
    search.close()
    assert [outcome(t) for t in search.study.trials[:2]] == ["complete", "killed"]
    assert search.study.trials[1].user_attrs["reason"] == "stopped"
    trials = searched(plan(tmp_path / "s", trials=3))
    assert trials[2].params == trials[1].params
    assert outcome(trials[2]) in ("complete", "pruned")


def test_the_given_points_come_first_also_after_a_kill(tmp_path):
    start = [{"lr": 0.5, "cld.groups": 4}, {"lr": 0.25, "cld.groups": 4}]
    told = plan(tmp_path / "s", start=start)
    search = Search(told)
    first = search._next()
    search._cut_off(search.study.trials[0], "its worker died")
    assert first.params == start[0]
    again, second, third = search._next(), search._next(), search._next()
    search.close()
    assert [again.params, second.params] == start
    assert third.params not in start


def test_workers_agree_on_the_settings(tmp_path):
    searched(plan(tmp_path / "s", budget=1.0))
    with pytest.raises(ValueError, match="its study began with other settings: batch_size=64, not 32: give another"):
        Search(plan(tmp_path / "s", agreed={"batch_size": 32}))


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


def test_a_given_point_keeps_what_the_space_holds_and_is_near_to_it_elsewhere():
    space = {
        **SPACE, "views.preset": ("cifar", "simclr"), "cld.gather": ("true", "false"), "weight_decay": ("1e-3", "0.1"),
        "warmup_epochs": Numbers(0.0, 5.0), "optimizer": ("adamw", "lars"),
    }  # fmt: skip
    point = {
        "lr": 5.0, "cld.groups": 8.0, "views.preset": "cifar", "cld.gather": False, "method.hidden": None,
        "weight_decay": 0.001, "warmup_epochs": None, "optimizer": "sgd",
    }  # fmt: skip
    assert clipped(space, point) == {
        "lr": 1.0, "cld.groups": 8, "views.preset": "cifar", "cld.gather": "false", "weight_decay": "1e-3",
    }  # fmt: skip
    assert outside(space, point) == ["lr", "warmup_epochs", "optimizer"]


def test_ctrl_c_counts_neither_as_an_attempt_nor_in_the_budget(tmp_path):
    """However often it comes, the settings as given are tried until they have had their training."""
    for _ in range(5):
        search = Search(plan(tmp_path / "s", budget=1.0, pruning=False))

        def train(number, parameters, search=search):
            yield figures(0.1)
            yield figures(0.1)
            search.abandon()
            yield figures(0.1)

        search.work(train)
        search.close()
    trials = searched(plan(tmp_path / "s", budget=1.0, pruning=False))
    assert [outcome(t) for t in trials] == ["killed"] * 5 + ["complete"]
    assert trials[-1].params == trials[0].params
    assert spent(trials, EPOCHS) == 1


def test_what_kills_its_training_is_not_tried_for_ever(tmp_path):
    def train(number, parameters):
        yield figures(0.1)
        if parameters["lr"] == 0.9:
            raise Failed("killed", "the training was killed by signal 9")
        yield figures(0.2)
        yield figures(0.3)

    trials = searched(plan(tmp_path / "s", trials=4, budget=100.0, pruning=False), train)
    assert sum(t.params["lr"] == 0.9 for t in trials) == 3
    assert sum(outcome(t) == "complete" for t in trials) == 4


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
    monkeypatch.setattr("crosslevel.tuning.storage.time.sleep", lambda seconds: None)
    trials = searched(plan(tmp_path / "s", trials=5, budget=100.0, pruning=False, grace=0.3))
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


def test_trainings_that_diverge_at_once_cost_what_they_took(tmp_path):
    numbers = []

    def train(number, parameters):
        numbers.append(number)
        assert number < 50
        if number:
            raise Failed("diverged", "the loss is not finite")
        yield from made_up(number, parameters)

    trials = searched(plan(tmp_path / "s", budget=3.0, sampler="random"), train)
    # One whole training, then a third each until a whole one no longer fits.
    assert [cost(t, EPOCHS) for t in trials] == pytest.approx([1.0] + [1 / 3] * 4)
    assert spent(trials, EPOCHS) == pytest.approx(1 + 4 / 3)


def test_a_database_that_stays_away_is_named_without_its_password(tmp_path, monkeypatch):
    told = plan(tmp_path / "s", storage="postgresql+psycopg://me:secret@host/d")

    def call():
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("no route to host"))

    with pytest.raises(ValueError, match=r"^host/d: the study cannot be reached: .*no route to host") as error:
        patiently(told, call, patience=0.3)
    assert "secret" not in str(error.value)
    with pytest.raises(ZeroDivisionError):
        patiently(told, lambda: 1 / 0)


def test_a_study_that_could_not_be_made_whole_is_made_anew(tmp_path, monkeypatch):
    """The second of its tables' statements fails: what was made of it by then does not stay."""
    from crosslevel.tuning import storage

    failing = []

    class Failing(storage._File):
        def cursor(self, *kinds):
            return super().cursor(Cursor)

    class Cursor(storage.sqlite3.Cursor):
        def execute(self, statement, *more):
            if "CREATE UNIQUE INDEX" in statement and not failing:
                failing.append(statement)
                raise storage.sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *more)

    monkeypatch.setattr(storage, "_File", Failing)
    for _ in range(2):
        assert len(searched(plan(tmp_path / "s", trials=2, budget=9.0))) == 2
    assert failing
    with storage.sqlite3.connect(tmp_path / "s" / "study.db") as study:
        assert study.execute("select count(*) from studies").fetchone() == (1,)
        assert study.execute("select count(*) from sqlite_master where name like 'ix_studies%'").fetchone() == (1,)
    assert not list((tmp_path / "s").glob(".study.db*"))
