"""A study: budget, pruning, and what becomes of trials that fail or are stopped.

The trainings here are made up; `test_tune` has real ones.
"""

import json
import random

import pytest
from study_samples import EPOCHS, SPACE, figures, made_up, plan, quality, searched

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning.sampler import pruner
from crosslevel.tuning.search_space import Numbers, clipped, outside
from crosslevel.tuning.study import Search
from crosslevel.tuning.trial import Failed
from crosslevel.tuning.trials import cost, outcome, spent


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
    first = search.next_trial()
    assert first.params == start[0]
    search.alive.close()  # as the system does when a process dies; its sign of life stays
    search = Search(told)
    again, second, third = search.next_trial(), search.next_trial(), search.next_trial()
    assert search.study.trials[0].user_attrs["reason"] == "its worker died"
    search.close()
    assert [again.params, second.params] == start
    assert third.params not in start


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
