"""The search end to end with real trainings; what it leaves; and that no label is read."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

optuna = pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")

from crosslevel.data.images import Images, ImageView, InMemoryImages
from crosslevel.data.open import _named, open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import take, unlabelled
from crosslevel.models.encoder import load_encoder
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.tuning import report as results
from crosslevel.tuning import trial
from crosslevel.tuning.plan import Plan, url
from crosslevel.tuning.search_space import Numbers
from crosslevel.tuning.tune import tune

pytestmark = pytest.mark.slow

IMAGES = "turntable:train,classes=2,objects=20,frames=4,size=16,imbalance=2"
TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu"]


class Guarded:
    """Labels that may be had, but not read."""

    def __set__(self, thing, value):
        vars(thing)["hidden labels"] = value

    def __get__(self, thing, owner=None):
        if thing is not None and vars(thing).get("hidden labels") is not None:
            raise AssertionError("labels were read")


class Told(trial.Channel):
    """Figures for the test, and always leave to go on."""

    def __init__(self):
        super().__init__(io.StringIO(), None)

    def tell(self, figures):
        self.out.write(json.dumps(figures) + "\n")


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(Images, "labels", Guarded(), raising=False)
    _named.cache_clear()
    yield
    _named.cache_clear()


def photos(folder, count=40):
    """Noisy pictures in two classes' folders."""
    noise = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 255, (16, 16, 3), generator=noise, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i:03}.png")
    return folder


def base(folder, **changed):
    """The settings that all trials have in common, as `tune` writes them."""
    tree = {
        "encoder": {"width": 0.0625}, "views": {"size": 16}, "batch_size": 8, "device": "cpu", "epochs": 2, "seed": 0,
        "method": {"class_path": "crosslevel.methods.MoCo"},
    }  # fmt: skip
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump(tree | changed))
    return file


@pytest.mark.parametrize("kind", ["named", "files"])
def test_no_label_is_read(tmp_path, guarded, kind):
    """A source whose labels cannot be read without an error, through a whole trial, its scores included."""
    source = IMAGES if kind == "named" else str(photos(tmp_path / "photos"))
    with pytest.raises(AssertionError, match="labels were read"):
        _ = open_images(source).labels
    told = Told()
    trial.trained(source, base(tmp_path), tmp_path / "run", [], told)
    scores = [json.loads(line) for line in told.out.getvalue().splitlines()]
    assert len(scores) == 2
    assert all(0 <= one["combined"] <= 1 for one in scores)
    assert not any(row["knn"] for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()))


def test_unlabelled_images_are_the_same_images():
    source = Turntable(classes=2, objects=4, frames=3, size=16, imbalance=1)
    bare = unlabelled(source)
    assert (bare.labels, bare.classes) == (None, None)
    assert source.labels is not None
    assert torch.equal(bare.tracks, source.tracks)
    assert torch.equal(bare[5][0], source[5][0])
    assert bare[5][1] == -1
    assert unlabelled(ImageView(source, torch.tensor([3])))[0][1] == -1


def test_what_is_held_out_is_whole_tracks_and_not_trained_on():
    source = open_images(IMAGES)
    held = trial.HeldOut(0, Told())
    rest = held.part(source)
    assert len(rest) + len(held.held) == len(source) == 80
    assert not set(rest.tracks.tolist()) & set(held.held.tracks.tolist())
    assert 16 <= len(held.held) < 20
    assert rest.labels is None
    other = trial.HeldOut(0, Told())
    other.part(source)
    assert other.held.paths == held.held.paths
    with pytest.raises(ValueError, match="12 images are too few to tune on: at least 64"):
        held.part(take(source, torch.arange(12)))


@pytest.mark.parametrize(("films", "frames", "held"), [(1, 100, 16), (3, 300, 90), (20, 300, 600), (4, 20_001, 2000)])
def test_of_films_stretches_are_held_out_that_can_be_told_apart(films, frames, held):
    count = films * frames
    source = InMemoryImages(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(count, 3, 1, 1), [str(i) for i in range(count)]
    )
    source.tracks = torch.arange(count) // frames
    rest, out = trial.divided(source, 0)
    assert len(rest) + len(out) == count
    longest = held // 4
    assert held - longest < len(out) < held + longest
    assert len(out) <= 2000
    numbers = torch.tensor([int(path) for path in out.paths])
    for track in out.tracks.unique():
        own = numbers[out.tracks == track]
        assert len(own) <= longest
        assert torch.equal(own, torch.arange(int(own[0]), int(own[0]) + len(own)))
        assert len((own // frames).unique()) == 1
    assert len(out.tracks.unique()) >= 4


@pytest.mark.parametrize(("tracks", "frames"), [(38, 26), (33, 30), (25, 8), (270, 20)])
def test_tracks_are_not_cut_where_enough_of_them_are_held_out_whole(tracks, frames):
    count = tracks * frames
    source = InMemoryImages(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(count, 3, 1, 1), [str(i) for i in range(count)]
    )
    source.tracks = torch.arange(count) // frames
    rest, out = trial.divided(source, 0)
    owners = [{int(path) // frames for path in part.paths} for part in (rest, out)]
    assert not owners[0] & owners[1]
    assert len(out.tracks.unique()) == len(owners[1]) >= 3


def test_scores_do_not_depend_on_a_trials_own_views(tmp_path, monkeypatch):
    """A trial with weaker views would have found its task easier: seen through one network, all scores are equal."""

    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :32]

    monkeypatch.setattr("crosslevel.training.monitor.frozen", lambda encoder: Pixels())
    seen = []
    for preset in ("none", "simclr"):
        told = Told()
        options = [f"--views.preset={preset}", "--cld.weight=0", "--epochs=1"]
        trial.trained(IMAGES, base(tmp_path), tmp_path / preset, options, told)
        seen.append(json.loads(told.out.getvalue()))
        del seen[-1]["instance_rank"]  # of the trial's own heads
    assert seen[0] == seen[1]
    assert seen[0]["alignment"] > 0


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One small search, in its own processes, told twice: the second call finds the work done."""
    home = tmp_path_factory.mktemp("search")
    line = [
        IMAGES, *TINY, "--epochs=1", "--budget=2", "--jobs=2", "-o", str(home / "s"), "--method=simclr",
        "--search", "cld.groups=2:8:log", "--search=cld.weight=0:1", "--search", "lr=1e-3:0.1:log",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "stdout", io.StringIO())
        run(tune, line)
        first = sys.stdout.getvalue()
        run(tune, line)
        again = sys.stdout.getvalue()[len(first) :]
    return types.SimpleNamespace(folder=home / "s", first=first, again=again)


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


def test_the_page_shows_how_much_each_setting_matters(tmp_path):
    """Which takes more trials than the small search has."""
    plan = dataclasses.replace(planned(tmp_path), space={"lr": Numbers(0.0, 1.0), "cld.weight": Numbers(0.0, 1.0)})
    study = optuna.create_study(direction="maximize")
    for i in range(12):
        lr = (i + 0.5) / 12
        study.add_trial(optuna.create_trial(
            value=1 - lr, params={"lr": lr, "cld.weight": (5 * i % 12) / 12}, intermediate_values={2: 1 - lr},
            distributions={name: optuna.distributions.FloatDistribution(0, 1) for name in plan.space},
            user_attrs={"outcome": "complete", "figures": {"combined": 1 - lr}},
        ))  # fmt: skip
    results.leave(study, plan, "photos", {"lr": 0.1, "cld": {"weight": 0.1}}, Console(file=io.StringIO()))
    assert ">Importance, %<" in (tmp_path / "report.html").read_text()


def test_a_training_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = trial.training(IMAGES, base(tmp_path), ["--cld.groups=99"], tmp_path / "run", 1)
    with pytest.raises(trial.Failed, match=r"^cld.groups=99 exceeds the batch of 8 images") as error:
        list(steps)
    assert error.value.kind == "refused"


def test_importance_finds_what_matters():
    space = {"a": optuna.distributions.FloatDistribution(0, 1), "b": optuna.distributions.FloatDistribution(0, 1)}
    draws = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).tolist()
    trials = [optuna.create_trial(params={"a": a, "b": b}, distributions=space, value=0.0) for a, b in draws]
    shares = results.importance([(t, t.params["b"] ** 2) for t in trials])
    assert next(iter(shares)) == "b"
    assert shares["b"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert results.importance([(t, 0.5) for t in trials]) == {}


def planned(folder):
    return Plan(
        folder=folder, storage=url(None, folder), space={"lr": Numbers(0.0, 1.0)}, start=[], epochs=2, budget=2.0,
        trials=None, sampler="tpe", pruning=True, seed=0, agreed={},
    )  # fmt: skip


def test_a_search_in_which_nothing_ended_well_says_so(tmp_path):
    plan = planned(tmp_path)
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.create_trial(
        state=optuna.trial.TrialState.FAIL, params={"lr": 0.5},
        distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
        user_attrs={"outcome": "failed", "reason": "out of memory"},
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"no trial came to its end \(1 failed\), the last one: out of memory"):
        results.leave(study, plan, "photos", {}, Console(file=io.StringIO()))
    assert "out of memory" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "config.yaml").exists()


def test_a_stopped_trial_is_never_the_best(tmp_path):
    """Optuna gives it its last score as its value."""
    plan = planned(tmp_path)
    study = optuna.create_study(direction="maximize")

    def add(state, score, lr, outcome):
        study.add_trial(optuna.create_trial(
            state=state, value=score, params={"lr": lr}, intermediate_values={1: score},
            distributions={"lr": optuna.distributions.FloatDistribution(0, 1)},
            user_attrs={"outcome": outcome, "reason": outcome, "figures": {"combined": score}},
        ))  # fmt: skip

    states = optuna.trial.TrialState
    add(states.PRUNED, 0.9, 0.9, "diverged")
    with pytest.raises(ValueError, match="no trial came to its end"):
        results.leave(study, plan, "photos", {"lr": 0.1}, Console(file=io.StringIO()))
    add(states.COMPLETE, 0.4, 0.4, "complete")
    said = io.StringIO()
    results.leave(study, plan, "photos", {"lr": 0.1}, Console(file=said, width=200))
    assert "Trial 1 scored best: 0.4000." in said.getvalue()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.4


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


def without_trainings(monkeypatch, epochs=1):
    """Figures in place of trainings."""

    def told(images, base, options, folder, threads):
        for _ in range(epochs):
            yield {"combined": 0.5, "effective_rank": 5.0, "mrr": 0.5}

    monkeypatch.setattr(trial, "training", told)


def test_the_search_itself_reads_no_label_either(tmp_path, guarded, monkeypatch):
    """What reads the source to plan, to name and to continue the search."""
    without_trainings(monkeypatch)
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


def tune_(source, *options):
    return run(tune, [str(source), *TINY, "--epochs=1", "--trials=2", *options])


def test_collections_of_one_name_do_not_share_a_search(tmp_path, monkeypatch, capsys):
    without_trainings(monkeypatch)
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
    without_trainings(monkeypatch)
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    folder = tune_("photos@repeat=2", "--output=s")
    assert yaml.safe_load((folder / "config.yaml").read_text())["images"] == f"{tmp_path}/photos@repeat=2"


def test_objects_of_annotated_images_are_searched_without_their_classes(tmp_path, guarded):
    """With --crops it is objects that are held out and scored; their classes are not read."""
    source = annotated(tmp_path / "coco")
    crops = {"margin": 0.1, "min_size": 4, "square": True}
    told = Told()
    trial.trained(str(source), base(tmp_path, crops=crops), tmp_path / "run", ["--epochs=1"], told)
    assert 0 <= json.loads(told.out.getvalue())["combined"] <= 1


def annotated(folder, count=40):
    """A COCO file and its images, two objects in each."""
    (folder / "annotations").mkdir(parents=True)
    files = sorted((photos(folder / "made", count) / "cat").iterdir())
    (folder / "made" / "cat").rename(folder / "val2017")
    boxes = [(i, box) for i in range(len(files)) for box in ([0, 0, 8, 8], [6, 6, 9, 9])]
    tree = {
        "images": [{"id": i, "file_name": file.name, "width": 16, "height": 16} for i, file in enumerate(files)],
        "annotations": [
            {"id": n, "image_id": i, "bbox": box, "category_id": 1 + n % 2, "iscrowd": 0, "area": 64}
            for n, (i, box) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(tree))
    return file


def test_a_search_of_objects_counts_objects(tmp_path, monkeypatch, capsys):
    without_trainings(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tune_(annotated(tmp_path / "coco"), "--crops.min_size=4")
    assert "its study began" not in capsys.readouterr().out
    [best] = tmp_path.glob("runs/tune/*/config.yaml")
    assert yaml.safe_load(best.read_text())["crops"]["min_size"] == 4


def test_what_is_not_as_given_is_said_and_not_called_so(tmp_path, monkeypatch, capsys):
    without_trainings(monkeypatch)
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


def test_who_searches_views_is_told_what_the_score_can_do(tmp_path, monkeypatch, capsys):
    without_trainings(monkeypatch)
    tune_(IMAGES, f"--output={tmp_path}/s", "--search=views.preset=cifar,simclr", "--search=lr=0.01:0.1")
    assert "views.preset: the score compares settings with different views less surely" in capsys.readouterr().out


def test_ctrl_c_before_anything_is_whole_is_a_stop_and_no_error(tmp_path, monkeypatch, capsys):
    def stopped(images, base, options, folder, threads):
        raise trial.Failed("failed", "no")
        yield

    monkeypatch.setattr(trial, "training", stopped)

    def interrupted(*arguments):
        _work(*arguments)
        raise KeyboardInterrupt

    from crosslevel.tuning import tune as module

    _work = module._work
    monkeypatch.setattr(module, "_work", interrupted)
    with pytest.raises(SystemExit) as stop:
        tune_(IMAGES, f"--output={tmp_path}/s")
    assert stop.value.code == 130
    assert "crosslevel tune: stopped" in capsys.readouterr().err


def test_a_full_disk_is_no_fault_of_the_settings(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("crosslevel train: [Errno 28] No space left on device: '/x'\n")
    assert trial._failure(2, log).kind == "failed"
    log.write_text("crosslevel train: cld.groups=99 exceeds the batch of 8 images\n")
    assert trial._failure(2, log).kind == "refused"


def test_a_killed_search_takes_its_training_along(tmp_path, monkeypatch):
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
    without_trainings(monkeypatch, epochs=50)
    run(tune, [IMAGES, *TINY, "--epochs=50", "--trials=1", f"--output={tmp_path}/s"])
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


def test_a_trial_whose_images_are_read_by_workers_comes_to_its_end(tmp_path):
    """They are forked while a thread waits for the search's answer."""
    steps = trial.training(
        str(photos(tmp_path / "photos")), base(tmp_path, workers=2, memory=0.0), ["--epochs=2"], tmp_path / "run", 1
    )
    assert len(list(steps)) == 2
