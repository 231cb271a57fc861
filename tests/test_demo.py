"""The demo, at a size for tests, and its page in a real browser."""

import csv
import sys

import pytest
import torch

from crosslevel import demo, load_encoder
from crosslevel.evaluation.scores import Scores
from crosslevel.settings.parser import run

IMAGES = "turntable,classes=4,objects=24,frames=6,size=16,imbalance=4"
TEST = "turntable:test,classes=4,objects=24,size=16,imbalance=4,test_objects=3,test_frames=4"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo") / "demo"
    options = ["--epochs=2", "--batch_size=32", "--width=0.0625", "--device=cpu"]
    return run(demo.demo, [f"--images={IMAGES}", f"--test={TEST}", f"--folder={home}", *options])


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_both_runs_differ_in_the_group_branch_alone(shown):
    plain, cld = (shown.parent / name for name in ("moco", "moco-cld"))
    settings = [(folder / "config.yaml").read_text().splitlines() for folder in (plain, cld)]
    different = {line.split(":")[0].strip() for line in set(settings[0]) ^ set(settings[1])}
    assert different == {"weight"}
    first = [next(r for r in rows(folder) if r["loss"]) for folder in (plain, cld)]
    assert len(rows(plain)) == len(rows(cld))
    assert first[0]["group_loss"] == ""
    assert float(first[1]["group_loss"]) > 0


def test_the_networks_end_different(shown):
    a, b = (load_encoder(shown.parent / name).backbone.conv1.weight for name in ("moco", "moco-cld"))
    assert not torch.equal(a, b)


def test_the_page_has_the_table_and_every_picture(shown):
    page = shown.read_text()
    for row in ("raw pixels", "untrained encoder", "MoCo", "MoCo + CLD"):
        assert row in page
    for heading in ("kNN accuracy, %", "Instance loss", "kNN accuracy during training", "Groups that CLD finds"):
        assert f">{heading}<" in page
    for heading in ("Nearest neighbours", "Map of the features", "Next, on your own folder"):
        assert f">{heading}<" in page


@pytest.mark.parametrize(
    ("with_cld", "without", "sentence"),
    [(61.0, 58.0, "3.0 points higher"), (55.5, 58.0, "2.5 points lower"), (58.01, 58.0, "is the same")],
)
def test_whichever_wins_is_said(with_cld, without, sentence):
    figures = {"MoCo": Scores({"balanced": without}), "MoCo + CLD": Scores({"balanced": with_cld})}
    assert sentence in demo._verdict(figures)


@pytest.mark.parametrize(("rate", "epochs"), [(1, 2), (160, 2), (300, 3), (400, 4), (540, 6), (20_000, 6)])
def test_a_slow_machine_is_given_fewer_epochs(rate, epochs):
    """Of the default images; at 300 a second two runs of three epochs take 216 seconds."""
    assert demo.affordable(rate, 10_800) == epochs


def test_a_demo_without_a_number_of_epochs_says_how_many_it_does(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(demo.commands, "run", lambda function, line: seen.append(line) or sys.exit(9))
    with pytest.raises(SystemExit):
        demo.demo(f"{IMAGES}", TEST, str(tmp_path / "demo"), width=0.0625, device="cpu")
    [epochs] = [option for option in seen[0] if option.startswith("--epochs=")]
    said = capsys.readouterr().out
    assert f"{epochs.partition('=')[2]} epochs: this machine trains about " in said
    # So few images are done six times on any machine.
    assert epochs == "--epochs=6"


def test_an_earlier_demo_is_kept(shown):
    assert demo._free(shown.parent).name == "demo-2"


@pytest.mark.browser
def test_the_page_in_a_browser(shown, browser):
    browser.get(shown.as_uri())
    assert browser.title
    pictures = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(pictures) > 50
    assert all(complete and width > 0 for complete, width in pictures)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(charts) >= 3
    assert min(charts) > 100
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in asked)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
