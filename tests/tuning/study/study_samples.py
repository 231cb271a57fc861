"""Plans of small studies, and trainings that are made up."""

import multiprocessing

import pytest

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.search_space import Numbers
from crosslevel.tuning.study import Search

EPOCHS = 3
FORK = multiprocessing.get_context("fork")
SPACE = {"lr": Numbers(1e-3, 1.0, log=True), "cld.groups": Numbers(2, 64, log=True, integral=True)}


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
