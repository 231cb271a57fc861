"""What a search leaves: the best settings, and a page."""

import dataclasses
import io

import pytest
import torch
import yaml
from rich.console import Console

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.data.uri import parse
from crosslevel.tuning import report as results
from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.search_space import Numbers

pytestmark = pytest.mark.slow


def test_the_page_shows_how_much_each_setting_matters(tmp_path):
    """Which takes more trials than the small search has."""
    plan = dataclasses.replace(planned(tmp_path), space={"lr": Numbers(0.0, 1.0), "cld.weight": Numbers(0.0, 1.0)})
    study = optuna.create_study(direction="maximize")
    for i in range(12):
        lr = (i + 0.5) / 12
        study.add_trial(optuna.create_trial(
            value=1 - lr, params={"lr": lr, "cld.weight": (5 * i % 12) / 12}, intermediate_values={2: 1 - lr},
            distributions={name: optuna.distributions.FloatDistribution(0, 1) for name in plan.space},
            user_attrs={"outcome": "complete", "figures": {"combined": 1 - lr}},
        ))  # fmt: skip
    results.leave(study, plan, parse("photos"), {"lr": 0.1, "cld": {"weight": 0.1}}, Console(file=io.StringIO()))
    assert ">Importance, %<" in (tmp_path / "report.html").read_text()


def test_importance_finds_what_matters():
    space = {"a": optuna.distributions.FloatDistribution(0, 1), "b": optuna.distributions.FloatDistribution(0, 1)}
    draws = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).tolist()
    trials = [optuna.create_trial(params={"a": a, "b": b}, distributions=space, value=0.0) for a, b in draws]
    shares = results.importance([(t, t.params["b"] ** 2) for t in trials])
    assert next(iter(shares)) == "b"
    assert shares["b"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert results.importance([(t, 0.5) for t in trials]) == {}


def planned(folder):
    return Plan(
        folder=folder, storage=url(None, folder), space={"lr": Numbers(0.0, 1.0)}, start=[], epochs=2, budget=2.0,
        trials=None, sampler="tpe", pruning=True, seed=0, agreed={},
    )  # fmt: skip


def test_a_search_in_which_nothing_ended_well_says_so(tmp_path):
    plan = planned(tmp_path)
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.create_trial(
        state=optuna.trial.TrialState.FAIL, params={"lr": 0.5},
        distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
        user_attrs={"outcome": "failed", "reason": "out of memory"},
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"no trial came to its end \(1 failed\), the last one: out of memory"):
        results.leave(study, plan, parse("photos"), {}, Console(file=io.StringIO()))
    assert "out of memory" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "config.yaml").exists()


def test_a_stopped_trial_is_never_the_best(tmp_path):
    """Optuna gives it its last score as its value."""
    plan = planned(tmp_path)
    study = optuna.create_study(direction="maximize")

    def add(state, score, lr, outcome):
        study.add_trial(optuna.create_trial(
            state=state, value=score, params={"lr": lr}, intermediate_values={1: score},
            distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
            user_attrs={"outcome": outcome, "reason": outcome, "figures": {"combined": score}},
        ))  # fmt: skip

    states = optuna.trial.TrialState
    add(states.PRUNED, 0.9, 0.9, "diverged")
    with pytest.raises(ValueError, match="no trial came to its end"):
        results.leave(study, plan, parse("photos"), {"lr": 0.1}, Console(file=io.StringIO()))
    add(states.COMPLETE, 0.4, 0.4, "complete")
    said = io.StringIO()
    results.leave(study, plan, parse("photos"), {"lr": 0.1}, Console(file=said, width=200))
    assert "Trial 1 scored best: 0.4000." in said.getvalue()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.4
