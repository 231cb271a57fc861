"""The demo, at a size for tests, and its page in a real browser."""

import csv
import io
import shlex
import sys
from contextlib import redirect_stdout

import pytest
import torch
import yaml

from crosslevel import demo, load_encoder
from crosslevel.evaluation.scores import Scores
from crosslevel.settings.command import Command
from crosslevel.settings.parser import prepared, run
from crosslevel.settings.parts import completed
from crosslevel.training.train import train
from crosslevel.utils.device import choose

IMAGES = "turntable,classes=4,objects=24,frames=6,size=16,imbalance=4"
TEST = "turntable:test,classes=4,objects=24,size=16,imbalance=4,test_objects=3,test_frames=4"


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo") / "demo"
    options = ["--epochs=2", "--width=0.0625", "--device=cpu"]
    with redirect_stdout(io.StringIO()) as said:
        page = run(demo.demo, [f"--images={IMAGES}", f"--test={TEST}", f"--folder={home}", *options])
    return page, said.getvalue()


@pytest.fixture
def shown(demonstrated):
    """The page."""
    return demonstrated[0]


def test_it_ends_with_what_comes_next(demonstrated):
    page, said = demonstrated
    assert said.splitlines()[-1].endswith(f"look at {page}; next: crosslevel train PATH-TO-YOUR-IMAGES")


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_both_runs_differ_in_the_group_branch_alone(shown):
    plain, cld = (shown.parent / name for name in ("plain", "cld"))
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (plain, cld)]
    assert settings[0].pop("cld") == {**settings[1].pop("cld"), "weight": 0.0}
    assert settings[0] == settings[1]
    first = [next(r for r in rows(folder) if r["loss"]) for folder in (plain, cld)]
    assert len(rows(plain)) == len(rows(cld))
    assert first[0]["group_loss"] == ""
    assert float(first[1]["group_loss"]) > 0


def test_the_networks_end_different(shown):
    a, b = (load_encoder(shown.parent / name).backbone.conv1.weight for name in ("plain", "cld"))
    assert not torch.equal(a, b)


def test_the_page_has_the_table_and_every_picture(shown):
    page = shown.read_text()
    for row in ("raw pixels", "untrained encoder", "without CLD", "with CLD"):
        assert row in page
    for heading in ("kNN accuracy, %", "Instance loss", "kNN accuracy during training", "Groups that CLD finds"):
        assert f">{heading}<" in page
    for heading in ("Nearest neighbours", "Map of the features", "Next, on your own folder"):
        assert f">{heading}<" in page


def trainings(folder, **given):
    """What the demo hands to crosslevel.train, of both runs; there is nothing that trains."""
    calls = []
    with pytest.raises(FileNotFoundError):  # as no run has left an encoder
        demo.demo(IMAGES, TEST, str(folder), device="cpu", training=lambda *a, **k: calls.append((a, k)), **given)
    return calls


def test_nothing_is_hidden(tmp_path):
    """Both runs have the default settings, but for a few epochs and a narrow network."""
    plain, cld = trainings(tmp_path / "demo", epochs=2)
    assert plain[0] == cld[0] == (IMAGES,)
    shared = {"epochs", "encoder", "seed", "device", "precision", "report_html", "run", "quiet"}
    assert [set(settings) for _, settings in (plain, cld)] == [shared | {"cld"}, shared]
    assert plain[1]["cld"] == {"weight": 0}
    assert set(plain[1]["encoder"]) == set(cld[1]["encoder"]) == {"width"}


def test_the_command_that_is_printed_means_the_same_settings(tmp_path, capsys):
    calls = trainings(tmp_path / "demo", epochs=2)
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("crosslevel train ")]
    assert len(lines) == len(calls) == 2
    command = Command.of_function(train)
    for line, (positional, keywords) in zip(lines, calls, strict=True):
        printed = prepared(command, shlex.split(line)[2:])
        for name, value in completed(train, positional, keywords).items():
            if name in ("encoder", "cld"):
                assert {key: printed[name][key] for key in value.keywords} == value.keywords
            elif name != "quiet":
                assert printed[name] == value
        assert (printed["cld"]["weight"] == 0) == ("cld" in keywords)


def judged(balanced, half):
    return Scores({"balanced": balanced}, {"balanced": (balanced - half, balanced + half)})


@pytest.mark.parametrize(
    ("with_cld", "without", "said"),
    [
        (61.0, 57.0, "4.0 points higher (±2.8)"),
        (55.0, 58.0, "3.0 points lower (±2.8)"),
        (60.0, 58.0, "not different beyond chance (+2.0 ±2.8)"),
    ],
)
def test_a_difference_within_the_interval_is_no_gain(with_cld, without, said):
    row = {"with CLD": judged(with_cld, 2.0), "without CLD": judged(without, 2.0), "raw pixels": judged(20.0, 1.0)}
    sentence = demo.verdict_of(row)
    assert said in sentence
    assert "Raw pixels" not in sentence


def test_raw_pixels_are_named_where_they_win():
    row = {"with CLD": judged(30.0, 1.0), "without CLD": judged(24.0, 1.0), "raw pixels": judged(30.5, 1.0)}
    sentence = demo.verdict_of(row)
    assert "Raw pixels are as good: 30.5 % beside the network with CLD." in sentence
    assert "Raw pixels win: 30.5 % beside the network without CLD." in sentence


@pytest.mark.parametrize(("seconds", "epochs"), [(10.0, 2), (1.0, 3), (0.4, 8), (0.001, 12)])
def test_a_slow_machine_is_given_fewer_epochs(seconds, epochs):
    """Of 4,000 images, in half of four minutes, with a tenth of it for all that is no step."""
    images = "turntable,objects=200,size=8"
    found, rate = demo.affordable(images, 0.0625, choose("cpu"), lambda *parts: seconds)
    assert rate == pytest.approx(128 / seconds)
    assert found == epochs


def test_a_demo_without_a_number_of_epochs_says_how_many_it_does(tmp_path, capsys):
    seen = []

    def training(images, **settings):
        seen.append(settings["epochs"])
        sys.exit(9)

    with pytest.raises(SystemExit):
        demo.demo(f"{IMAGES}", TEST, str(tmp_path / "demo"), width=0.0625, device="cpu", training=training)
    said = capsys.readouterr().out
    assert f"{seen[0]} epochs: this machine trains about " in said
    # So few images are done that often on any machine.
    assert seen == [12]


def test_an_earlier_demo_is_kept(shown):
    assert demo.free_folder(shown.parent).name == "demo-2"


@pytest.mark.browser
def test_the_page_in_a_browser(shown, browser):
    browser.get(shown.as_uri())
    assert browser.title
    pictures = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(pictures) > 50
    assert all(complete and width > 0 for complete, width in pictures)
    charts = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter(s => s.checkVisibility())"
        ".map(s => s.getBoundingClientRect().width)"
    )
    assert len(charts) >= 3
    assert min(charts) > 100
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in asked)
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
