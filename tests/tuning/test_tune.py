"""The search end to end with real trainings, what it leaves, and what it refuses."""

import contextlib
import csv
import functools
import io
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from forked import forked_training
from tune_samples import IMAGES, TINY, annotated, photos, scores, tune_

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.data.open import open_images
from crosslevel.models.encoder import load_encoder
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning import trial
from crosslevel.tuning.plan import url
from crosslevel.tuning.tune import tune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One small search, in its own processes, told twice: the second call finds the work done."""
    home = tmp_path_factory.mktemp("search")
    line = [
        IMAGES, *TINY, "--epochs=1", "--budget=2", "--jobs=2", "-o", str(home / "s"), "--method=simclr",
        "--search", "cld.groups=2:8:log", "--search=cld.weight=0:1", "--search", "lr=1e-3:0.1:log",
    ]  # fmt: skip
    said = []
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(tune, line, training=forked_training)
        said.append(out.getvalue())
    return types.SimpleNamespace(folder=home / "s", first=said[0], again=said[1])


def test_a_search_leaves_settings_ready_to_train_with(found, tmp_path):
    settings = yaml.safe_load((found.folder / "config.yaml").read_text())
    assert settings["images"] == IMAGES
    assert settings["method"]["class_path"].endswith("SimCLR")
    with (found.folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    whole = [row for row in trials if row["outcome"] == "complete"]
    best = max(whole, key=lambda row: float(row["combined"]))
    assert settings["lr"] == float(best["lr"])
    assert settings["cld"]["weight"] == float(best["cld.weight"])
    assert settings["cld"]["groups"] == int(best["cld.groups"])
    assert (float(trials[0]["cld.weight"]), int(trials[0]["cld.groups"])) == (0.25, 6)
    assert (float(trials[1]["cld.weight"]), trials[1]["lr"]) == (0.0, trials[0]["lr"])
    run(train, ["--config", str(found.folder / "config.yaml"), f"--run={tmp_path}/r", "--report_html=false"])
    assert load_encoder(tmp_path / "r").num_features == 32


def test_a_search_says_what_it_does_and_does_no_more_than_it_was_told(found):
    with (found.folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert sum(float(row["cost"]) for row in trials) == 2
    assert {row["outcome"] for row in trials} <= {"complete", "diverged", "collapsed"}
    assert all(row["reason"] for row in trials if row["outcome"] != "complete")
    assert "trial 0  complete" in found.first
    assert "trial " not in found.again.split("Trials")[0]
    assert f"crosslevel train --config {found.folder}/config.yaml" in found.again
    assert not list((found.folder / "workers").iterdir())
    assert not list(found.folder.glob("trials/*/checkpoints"))


def test_the_page_shows_history_settings_and_all_trials(found):
    page = (found.folder / "report.html").read_text()
    for heading in ("What was searched", "Best settings found", "History", "Parallel coordinates", "All trials"):
        assert f">{heading}<" in page
    assert "No label was read" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--search=cld.gruops=2:8"], "did you mean cld.groups"),
        (["--budget=0.5"], "give at least one full training"),
        (["--jobs=0"], "jobs=0"),
        (["--budget=3", "--finalists=2"], "give more --budget or fewer --finalists"),
        (["--trials=3", "--finalists=1"], "finalists=1: they are trained out of a budget: give --budget"),
        (["--storage=nowhere"], "--storage nowhere: give an address"),
        (["--epoch=3"], "--epoch"),
        (["--run=here"], "--run"),
    ],
)
def test_wrong_use_ends_in_one_line(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tune, [IMAGES, *TINY, *options, f"--output={tmp_path}/s"])
    written = capsys.readouterr().err
    assert (stop.value.code, written.count("\n")) == (2, 1)
    assert said in written


def test_a_missing_optuna_names_the_install_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in [n for n in sys.modules if n.startswith("crosslevel.tuning.study")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("crosslevel.tuning.study", raising=False)
    with pytest.raises(SystemExit):
        run(tune, [IMAGES])
    assert "pip install 'crosslevel[tune]'" in capsys.readouterr().err


def test_the_search_itself_reads_no_label_either(tmp_path, guarded):
    """What reads the source to plan, to name and to continue the search."""
    source = photos(tmp_path / "photos")
    chosen = tmp_path / "part.txt"
    chosen.write_text("".join(f"{name}/{i:03}.png\t{c}\n" for c, name in enumerate(("cat", "dog")) for i in range(38)))
    given = (IMAGES, str(source), f"{source}@repeat=2", f"{source}@list={chosen}")
    for images_ in given:
        with pytest.raises(AssertionError, match="labels were read"):
            _ = open_images(images_).labels
    for images_ in given:
        for _ in range(2):
            folder = tune_(images_, f"--output={tmp_path / images_.replace('/', '-')}")
        assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("part", ["@imbalance=10", "@pareto=6", "@repeat=2@classes=x.txt"])
def test_a_part_that_is_chosen_by_labels_is_refused(tmp_path, guarded, capsys, part):
    source = f"{photos(tmp_path / 'photos')}{part}"
    with pytest.raises(SystemExit):
        tune_(source)
    said = capsys.readouterr().err
    assert f"and {part[part.rindex('@') :]} chooses images by labels: write a list with crosslevel subset" in said
    assert said.count("\n") == 1


def test_collections_of_one_name_do_not_share_a_search(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = [photos(tmp_path / "a" / "photos"), photos(tmp_path / "b" / "photos", 36)]
    first, second = (tune_(place) for place in places)
    assert first != second
    assert tune_(tmp_path / "a" / ".." / "a" / "photos") == first
    with pytest.raises(SystemExit):
        tune_(places[1], f"--output={first}")
    assert "its study began with other settings: images=80 images, " in capsys.readouterr().err
    seeds = [tune_(IMAGES), tune_(f"{IMAGES},seed=1")]
    assert seeds[0] != seeds[1]


def test_the_best_settings_find_the_images_from_any_folder(tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    folder = tune_("photos@repeat=2", "--output=s")
    assert yaml.safe_load((folder / "config.yaml").read_text())["images"] == f"{tmp_path}/photos@repeat=2"


def test_a_search_of_objects_counts_objects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tune_(annotated(tmp_path / "coco"), "--crops.min_size=4")
    assert "its study began" not in capsys.readouterr().out
    [best] = tmp_path.glob("runs/tune/*/config.yaml")
    assert yaml.safe_load(best.read_text())["crops"]["min_size"] == 4


def test_what_is_not_as_given_is_said_and_not_called_so(tmp_path, capsys):
    tune_(IMAGES, f"--output={tmp_path}/s", "--search=cld.groups=2:4", "--search=optimizer=adamw,lars")
    out = capsys.readouterr().out
    assert "cld.groups=6, which is not in 2:4: trial 0 has 4" in out
    assert "optimizer=sgd, which is not in adamw,lars: trial 0 has one by chance" in out
    assert "as given" not in out
    tune_(IMAGES, f"--output={tmp_path}/t", "--search=cld.groups=2:8", "--search=optimizer=adamw,sgd")
    out = capsys.readouterr().out
    assert "which is not in" not in out
    assert "different views" not in out
    assert "The settings as given scored best" in out


def test_who_searches_views_is_told_what_the_score_can_do(tmp_path, capsys):
    tune_(IMAGES, f"--output={tmp_path}/s", "--search=views.preset=cifar,simclr", "--search=lr=0.01:0.1")
    assert "views.preset: the score compares settings with different views less surely" in capsys.readouterr().out


def test_ctrl_c_before_anything_is_whole_is_a_stop_and_no_error(tmp_path, capsys):
    def stopped(images, base, options, folder, threads):
        if folder.name != "0000":
            raise KeyboardInterrupt
        raise trial.Failed("failed", "no")
        yield

    with pytest.raises(SystemExit) as stop:
        tune_(IMAGES, f"--output={tmp_path}/s", training=stopped)
    assert stop.value.code == 130
    assert "crosslevel tune: stopped" in capsys.readouterr().err


def test_a_killed_search_takes_its_training_along(tmp_path):
    """SIGKILL, which nobody can catch; and the next call does the trial again."""
    line = [
        sys.executable, "-c", "from crosslevel.cli import main; main()", "tune", IMAGES, *TINY, "--epochs=50",
        "--trials=1", f"--output={tmp_path}/s",
    ]  # fmt: skip
    process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "s" / "trials" / "0000" / "metrics.csv"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.1)
    [child] = children(process.pid)
    process.kill()
    process.wait()
    for _ in range(600):
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)
    study = optuna.load_study(study_name="s", storage=url(None, tmp_path / "s"))
    assert [t.state.name for t in study.trials] == ["RUNNING"]
    line = [IMAGES, *TINY, "--epochs=50", "--trials=1", f"--output={tmp_path}/s"]
    run(tune, line, training=functools.partial(scores, epochs=50))
    lost, again = study.get_trials()
    assert (lost.user_attrs["outcome"], lost.user_attrs["reason"]) == ("killed", "its worker died")
    assert (again.params, again.state.name) == (lost.params, "COMPLETE")
    assert not list((tmp_path / "s" / "workers").iterdir())


def children(pid):
    """Of all its threads."""
    return [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]


def running(pid):
    """Not even as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
