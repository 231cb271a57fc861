"""The best trials are trained once more with other seeds."""

import dataclasses

import pytest
from study_samples import EPOCHS, FORK, figures, made_up, plan, searched

from crosslevel.tuning import finals
from crosslevel.tuning.plan import url
from crosslevel.tuning.study import Search
from crosslevel.tuning.trials import outcome, spent


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
