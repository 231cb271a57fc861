"""benchmarks/claims.py: a page of what was measured and of nothing else, from a record that goes on."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
from run_samples import write_images
from scipy.stats import ttest_rel

SIZE = {"size": "--epochs=1", "images": 20, "machine": "m", "date": "2026-01-02"}


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("claims")
    for name in ("claims", "quality.claims_list", "quality.paper", "shared.beside", "shared.records"):
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
    page = claims.page(record(claims, "npid", [without, with_cld]))
    low, high = ttest_rel(with_cld, without).confidence_interval(0.95)
    assert (low + high) / 2 == pytest.approx(2.0)
    half = (high - low) / 2
    assert f"with CLD against alone: +2.00 ± {half:.2f}, better." in page
    assert f"| with CLD | 3 | 34.00 ± {claims.interval(with_cld)[1]:.2f} | +2.00 ± {half:.2f} |" in page
    # the same trainings are two other claims' as well, none of them has a figure of its own
    assert page.count("Not run yet.") == len(claims.CLAIMS) - 2
    worse = claims.page(record(claims, "npid", [with_cld, without]))
    assert f"-2.00 ± {half:.2f}, worse." in worse
    unclear = claims.page(record(claims, "npid", [without, [36.0, 30.0, 31.0]]))
    assert "not told apart from nothing" in unclear
    assert "decides nothing" in claims.page(record(claims, "npid", [[30.0], [31.0]]))


def test_which_rates_train(claims):
    arms = list(claims.CLAIMS["stable-rate"].arms)
    values = {"alone, rate 0.06": [40.0], "with CLD, rate 0.06": [42.0], "alone, rate 0.5": [10.0]}
    values |= {"with CLD, rate 0.5": [41.0], "alone, rate 2": [None], "with CLD, rate 2": [None]}
    page = claims.page(record(claims, "stable-rate", [values.get(arm, []) for arm in arms]))
    assert "Largest rate that still trains: 0.06 alone, 0.5 with CLD." in page
    assert "| alone, rate 2 | 0 | - (1 of 1 diverged) | - |" in page


def test_nothing_is_claimed_that_was_not_run(claims):
    page = claims.page({})
    assert page.count("Not run yet.") == len(claims.CLAIMS)
    assert "±" not in page
    assert Path(claims.PAGE).read_text() == claims.page(json.loads(Path(claims.RECORD).read_text())["cells"])


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
    arguments.only = ["moco", "invariance"]
    claims.train_missing(arguments)
    cells = json.loads((tmp_path / "claims.json").read_text())["cells"]
    assert all(set(cell["figures"]) == {"knn", "contrast", "agreement", *baselines} for cell in cells.values())
    assert [file.stat().st_mtime_ns for file in runs] == times
    assert len(runs) == 2
