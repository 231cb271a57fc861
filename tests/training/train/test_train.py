"""The main job, end to end, on small images and a small network."""

import pytest
import torch
import yaml
from run_samples import losses, metrics, write_images
from train_samples import FAST, TINY, same_weights

from crosslevel import load_encoder
from crosslevel.runs import load_cld
from crosslevel.settings.parser import run
from crosslevel.training.train import train

METHODS = ["MoCo", "SimCLR", "NPID", "BYOL", "InfoMin", "VICReg", "SimSiam", "SwAV", "DINO"]


@pytest.mark.parametrize(
    ("method", "weight"), [*((method, 0.25) for method in METHODS), ("MoCo", 0.0), ("SimCLR", 0.0)]
)
def test_a_run_leaves_an_encoder_logs_and_settings(photos, tmp_path, method, weight):
    run(train, [str(photos), *FAST, "--method", method, "--epochs=2", f"--cld.weight={weight}", f"--run={tmp_path}/r"])
    folder = tmp_path / "r"
    rows = metrics(folder)
    assert [int(r["step"]) for r in rows if r["loss"]] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["epoch"] == "2"
    assert all((r["group_loss"] != "") == (weight > 0) for r in rows if r["loss"])
    assert any(r["knn"] for r in rows)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert list((folder / "tensorboard").iterdir())
    assert not (folder / "bad_files.txt").exists()
    assert load_encoder(folder)(torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    assert load_encoder(folder).view.size == 16
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["method"]["class_path"].endswith(method)
    assert saved["cld"]["weight"] == weight
    assert saved["encoder"]["small_images"] is True


def test_the_config_alone_repeats_the_run(photos, tmp_path):
    run(train, [str(photos), *FAST, "--epochs=2", "--seed=3", f"--run={tmp_path}/a", "--method=simclr"])
    run(train, ["--config", f"{tmp_path}/a/config.yaml", str(photos), f"--run={tmp_path}/b"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    run(train, [str(photos), *FAST, "--epochs=2", "--seed=4", f"--run={tmp_path}/c", "--method=simclr"])
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *FAST, "--epochs=30", "--lr=1e30", "--warmup_epochs=0", f"--run={tmp_path}/r"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the loss is no longer a number from step" in said
    assert "Lower --lr" in said
    assert "group_loss" in said


def test_what_comes_next_fits_the_images(photos, tmp_path, capsys):
    """Only labelled images are proposed to evaluate on."""
    write_images(tmp_path / "plain", classes=("",))
    for source, named in ((photos, photos), (tmp_path / "plain", "LABELLED_IMAGES")):
        run(train, [str(source), *FAST, "--epochs=1", f"--run={tmp_path}/{source.name}"])
        assert f"{named} --test LABELLED_TEST_IMAGES" in capsys.readouterr().out


@pytest.mark.parametrize("size", [16, 40])
def test_broken_files_are_named_and_survived(tmp_path, size, capsys):
    photos = write_images(tmp_path / "photos", size=(size, size))
    whole = (photos / "cat" / "000.png").read_bytes()
    (photos / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "empty.jpg").write_bytes(b"")
    (photos / "dog" / "letter.jpg").write_text("dear diary")
    run(train, [str(photos), *FAST, "--epochs=2", "--workers=0", f"--run={tmp_path}/r"])
    listed = (tmp_path / "r" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["cat/cut.png", "dog/empty.jpg", "dog/letter.jpg"]
    assert all(line.split("\t")[1] for line in listed)
    assert "3 of 27" in capsys.readouterr().out


def test_the_page_shows_curves_groups_neighbours_and_settings(photos, tmp_path):
    run(train, [str(photos), *TINY, "--epochs=2", f"--run={tmp_path}/r"])
    page = (tmp_path / "r" / "report.html").read_text()
    for heading in ("Loss", "Groups that CLD finds", "Nearest neighbours", "Map of the features", "Settings"):
        assert f">{heading}<" in page
    assert load_cld(tmp_path / "r").groups is None


def empty(folder):
    folder.mkdir()
    return folder


def single(folder):
    write_images(folder, count=1, classes=("",))
    return folder


@pytest.mark.parametrize("make", [empty, single, lambda folder: folder / "nowhere"], ids=["empty", "single", "nowhere"])
def test_a_folder_without_images_ends_in_one_line(tmp_path, capsys, make):
    folder = make(tmp_path / "x")
    with pytest.raises(SystemExit) as stop:
        run(train, [str(folder), *FAST, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "x" in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cld.groups=9"], "cld.groups=9 exceeds the batch of 8 images"),
        (["--method=MoCo", "--method.queue=4"], "method.queue=4 is smaller than the batch of 8"),
        (["--method=symclr"], "did you mean SimCLR?"),
        (["--method=NPID", "--method.negatives=24"], "negatives=24"),
        (["--cld.temperature=0"], "temperature=0.0 must be positive"),
        (["--views.preset=simclear"], "simclr"),
        (["--encoder.name=resnet81"], "resnet81"),
        (["--encoder.weights=none.pth"], "none.pth"),
        (["--epochs=0"], "epochs=0"),
        (["--minutes=0"], "minutes=0"),
        (["--batch_size=1"], "batch_size=1"),
        (["--cld.gruops=3"], "gruops"),
        (["--resume=nowhere"], "nowhere"),
        (["--recipe=cifar10-nipd"], "did you mean cifar10-npid?"),
        (["--views.preset=byol", "--method=MoCo"], "views.preset=byol has 2 different views, MoCo with CLD needs 3"),
        (["--share_hidden=true", "--method.head=linear"], "share_hidden needs two MLP heads alike: method.head=linear"),
        (["--share_hidden=true", "--cld.head=norm-mlp", "--cld.hidden=9"], "share_hidden needs two MLP heads alike"),
        (["--method=InfoMin", "--method.jigsaw=1"], "jigsaw=1.0 must be in [0, 1)"),
        (
            ["--method=MoCo", "--method.splits=5"],
            "method.splits=5 leaves some parts of the batch of 8 images less than 2",
        ),
        (["--method=NPID", "--method.sharded=true"], "sharded=True needs negatives"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_settings_end_before_training_in_one_line(photos, tmp_path, capsys, options, named):
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *FAST, *options, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert named in said
    assert not (tmp_path / "r" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("seed=-1", "seed=-1: give 0 or more"),
        ("seed=18446744073709551616", "seed=18446744073709551616 must be below 2^64"),
        ("epochs=-1", "epochs=-1.0 must be positive"),
        ("epochs=nan", "epochs=nan must be positive"),
        ("minutes=-2", "minutes=-2.0 must be positive"),
        ("batch_size=-3", "batch_size=-3 leaves nothing to compare with: give at least 2"),
        ("lr=-0.1", "lr=-0.1 must be 0 or more"),
        ("weight_decay=-1", "weight_decay=-1.0 must be 0 or more"),
        ("warmup_epochs=-1", "warmup_epochs=-1.0 must be 0 or more"),
        ("warmup_epochs=3", "warmup_epochs=3 must be from 0 to epochs=1: lower it or raise epochs"),
        ("encoder_rate=0", "encoder_rate=0.0 must be above 0 and at most 1"),
        ("layer_decay=1.5", "layer_decay=1.5 must be above 0 and at most 1"),
        ("epoch_size=0", "epoch_size=0: at least one image"),
        ("hold_out=-1", "hold_out=-1: 0 or more"),
        ("workers=-1", "workers=-1 must be 0 or more"),
        ("memory=-1", "memory=-1.0 must be 0 or more"),
        ("track_positives=2", "track_positives=2.0 must be from 0 to 1"),
        ("log_every=0", "log_every=0 must be at least 1"),
        ("monitor_every=-1", "monitor_every=-1 must be 0 or more"),
        ("checkpoint_minutes=-1", "checkpoint_minutes=-1.0 must be 0 or more"),
    ],
)
def test_a_number_that_suits_no_images_is_refused_before_anything_is_opened(tmp_path, capsys, option, problem):
    """There are no images at all: whoever opened them would say so first."""
    with pytest.raises(SystemExit) as stop:
        run(train, [f"{tmp_path}/nowhere", *FAST, "--epochs=1", f"--{option}", f"--run={tmp_path}/r"])
    assert (stop.value.code, *capsys.readouterr()) == (2, "", f"crosslevel train: {problem}\n")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_not_overwritten(photos, tmp_path, capsys):
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    before = (tmp_path / "r" / "metrics.csv").read_text()
    with pytest.raises(SystemExit):
        run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "r" / "metrics.csv").read_text() == before


def test_runs_without_a_name_are_numbered(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(train, [str(photos), *FAST, "--epochs=1"])
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    assert names == {f"{photos.name}-simclr-cld", f"{photos.name}-simclr-cld-2"}


def test_what_is_said_of_a_broken_loss_is_of_the_step_that_broke(photos, tmp_path, capsys):
    slow = [option for option in FAST if not option.startswith("--log_every")]
    options = ["--log_every=100", "--epochs=8", "--lr=1e30", "--warmup_epochs=0", "--checkpoint_minutes=100"]
    with pytest.raises(SystemExit):
        run(train, [str(photos), *slow, *options, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    first = int(said.split("from step ")[1].split()[0])
    assert first < int(said.split("at step ")[1].split(".")[0])


def test_the_end_of_a_run_tells_what_it_was_worth(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", count=60)
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "raw pixels" in line)
    assert "trained" in line
    assert "untrained" in line
