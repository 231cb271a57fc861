"""A study's file is there with all its tables, or not at all."""

import resource
import sqlite3

import pytest

pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.search_space import Numbers
from crosslevel.tuning.study import Search
from crosslevel.utils.errors import UserError


def test_a_study_that_could_not_be_made_whole_is_made_anew(tmp_path):
    """A file may be no longer than some of its tables take: what was made of it by then does not stay."""

    def training(number, parameters):
        yield {"combined": 1.0, "effective_rank": 5.0}

    plan = Plan(
        folder=tmp_path / "s", storage=url(None, tmp_path / "s"), space={"lr": Numbers(0.1, 1.0)}, start=[{"lr": 0.5}],
        epochs=1, budget=9.0, trials=2, sampler="random", pruning=False, seed=0, agreed={}, pause=0.01,
    )  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"the study cannot be opened: .*disk"):
            Search(plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [file for file in (tmp_path / "s").iterdir() if "study.db" in file.name]
    for _ in range(2):
        search = Search(plan)
        try:
            search.work(training)
            assert len(search.study.get_trials()) == 2
        finally:
            search.close()
    with sqlite3.connect(tmp_path / "s" / "study.db") as study:
        assert study.execute("select count(*) from studies").fetchone() == (1,)
        assert study.execute("select count(*) from sqlite_master where name like 'ix_studies%'").fetchone() == (1,)
    assert not list((tmp_path / "s").glob(".study.db*"))
