"""The page of a search, without its trainings."""

import pytest

from crosslevel.data.uri import parse


def searched_page(folder, images):
    """The page about a dozen trials of made-up scores, over settings of all kinds."""
    pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
    from crosslevel.tuning import report
    from crosslevel.tuning.plan import Plan, url
    from crosslevel.tuning.search_space import Numbers
    from crosslevel.tuning.study import Search
    from crosslevel.utils.console import printer

    space = {
        "cld.weight": Numbers(0.0, 1.0),
        "cld.groups": Numbers(2, 64, log=True, integral=True),
        "cld.temperature": Numbers(0.05, 1.0, log=True),
        "method.temperature": Numbers(0.05, 1.0, log=True),
        "lr": Numbers(1e-4, 1e-1, log=True),
        "views.preset": ("cifar", "simclr", "mocov2"),
    }
    first = {"cld.weight": 0.25, "cld.groups": 8, "cld.temperature": 0.2, "method.temperature": 0.2, "lr": 0.01}
    folder.mkdir()
    plan = Plan(
        folder=folder, storage=url(None, folder), space=space, start=[{**first, "views.preset": "cifar"}], epochs=3,
        budget=100, trials=12, sampler="random", pruning=False, seed=0, agreed={},
    )  # fmt: skip

    def scores(number, parameters):
        for epoch in (1, 2, 3):
            score = epoch / 3 - abs(parameters["cld.weight"] - 0.4) - (parameters["views.preset"] == "simclr")
            yield {"combined": score, "mrr": score / 2, "top1": score / 3, "ami": 0.1, "effective_rank": 5.0}

    search = Search(plan)
    try:
        search.work(scores)
        settings = {"cld": {}, "views": {}, "method": {"class_path": "crosslevel.methods.simclr.SimCLR"}}
        report.leave(search.study, plan, parse(images), settings, printer(quiet=True))
    finally:
        search.close()
    return folder / "report.html"
