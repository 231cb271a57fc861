"""benchmarks/first_try.py: which cells there are, which are trained again, and what the record and the table say."""

import importlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_samples import write_images

from crosslevel.features.extract import Features
from crosslevel.training import defaults

COLUMNS = ("raw pixels", "untrained", "default, no CLD", "default")


@pytest.fixture
def first_try(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("first_try")
    for name in [name for name in sys.modules if name == "first_try" or name.startswith(("quality.", "shared."))]:
        sys.modules.pop(name, None)


@pytest.fixture
def call(first_try, tmp_path, monkeypatch):
    """The program on two small collections, with figures in place of trainings; returns the cells that were run."""
    for part in ("train", "test"):
        write_images(tmp_path / "data" / "clothing" / part, count=8, seed=len(part))
    ran, fails = [], set()

    def again(file, *words, show):
        cell = json.loads(words[-1])
        ran.append(cell)
        if cell["name"] in fails:
            raise subprocess.CalledProcessError(1, "python")
        value = 40.0 + 10 * (cell["column"] == "default") + cell["seed"]
        Path(cell["to"]).write_text(json.dumps(dict.fromkeys(first_try.FIGURES, value) | {"seconds": 7.0}))

    def program(*words, failing=()):
        ran.clear()
        fails.clear()
        fails.update(failing)
        only = ["--only", "clothing", "clothing, 64 pixels", "--runs", str(tmp_path / "runs")]
        line = ["first_try.py", str(tmp_path / "data"), "-o", str(tmp_path / "first"), *only, *words]
        monkeypatch.setattr(sys, "argv", line)
        first_try.main()
        return {cell["name"]: cell for cell in ran}

    monkeypatch.setattr(first_try.records, "again", again)
    return program


def test_the_smallest_budget_comes_first_and_alone_has_a_second_seed(call, tmp_path):
    names = list(call("--budgets", "4", "1"))
    small = [f"{c} | 1 | {column} | 0" for c in ("clothing, 64 pixels", "clothing") for column in COLUMNS]
    assert names[: len(small) + 1] == [*small, "clothing | 1 | lightly | 0"]
    assert {name.split(" | ")[3] for name in names if "| 4 |" in name} == {"0"}
    assert {name for name in names if name.endswith("| 1")} == {
        f"{c} | 1 | {column} | 1" for c in ("clothing, 64 pixels", "clothing") for column in COLUMNS[2:]
    }
    assert not call("--budgets", "4", "1")  # the record has all
    table = (tmp_path / "first.md").read_text()
    assert "| clothing | 1 | 40.0 / 40.0 / 40.0 | 40.0 / 40.0 / 40.0 | 40.5 / 40.5 / 40.5 (2) | 50.5" in table
    assert "| +10.0 |" in table


def test_epochs_follow_the_budget_and_lightly_has_the_seconds_of_the_record(call, tmp_path):
    ran = call("--budgets", "2", "--seeds", "0")
    count = 16  # images in two classes
    assert f"--epochs={80_000 / count:g}" in ran["clothing, 64 pixels | 2 | default | 0"]["line"]
    assert f"--epochs={20_000 / count:g}" in ran["clothing | 2 | default | 0"]["line"]
    assert ran["clothing | 2 | lightly | 0"]["seconds"] == 7.0
    record = json.loads((tmp_path / "first.json").read_text())["cells"]
    del record["clothing | 2 | lightly | 0"]
    (tmp_path / "first.json").write_text(json.dumps({"cells": record}))
    for file in (tmp_path / "runs").rglob("*"):
        file.unlink() if file.is_file() else None
    assert call("--budgets", "2", "--seeds", "0")["clothing | 2 | lightly | 0"]["seconds"] == 7.0


def test_a_changed_rule_trains_its_cells_again_and_another_reason_does_not(first_try, call, monkeypatch):
    call("--budgets", "1", "--seeds", "0")
    rules = first_try.rules

    def by(**change):
        groups = SimpleNamespace(**vars(defaults) | {"groups": lambda b: defaults.groups(b)._replace(**change)})
        monkeypatch.setattr(first_try, "rules", lambda images, epochs: rules(images, epochs, groups))

    by(reason="another")
    assert not call("--budgets", "1", "--seeds", "0")
    by(value=3)
    again = call("--budgets", "1", "--seeds", "0")
    trained = {f"{c} | 1 | {column} | 0" for c in ("clothing, 64 pixels", "clothing") for column in COLUMNS[2:]}
    assert set(again) == trained | {"clothing | 1 | lightly | 0"}


def test_a_cell_that_fails_is_named_and_the_others_are_run(call, tmp_path):
    failing = "clothing, 64 pixels | 1 | default | 0"
    with pytest.raises(SystemExit, match=r"failed, see above: clothing, 64 pixels \| 1 \| default \| 0$"):
        call("--budgets", "1", "--seeds", "0", failing=[failing])
    record = json.loads((tmp_path / "first.json").read_text())["cells"]
    assert "clothing | 1 | lightly | 0" in record
    assert failing not in record
    assert list(call("--budgets", "1", "--seeds", "0")) == [failing]


def test_a_changed_rule_begins_a_training_anew_and_its_seconds_too(first_try, tmp_path, monkeypatch):
    lines, folder = [], tmp_path / "x"

    def run(verb, line):
        lines.append(line)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").touch()

    paper = importlib.import_module("quality.paper")
    monkeypatch.setattr(paper, "run", run)
    seconds = tmp_path / "x.seconds"
    for rules in ("a", "a", "b"):
        paper.trained("images", ["--epochs=4"], folder, rules=rules)
        assert not seconds.exists() or rules == "a"
        seconds.write_text("5")
    assert lines == 2 * [["images", "--epochs=4", "--run", str(folder)]]


def test_seconds_add_up_over_processes(first_try, tmp_path):
    with first_try.clock(tmp_path / "x", every=0.01) as spent:
        waited = threading.Event()
        while not spent():  # written while the training runs: it may be killed at any time
            waited.wait(0.01)
    before = spent()
    began = time.monotonic()
    with first_try.clock(tmp_path / "x") as spent:
        pass
    assert before > 0
    assert before <= spent() <= before + time.monotonic() - began


def test_five_labels_a_class_are_judged_by_their_mean(first_try):
    """Features that are their class' own direction are all right; features of the other class' are all wrong."""
    labels = torch.arange(40) % 2
    bank = Features(torch.eye(2)[labels], labels, torch.arange(40))
    assert first_try.few_shot(bank, bank, 2) == 100
    assert first_try.few_shot(bank, Features(torch.eye(2)[1 - labels], labels, torch.arange(40)), 2) == 0
