"""What the programs in benchmarks/ record: only whole trainings, of the images and options that were asked for."""

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from run_samples import write_images

from crosslevel.data.duplicates.detect import duplicate_pairs, tracks
from crosslevel.data.duplicates.neighbours import Cells
from crosslevel.metrics.nearest import mutual_pairs


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("quality.paper")
    for name in ("quality.paper", "shared.beside"):
        del sys.modules[name]


def test_processes_add_to_one_record(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    records = importlib.import_module("shared.records")
    file = tmp_path / "results" / "x.json"
    assert records.read(file, "cells") == {}

    def several(first):
        for i in range(first, first + 20):
            records.add(file, "cells", str(i), i, {"machine": "m"})

    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=several, args=(20 * n,)) for n in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert records.read(file, "cells") == {str(i): i for i in range(60)}
    assert json.loads(file.read_text())["machine"] == "m"


class Trainings:
    """Stands for `crosslevel train`, which leaves an encoder when it is stopped as well."""

    def __init__(self):
        self.lines, self.stopped = [], False

    def __call__(self, verb, line):
        self.lines.append(line)
        folder = Path(line[-1])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for file in ("checkpoints/last.ckpt", "encoder.safetensors"):
            (folder / file).touch()
        if self.stopped:
            raise SystemExit(130)


def test_a_stopped_training_goes_on_and_another_one_begins_anew(paper, monkeypatch, tmp_path):
    trainings, folder = Trainings(), tmp_path / "x"
    monkeypatch.setattr(paper, "run", trainings)
    trainings.stopped = True
    for _ in range(2):
        with pytest.raises(SystemExit):
            paper.trained("images", ["--epochs=4"], folder)
    trainings.stopped = False
    for _ in range(2):  # a whole one is not trained again
        paper.trained("images", ["--epochs=4"], folder)
    anew, resumed = ["images", "--epochs=4", "--run", str(folder)], ["images", "--resume", str(folder)]
    assert trainings.lines == [anew, resumed, resumed]
    (folder / "old").touch()
    paper.trained("images", ["--epochs=8"], folder)
    paper.trained("others", ["--epochs=8"], folder)
    assert [line[0] for line in trainings.lines[3:]] == ["images", "others"]
    assert all("--run" in line for line in trainings.lines[3:])
    assert not (folder / "old").exists()


def test_rows_are_of_the_wanted_cells_alone(paper, tmp_path):
    arguments = argparse.Namespace(imbalance=100.0, epochs=30, batch_size=128, width=0.25)
    data = {"imbalance": 100.0, "images": 12406, "test_images": 10000}
    about = {"method": "MoCo", "head": "default", "cld": "on", "line": "--method=MoCo", "data": data}
    knn = {"moco-0": 30.0, "moco-1": 33.0, "moco-2": 90.0}
    done = {name: {**about, "figures": {"knn": value}} for name, value in knn.items()}
    done["moco-2"] = {**done["moco-2"], "data": {**data, "imbalance": 1.0}}
    cells = [cell for cell in done.values() if paper.same(cell, about)]
    paper.write(tmp_path / "x.json", done, cells, arguments)
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["cells"] == done
    spread = statistics.stdev([30.0, 33.0])
    row = {key: about[key] for key in ("method", "head", "cld")}
    assert told["rows"] == [{**row, "seeds": 2, "knn": {"mean": 31.5, "deviation": spread}}]
    table = (tmp_path / "x.md").read_text()
    assert f"| MoCo | default | on | 2 | 31.5 ± {spread:.1f} | - |" in table
    assert not paper.same(None, about)
    assert not paper.same({**about, "line": "--method=NPID"}, about)


@pytest.mark.parametrize("preset", ["cifar", "simclr", "byol"])
def test_a_gpu_is_told_little_more_for_several_views_than_for_one(monkeypatch, preset):
    """But for BYOL, whose two views are drawn each in its own way. What a captured step launches once is in it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    launches = importlib.import_module("speed.launches")
    one, three = (launches.of_views(preset, 32, count, batch=64) for count in (1, 3))
    assert 100 < one < 450
    assert three <= one + 5 if preset != "byol" else one < three < 3.5 * one
    assert launches.of_cld(64) < 170


@pytest.fixture
def paper_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("paper_gpu")
    for name in ("paper_gpu", "quality.paper", "shared.beside", "shared.records"):
        sys.modules.pop(name, None)


def test_a_cell_of_the_papers_table_goes_on_from_its_checkpoint(paper_gpu, tmp_path):
    """Stopped after 2 of 4 epochs and continued it has the figures of one that nobody stopped."""
    for part, seed in (("train", 0), ("test", 1)):
        write_images(tmp_path / "data" / part, count=8, size=(32, 32), seed=seed)
    options = [
        "--epochs=4",
        "--warmup_epochs=0",
        "--batch_size=8",
        "--encoder.width=0.0625",
        "--cld.groups=4",
        "--device=cpu",
    ]

    def told(name, until):
        arguments = argparse.Namespace(data=str(tmp_path / "data"), runs=str(tmp_path / name), until=until, every=2)
        return paper_gpu.cell("npid-cld", arguments, options, tmp_path / f"{name}.json")

    with pytest.raises(SystemExit):
        paper_gpu.train_cell(told("stopped", 2))
    record = tmp_path / "stopped.json"
    name = paper_gpu.title("npid-cld", options)
    half = json.loads(record.read_text())["cells"][name]
    assert (half["epochs_done"], list(half["figures"])) == (2, ["2"])
    assert set(half["figures"]["2"]) == {"instance", "group", "shared"}
    assert paper_gpu.wanted(["next"], record, options) == ["npid"]
    assert paper_gpu.wanted(["all"], record, options) == ["npid", "npid-cld", "moco", "moco-cld"]
    assert paper_gpu.wanted(["npid-cld"], record, options, until=2) == []  # as far as it was wanted
    for way in ("stopped", "straight"):
        paper_gpu.train_cell(told(way, None))
    both = [json.loads((tmp_path / f"{way}.json").read_text())["cells"][name] for way in ("stopped", "straight")]
    assert both[0]["figures"] == both[1]["figures"]
    assert both[0]["epochs_done"] == 4
    assert "npid-cld" not in paper_gpu.wanted(["all"], record, options)
    assert "npid-cld" in paper_gpu.wanted(["all"], record, [*options, "--lr=1"])  # others are another cell


def test_the_papers_table_has_every_cell_and_what_was_measured_last(paper_gpu):
    about = {"options": [], "epochs": 200, "images_per_second": 29600.4, "card": "a card", "precision": "bf16"}
    figures = {"100": {"instance": 99.0, "shared": 99.0}, "20": {"instance": 40.0, "shared": 50.0}}
    done = {"npid": {**about, "epochs_done": 100, "figures": figures, "date": "2026-01-02"}}
    done["moco --cld.groups=10"] = {**done["npid"], "figures": {"20": {"instance": 70.0}}, "epochs_done": 20}
    page = paper_gpu.markdown(done, list(paper_gpu.PUBLISHED))
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[1] == "| npid | 80.8 | 100 of 200 | 99.0 | - | - | 99.0 | 29,600 | a card, bf16, 2026-01-02 |"
    assert rows[2:5] == [
        f"| {name} | {published} | not run | - | - | - | - | - | - |"
        for name, published in (("npid-cld", 86.7), ("moco", 82.1), ("moco-cld", 87.5))
    ]
    assert rows[5].startswith("| moco --cld.groups=10 | - | 20 of 200 | 70.0 | - | - | - |")
    assert rows[6:] == ["| epoch | 20 | 100 |", "| npid | 40.0 | 99.0 |", "| moco --cld.groups=10 | 70.0 | - |"]
    assert "not run" not in paper_gpu.markdown(done, [])
    complete = {"npid+fp32": {**done["npid"], "epochs_done": 200, "figures": {"200": {"instance": 79.46}}}}
    assert "| npid+fp32 | 80.8 | 200 of 200 | 79.5 | 1.3 | - | - |" in paper_gpu.markdown(complete, [])


def test_the_papers_table_on_a_cpu_is_one_command(paper_gpu, monkeypatch):
    """Which figures are taken where, what a cell is told; figures where none are taken are refused."""
    asked = []
    monkeypatch.setattr(paper_gpu, "grid", lambda arguments, rest: asked.append((arguments, rest)))
    for line in (["DATA", "--cpu"], ["DATA", "--cpu", "--until", "20", "--", "--seed=1"], ["DATA"]):
        monkeypatch.setattr(sys, "argv", ["paper_gpu.py", *line])
        paper_gpu.main()
    (first, rest), (second, more), (third, none) = asked
    assert (first.cells, first.until, first.every, math.isinf(first.minutes)) == (["npid", "npid-cld"], 50, 10, True)
    assert rest == ["--encoder.width=0.25"]
    assert (second.until, more) == (20, ["--encoder.width=0.25", "--seed=1"])
    assert (third.cells, third.minutes, third.every, none) == (["next"], 8.0, 20, [])
    monkeypatch.setattr(sys, "argv", ["paper_gpu.py", "DATA", "--until", "50"])
    with pytest.raises(SystemExit):
        paper_gpu.main()


def test_copies_planted_among_many_pictures_are_found_through_cells(monkeypatch):
    """What is measured of a million pictures, of 3,000 in smaller cells: recall of copies, precision of pairs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    scale = importlib.import_module("large.scale_duplicates")
    pictures, original, edit = scale.collection(3000, seed=7)
    pairs = duplicate_pairs(pictures, cells=Cells(all=500, points=64)).images
    track, copies = tracks(len(pictures), pairs), (edit >= 0).nonzero()[:, 0]
    assert len(copies) == 272
    assert (track[copies] == track[original[copies]]).float().mean() >= 0.98
    assert (original[pairs[:, 0]] == original[pairs[:, 1]]).float().mean() >= 0.95


def test_copies_planted_among_many_features_are_found_through_cells(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    scale = importlib.import_module("large.scale_duplicates")
    features, original, edit = scale.clusters(3000, 64, seed=7)
    pairs = mutual_pairs(features, scale.THRESHOLD, scale.NEIGHBOURS, many=500, cells=Cells(all=500, points=64))
    track, copies = tracks(len(features), pairs), (edit >= 0).nonzero()[:, 0]
    assert len(copies) == 272
    assert (track[copies] == track[original[copies]]).float().mean() >= 0.98
    assert (original[pairs[:, 0]] == original[pairs[:, 1]]).float().mean() >= 0.95


def test_what_a_gpu_is_asked_first_tells_a_wrong_step_from_a_right_one(monkeypatch):
    """Here nothing can be captured, which the row says; losses as of other batches in a capture's place are a no."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "BATCH", 8)
    row = [cell.strip() for cell in gpu.compared("npid", "cpu", warm=0, backend="eager").strip("| ").split("|")]
    assert row[0] == "npid"
    assert row[1].startswith("no CUDA graph of the step: ")
    assert float(row[2]) < float(row[3]) / 10
    assert row[4] == f"cpu, {time.strftime('%Y-%m-%d')}"
    assert row[5] == "no"
    for captured, verdict in (([5.02, 4.0], "yes"), ([5.5, 4.5], "no")):
        told = {(False, 0): [5.0, 4.0], (False, 1): [5.5, 4.5], (True, 0): captured}
        monkeypatch.setattr(
            gpu, "losses", lambda *_, captured, first=0, told=told: (torch.tensor(told[captured, first]), "")
        )
        assert gpu.compared("npid", "cpu").endswith(f"| {verdict} |")


@pytest.fixture
def benchmark(monkeypatch):
    """A program of benchmarks/, by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module
    for name in ("quality.curate", "large.explore", "large.search", "quality.paper", "shared.beside", "shared.records"):
        sys.modules.pop(name, None)


def test_what_curate_is_worth_is_told_by_the_seeds_differences(benchmark, monkeypatch, tmp_path, capsys):
    """Of 5 seeds, whose differences are 1 to 5: 3 ± 2.776 sqrt(2.5 / 5). What is recorded is not measured again."""
    curate, records = (benchmark(name) for name in ("quality.curate", "shared.records"))
    monkeypatch.setattr(curate, "trained", lambda *given: pytest.fail("trained again"))
    given = argparse.Namespace(
        train=str(write_images(tmp_path / "photos", count=10)), test="", encoder=None, n=[4], seeds=5, trainings=5,
        seen=60, runs=tmp_path, output=tmp_path / "curate", line=["--lr=1"],
    )  # fmt: skip
    study = curate.Study(given)
    for seed in range(5):
        for i, how in enumerate(curate.HOWS):
            figures = {"accuracy": 40.0 + i * (seed + 1), "classes": 2}
            records.add(study.record, study.about, f"4 labels, {how}, {seed}", figures, {})
        for i, what in enumerate(curate.TENTH):
            records.add(study.record, study.about, f"trained on {what}, {seed}", {"accuracy": 50.0 + i}, {})
    study.go()
    table = capsys.readouterr().out
    assert "| 4 | balanced | 5 | 43.0 ± 2.0 | 3.0 ± 2.0 | 2.0 |" in table
    assert "| a tenth, balanced | 2 | 5 | 52.0 ± 0.0 | 1.0 ± 0.0 |" in table
    other = argparse.Namespace(**{**vars(given), "line": ["--lr=2"]})
    assert curate.Study(other).done() == {}  # with other options nothing is done


def test_searches_are_measured_beside_comparing_with_all(benchmark, tmp_path):
    pytest.importorskip("usearch", reason="needs usearch: pip install 'crosslevel[search]'")
    search = benchmark("large.search")
    search.written(tmp_path / "features.parquet", 300)
    cells = {f"300 {way}": {"rows": 300, "way": way, **search.measured(tmp_path, way)} for way in ("exact", "index")}
    assert cells["300 exact"]["recall"] == 1
    assert cells["300 index"]["recall"] >= search.RECALL
    half = {**cells["300 index"], "single_ms": cells["300 exact"]["single_ms"] / 2}
    (line,) = [line for line in search.markdown({**cells, "300 index": half}).splitlines() if "index" in line]
    assert "| 2x |" in line


def test_a_page_is_measured_in_its_stages(benchmark, tmp_path):
    explore = benchmark("large.explore")
    cell = explore.measured(explore.table(tmp_path, 70), sample=40, threads=torch.get_num_threads())
    assert (cell["rows"], cell["shown"]) == (70, 40)
    assert set(cell["stages"]) == set(explore.STAGES)
    assert cell["page_mb"] > 0.04  # its pictures
    line = torch.stack([torch.arange(50.0), torch.zeros(50)], 1)  # a map of all where they belong, and one of none
    near = torch.cdist(line, line).topk(16, largest=False).indices
    assert explore.neighbours_kept(near, line) > 0.9  # but for ties
    assert explore.neighbours_kept(near, line[torch.randperm(50, generator=torch.Generator().manual_seed(0))]) < 0.5
