"""benchmarks/claims.py: a page of what was measured and of nothing else, from a record that goes on."""

import argparse
import importlib
import inspect
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from run_samples import write_images
from scipy.stats import ttest_rel
from torchvision.ops import box_iou

from crosslevel import CrossLevel
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.methods import MoCo
from crosslevel.models.encoder import Encoder

SIZE = {"size": "--epochs=1", "images": 20, "machine": "m", "date": "2026-01-02"}


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("claims")
    parts = [f"quality.claims_{name}" for name in ("list", "page", "elsewhere", "views")]
    for name in ("claims", *parts, "quality.paper", "shared.beside", "shared.records", "quality.scenes"):
        sys.modules.pop(name, None)


def record(claims, name, values):
    """Cells of a claim's arms, a list of figures by seed each; None stands for a training that diverged."""
    claim, cells = claims.CLAIMS[name], {}
    for line, found in zip(claim.arms.values(), values, strict=True):
        for seed, value in enumerate(found):
            failed = {claim.figure: "the loss is no longer a number"} if value is None else {}
            figures = {} if value is None else {claim.figure: value}
            cells[claims.key_of(claim.source, line, seed)] = {**SIZE, "figures": figures, "failed": failed}
    return cells


def test_a_claim_has_the_difference_by_seed_with_its_interval(claims):
    without, with_cld = [30.0, 31.0, 35.0], [32.0, 32.5, 37.5]
    interval = importlib.import_module("quality.claims_elsewhere").interval
    page = claims.page(record(claims, "npid", [without, with_cld]))
    low, high = ttest_rel(with_cld, without).confidence_interval(0.95)
    assert (low + high) / 2 == pytest.approx(2.0)
    half = (high - low) / 2
    assert f"with CLD against alone: +2.00 ± {half:.2f}, better." in page
    assert f"| with CLD | 3 | 34.00 ± {interval(with_cld)[1]:.2f} | +2.00 ± {half:.2f} |" in page
    assert f"| npid | balanced | 3 | 32.00 ± {interval(without)[1]:.2f} | 34.00" in page
    assert f"| +2.00 ± {half:.2f} | - | - |" in page
    assert "| moco |" not in page
    # the same trainings are of other claims as well: of the spread over seeds, and of one arm of NPID's bank
    assert page.count("Not run yet.") == len(claims.CLAIMS) - 3
    worse = claims.page(record(claims, "npid", [with_cld, without]))
    assert f"-2.00 ± {half:.2f}, worse." in worse
    unclear = claims.page(record(claims, "npid", [without, [36.0, 30.0, 31.0]]))
    assert "not told apart from nothing" in unclear
    assert "decides nothing" in claims.page(record(claims, "npid", [[30.0], [31.0]]))


def test_trainings_of_another_size_are_not_compared(claims):
    """Neither in a row nor by a claim of their own: what was measured once, in passing, is left out."""
    cells = record(claims, "npid", [[30.0, 31.0], [32.0, 32.5]])
    alone = claims.page(cells)
    key = next(iter(cells)).rsplit(" | ", 1)[0]
    for other in ({"size": "--epochs=2"}, {"images": 30}):
        more = {**cells, f"{key} | 2": {**cells[f"{key} | 0"], **other}}
        assert claims.page(more) == alone


def test_which_rates_train(claims):
    arms = list(claims.CLAIMS["stable-rate"].arms)
    values = {"alone, rate 0.06": [40.0], "with CLD, rate 0.06": [42.0], "alone, rate 0.5": [10.0]}
    values |= {"with CLD, rate 0.5": [41.0], "alone, rate 2": [None], "with CLD, rate 2": [None]}
    page = claims.page(record(claims, "stable-rate", [values.get(arm, []) for arm in arms]))
    assert "Largest rate that still trains: 0.06 alone, 0.5 with CLD." in page
    assert "| alone, rate 2 | 0 | - (1 of 1 diverged) | - |" in page


def test_nothing_is_claimed_that_was_not_run(claims, tmp_path):
    page = claims.page({}, tmp_path)
    assert "No record of it." in page
    assert page.count("Not run yet.") == len(claims.CLAIMS)
    assert "±" not in page
    assert Path(claims.PAGE).read_text() == claims.page(json.loads(Path(claims.RECORD).read_text())["cells"])


def test_the_papers_claims_come_first(claims):
    """Then the table of all methods, then what the paper does not have."""
    cells = record(claims, "npid", [[30.0, 31.0], [32.0, 32.5]]) | record(
        claims, "simclr", [[30.0, 31.0], [32.0, 32.5]]
    )
    page = claims.page(cells)
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    table = next(i for i, title in enumerate(titles) if "All methods beside each other" in title)
    assert not [title for title in titles[:table] if "not in the paper" in title]
    assert len(titles[:table]) > 20
    assert all("not in the paper" in title for title in titles[table + 1 :])
    assert len(titles) == len(claims.CLAIMS) + 2  # and the settings chosen without labels
    assert page.index("| npid | balanced") < page.index("| simclr | balanced")


def test_no_training_is_done_twice(claims):
    """Two lines of options for the same collection differ in more than what is the default."""
    defaults = {f"--cld.{name}": value.default for name, value in inspect.signature(CrossLevel).parameters.items()}
    defaults |= {f"--method.{name}": value.default for name, value in inspect.signature(MoCo).parameters.items()}
    defaults["--cld.groups"] = 96  # three quarters of a batch of 128
    effective, claimed = {}, {}
    for name, claim in claims.CLAIMS.items():
        for line in claim.arms.values():
            options = dict(option.split("=") for option in line.split())
            left = {o: v for o, v in options.items() if "MoCo" not in line or str(defaults.get(o)).lower() != v}
            effective.setdefault((claim.source, tuple(sorted(left.items()))), set()).add(line)
            claimed.setdefault((claim.source, line), set()).add(name)
    assert [lines for lines in effective.values() if len(lines) > 1] == []
    shared = claimed["balanced", "--method=MoCo --method.online=2 --cld.weight=0.25"]
    assert {"moco", "balanced", "groups", "temperature", "weight", "centroids", "grouping", "init"} < shared
    linear = "--method=MoCo --method.online=2 --cld.weight=0.25 --method.head=linear --cld.head=linear"
    assert claimed["balanced", linear] == {"derived", "heads"}


def test_what_is_recorded_is_still_asked_for(claims):
    """A key is the collection, the options and the seed: a changed one would have its training done again."""
    wanted = {
        claims.key_of(claim.source, line, seed)
        for claim in claims.CLAIMS.values()
        for line in claim.arms.values()
        for seed in range(3)
    }
    recorded = json.loads(Path(claims.RECORD).read_text())["cells"]
    assert len(recorded) >= 19
    assert set(recorded) <= wanted


def test_the_page_tells_of_other_programs_records(claims, tmp_path):
    tuned = {"given": [20.0, 21.0, 22.0], "random": [19.0, 21.0, 23.0], "tune": [21.0, 22.5, 23.0]}
    cells = {
        f"turntable {way} {seed}": {
            "name": "turntable", "way": way, "seed": seed, "knn": value, "about": {"options": ["--epochs=4"]},
        }
        for way, values in tuned.items() for seed, value in enumerate(values)
    }  # fmt: skip
    (tmp_path / "tune.json").write_text(json.dumps({"cells": cells}))
    rows = [{"method": "BYOL", "cld": c, "seeds": 2, "knn": {"mean": m}} for c, m in (("off", 22.675), ("on", 29.835))]
    (tmp_path / "cifar10-lt.json").write_text(json.dumps({"rows": rows}))
    cell = {"source": "turntable", "order": "natural", "seed": 0}
    cells = {g: {**cell, "groups": g, "figures": {"knn": k}} for g, k in (("off", 12.3), ("3/4 of the batch", 23.0))}
    (tmp_path / "correlated.json").write_text(json.dumps({"cells": cells}))
    page = claims.page({}, tmp_path)
    low, high = ttest_rel(tuned["tune"], tuned["given"]).confidence_interval(0.95)
    half = (high - low) / 2
    assert f"tune against given on turntable: +1.17 ± {half:.2f}, " in page
    assert (f"+1.17 ± {half:.2f}, not told apart" in page) == (half > 7 / 6)
    assert "random against given on turntable: +0.00 ±" in page
    assert (
        "tune.py turntable turntable,objects=270,size=24 turntable:test,size=24,test_objects=200 -- --epochs=4`" in page
    )
    tail, alike = (
        page.index("CLD adds, by kNN accuracy of the shared features, BYOL +7.2."),
        page.index("+10.7 on turnta"),
    )
    assert page.index("## Better on long-tailed") < tail < page.index("## Better on highly correlated") < alike
    assert "one seed, which decides nothing" in page


def test_a_ratio_of_positives_to_negatives(claims):
    """In a loop over numbers: exp(s / 0.2) of the own other view over the mean of exp(s / 0.2) of all others' ones."""
    compared = importlib.import_module("quality.claims_views").compared
    a, b = (
        torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(s))) for s in (0, 1)
    )
    ratios, agree = [], []
    for i in range(5):
        scores = [
            math.exp(sum(x * y for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True)) / 0.2) for j in range(5)
        ]
        others = [score for j, score in enumerate(scores) if j != i]
        ratios.append(scores[i] / (sum(others) / 4))
        agree.append(scores[i] > max(others))
    figures = compared(a, b)
    assert figures["contrast"] == pytest.approx(sum(ratios) / 5, rel=1e-5)
    assert figures["agreement"] == pytest.approx(100 * sum(agree) / 5)
    assert compared(a, a)["agreement"] == 100


def test_a_killed_program_goes_on(claims, monkeypatch, tmp_path):
    """What the record has is not trained again; another figure of the same training needs no other training."""
    folder = tmp_path / "cifar10-jpeg"
    for part, seed in (("train", 0), ("test", 1)):
        write_images(folder / part, count=12, size=(16, 16), seed=seed)
    arguments = argparse.Namespace(
        data=str(tmp_path), only=["moco"], seeds=[0], images=100, epochs=1, width=0.0625, batch_size=8,
        minutes=math.inf, runs=str(tmp_path / "runs"), record=str(tmp_path / "claims.json"),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    claims.train_missing(arguments)
    cells = json.loads((tmp_path / "claims.json").read_text())["cells"]
    assert len(cells) == 2
    baselines = {"knn: raw pixels", "knn: untrained encoder"}
    assert all(set(cell["figures"]) == {"knn", *baselines} for cell in cells.values())
    pixels = next(iter(cells.values()))["figures"]["knn: raw pixels"]
    assert f"| raw pixels | | {pixels:.2f} | |" in claims.page(cells)
    runs = sorted((tmp_path / "runs").glob("*/encoder.safetensors"))
    times = [file.stat().st_mtime_ns for file in runs]
    arguments.images = 90
    with monkeypatch.context() as patch:
        patch.setattr(claims, "one", lambda *given: {"figures": {"knn": 1.0}, "failed": {}, "machine": "m", "date": ""})
        arguments.record = str(tmp_path / "other.json")
        Path(arguments.record).write_text((tmp_path / "claims.json").read_text())
        claims.train_missing(arguments)  # of other images nothing is known
    cells = json.loads((tmp_path / "other.json").read_text())["cells"]
    assert [cell["figures"] for cell in cells.values()] == [{"knn": 1.0}] * 2
    arguments.images, arguments.record = 100, str(tmp_path / "claims.json")
    arguments.only = ["moco", "invariance"]
    claims.train_missing(arguments)
    cells = json.loads((tmp_path / "claims.json").read_text())["cells"]
    assert all(set(cell["figures"]) == {"knn", "contrast", "agreement", *baselines} for cell in cells.values())
    assert [file.stat().st_mtime_ns for file in runs] == times
    assert len(runs) == 2


class Detectors:
    """Stand for fine-tuned detectors: the first finds all objects of one image, and each one those of one more."""

    def __init__(self, test):
        self.names, self.test = [], test

    def __call__(self, start, data, settings, name, *rest):
        self.names.append(name)
        return partial(self.boxes, iter(range(len(self.test))), len(self.names))

    def boxes(self, images, many, pixels):
        i = next(images)
        objects = self.test.objects[i]
        rows = len(objects.labels) if i < many else 0
        labels = objects.labels[:rows] + 1  # 0 is the background
        return [{"boxes": objects.boxes[:rows], "labels": labels, "scores": torch.ones(rows)}]


def test_detectors_start_from_a_run_from_random_and_from_supervised_weights(claims, tmp_path):
    """Scenes are the same every time, with whole objects that do not overlap; what runs share is trained once."""
    scenes = importlib.import_module("quality.scenes")
    folder = tmp_path / "cifar10-jpeg"
    for part, seed in (("train", 0), ("test", 1)):
        write_images(folder / part, count=6, size=(32, 32), seed=seed)
    for place in ("a", "b"):
        scenes.write(tmp_path / place, str(folder), 4, 4, 1)
    files = sorted(file for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert all(file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() for file in files)
    train = annotated(parse(f"{tmp_path / 'a'}:train"))
    pixels, objects = train[0]
    assert tuple(pixels.shape) == (3, 96, 96)
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    assert ((sides >= 24) & (sides <= 44)).all()
    for image in train.objects:
        assert torch.equal(box_iou(image.boxes, image.boxes), torch.eye(len(image.boxes)))
    trained, found = Detectors(annotated(parse(f"{tmp_path / 'a'}:test")).numbered_as(train)), []
    for number in range(2):
        torch.manual_seed(number)
        run = tmp_path / str(number)
        run.mkdir()
        encoder = Encoder("resnet18", small_images=True, width=0.0625)
        encoder.adapt(32)
        encoder.save(run / "encoder.safetensors")
        found.append(scenes.precision(run, tmp_path / "a", str(folder / "train"), seed=0, epochs=1, trained=trained))
    assert trained.names == ["random initialization", "trained encoder", "trained encoder", "trained encoder"]
    random, supervised = found[0]["random initialization"], found[0]["supervised encoder"]
    assert 0 < random < supervised < found[0]["trained encoder"] < found[1]["trained encoder"] == pytest.approx(100)
    assert found[1] == {**found[0], "trained encoder": found[1]["trained encoder"]}
