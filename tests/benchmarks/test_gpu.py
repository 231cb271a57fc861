"""What a GPU is asked first: the next cell of the paper's table; and what may explain a cell that falls short."""

import argparse
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from crosslevel.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu")
    for name in ("gpu", "paper_gpu", "shared.records", "shared.paper_table"):
        sys.modules.pop(name, None)


@pytest.fixture
def calls(gpu, monkeypatch):
    """The programs that are started; each capture passes, but that of the methods in ``wrong``."""
    lines, wrong = [], set()

    def limited(line, seconds):
        lines.append((Path(line[0]).name, *line[1:], f"within {round(seconds)} s"))
        passed = "no" if line[-1] in wrong else "yes"
        return f"| {line[-1]} | yes | 0 | 1 | {passed} |\n"

    monkeypatch.setattr(gpu, "limited", limited)
    return lines, wrong


def asked(gpu, out, record, minutes=9, stages=None):
    arguments = argparse.Namespace(
        data="DATA", minutes=minutes, stages=stages or gpu.STAGES, output=str(out), runs="runs"
    )
    gpu.stages(arguments, record)


def cells(file, *names):
    done = {name: {"epochs": 200, "epochs_done": 200, "figures": {}} for name in names}
    file.write_text(json.dumps({"cells": done}))
    return file


def test_the_next_cell_comes_first_and_only_its_own_method_before_it(gpu, calls, tmp_path):
    record = cells(tmp_path / "paper_gpu.json", "npid", "npid-cld")
    asked(gpu, tmp_path / "out", record)
    lines, _ = calls
    assert [line[0] for line in lines[:3]] == ["gpu.py", "paper_gpu.py", "step.py"]
    assert lines[0][1:4] == ("DATA", "--compare", "moco")
    assert "--compile=off" not in lines[1]
    assert [line[-1] for line in lines if line[0] == "step.py"] == [f"within {s} s" for s in (120, 120, 120, 240)]
    last = [line[3] for line in lines[2:] if line[0] == "gpu.py"]
    assert [*last, "moco"] == [*(name for name in gpu.METHODS if name != "moco"), "moco"]


def test_a_call_knows_the_cells_that_are_whole(gpu, calls, tmp_path):
    """From the tree where its own folder has no record; what is there already stays."""
    record = cells(tmp_path / "paper_gpu.json", "npid")
    asked(gpu, tmp_path / "out", record, stages=["cell"])
    assert (tmp_path / "out" / "paper_gpu.json").read_text() == record.read_text()
    own = cells(tmp_path / "out" / "paper_gpu.json", "npid", "npid-cld", "moco")
    before = own.read_text()
    asked(gpu, tmp_path / "out", record, stages=["capture", "cell"])
    assert own.read_text() == before
    lines, _ = calls
    assert lines[1][3] == "moco"  # of moco-cld
    cells(own, "npid", "npid-cld", "moco", "moco-cld")
    lines.clear()
    asked(gpu, tmp_path / "out", record)
    assert "paper_gpu.py" not in [line[0] for line in lines]


def test_a_cell_whose_method_is_not_captured_rightly_is_not_captured(gpu, calls, tmp_path):
    lines, wrong = calls
    wrong.add("npid")
    asked(gpu, tmp_path, tmp_path / "none.json", stages=["capture", "cell"])
    assert lines[1][-3:-1] == ("--", "--compile=off")
    lines.clear()
    asked(gpu, tmp_path, tmp_path / "none.json", minutes=0.4)  # less than anything takes
    assert lines == []


def test_pytorch_lightning_has_fabric_in_it(gpu):
    paper_gpu = importlib.import_module("paper_gpu")

    def installed(**versions):
        def version(name):
            if name in ("lightning-fabric", "pytorch-lightning") and name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name.replace("-", "_"), "999.0")

        return paper_gpu.missing(version)

    assert installed(lightning_fabric="2.6.0") == installed(pytorch_lightning="2.6.1+local") == []
    assert installed() == installed(pytorch_lightning="2.5.9") == ["lightning-fabric>=2.6"]
    assert installed(lightning_fabric="2.6", filelock="4.1") == ["filelock>=4.2"]


@pytest.mark.parametrize(("name", "recipe"), [
    ("npid-cld+torch-init+fp32", "cifar10-npid-cld"),
    ("npid+per-view", "cifar10-npid"),
    ("npid-cld+splits", "cifar10-npid-cld"),
    ("moco-cld+splits+fp32", "cifar10-moco-cld"),
    ("cifar10-moco-cld-earlier+torch-init", "cifar10-moco-cld-earlier"),
])  # fmt: skip
def test_a_variant_of_a_cell_is_one_that_train_knows(gpu, capsys, name, recipe):
    paper_gpu = importlib.import_module("paper_gpu")
    arguments = argparse.Namespace(data="photos", runs="runs", until=None, every=20)
    cell = paper_gpu.cell(name, arguments, ["--seed=1"], Path("record.json"))
    assert (cell["name"], cell["recipe"]) == (f"{name} --seed=1", recipe)
    assert len(cell["options"]) == name.count("+") + 1
    with pytest.raises(SystemExit) as end:
        main(["train", "photos", "--recipe", recipe, *cell["options"], "--print_config"])
    assert end.value.code == 0
    assert "seed: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no variant is named fp8: take torch-init, fp32, per-view, splits"):
        paper_gpu.cell("npid+fp8", arguments, [], Path("record.json"))
