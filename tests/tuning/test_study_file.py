"""A study's file is there with all its tables, or not at all."""

import pytest

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning import storage
from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.search_space import Numbers
from crosslevel.tuning.study import Search


def test_a_study_that_could_not_be_made_whole_is_made_anew(tmp_path, monkeypatch):
    """The second of its tables' statements fails: what was made of it by then does not stay."""
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

    def training(number, parameters):
        yield {"combined": 1.0, "effective_rank": 5.0}

    monkeypatch.setattr(storage, "_File", Failing)
    plan = Plan(
        folder=tmp_path / "s", storage=url(None, tmp_path / "s"), space={"lr": Numbers(0.1, 1.0)}, start=[{"lr": 0.5}],
        epochs=1, budget=9.0, trials=2, sampler="random", pruning=False, seed=0, agreed={},
    )  # fmt: skip
    for _ in range(2):
        search = Search(plan)
        try:
            search.work(training)
            assert len(search.study.get_trials()) == 2
        finally:
            search.close()
    assert failing
    with storage.sqlite3.connect(tmp_path / "s" / "study.db") as study:
        assert study.execute("select count(*) from studies").fetchone() == (1,)
        assert study.execute("select count(*) from sqlite_master where name like 'ix_studies%'").fetchone() == (1,)
    assert not list((tmp_path / "s").glob(".study.db*"))
