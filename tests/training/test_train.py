"""The main job, end to end, on small images and a small network."""

import signal
import time

import pytest
import torch
import yaml
from run_samples import losses, metrics, write_images

from crosslevel import CrossLevel, load_encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches, pack
from crosslevel.data.open import open_images
from crosslevel.evaluation.evaluate import evaluate
from crosslevel.methods import BYOL, NPID, MoCo, SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.models.sync_batchnorm import SyncBatchNormAct
from crosslevel.runs import load_branches, load_cld
from crosslevel.settings.parser import run
from crosslevel.training import defaults, monitor
from crosslevel.training import inputs as feed
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.log import Log
from crosslevel.training.loop.module import remembered, share_hidden
from crosslevel.training.plan import seconds_a_step
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"))


def weights(folder):
    return load_encoder(folder).state_dict()


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Killed(BaseException):
    """Stands for a kill: nothing of the run's own code gets to act on it."""


def kill_at(monkeypatch, step):
    """Every step is saved, and the process 'dies' after ``step``."""
    write = checkpoints.write

    def dying(run, state, best):
        write(run, state, best)
        if state["global_step"] == step:
            raise Killed

    monkeypatch.setattr(checkpoints, "write", dying)


@pytest.mark.parametrize("method", ["MoCo", "SimCLR", "NPID", "BYOL", "InfoMin", "VICReg", "SimSiam", "SwAV", "DINO"])
@pytest.mark.parametrize("weight", [0.25, 0.0])
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


@pytest.mark.parametrize("method", ["SwAV", "DINO", "SimCLR"])
@pytest.mark.parametrize("size", [16, 40])
def test_a_killed_run_with_schedules_and_memories_continues_as_if_nothing_had_happened(
    tmp_path, monkeypatch, method, size
):
    """Small crops, queues, centres, rising temperatures, frozen layers, shares of categories, in mid-period."""
    photos = write_images(tmp_path / "photos", size=(size, size))
    own = {
        "SwAV": ["--method.small_views=2", "--method.prototypes=12", "--method.queue=16", "--method.temperature_max=1"],
        "DINO": ["--method.small_views=2", "--method.outputs=12", "--method.teacher_warmup=2.5"],
        "SimCLR": ["--method.temperature_max=1", "--method.out_features=16"],
    }[method]
    harmony = ["--gh.weight=1", "--gh.update_epochs=1", "--gh.warmup_epochs=1", "--gh.iterations=9"]
    options = [*FAST, "--method", method, *own, *harmony, "--epochs=3", "--workers=0", "--checkpoint_minutes=0"]
    options += ["--cld.temperature_max=0.5", "--cld.temperature_period=2"]
    run(train, [str(photos), *options, f"--run={tmp_path}/whole"])
    with monkeypatch.context() as patch:
        kill_at(patch, step=5)
        with pytest.raises(Killed):
            run(train, [str(photos), *options, f"--run={tmp_path}/cut"])
    run(train, ["--resume", f"{tmp_path}/cut"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "cut") if row["loss"]]
    assert all(float(row["harmonization_loss"]) == 0 for row in rows[:4])
    assert all(float(row["harmonization_loss"]) > 0 for row in rows[4:])
    assert len({row["group_temperature"] for row in rows}) > 3


def test_the_config_alone_repeats_the_run(photos, tmp_path):
    run(train, [str(photos), *FAST, "--epochs=2", "--seed=3", f"--run={tmp_path}/a", "--method=simclr"])
    run(train, ["--config", f"{tmp_path}/a/config.yaml", str(photos), f"--run={tmp_path}/b"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    run(train, [str(photos), *FAST, "--epochs=2", "--seed=4", f"--run={tmp_path}/c", "--method=simclr"])
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("method", ["MoCo", "NPID", "BYOL"])
def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path, monkeypatch, method, size):
    # 40 pixels are streamed and cropped by the loader, 16 are packed.
    photos = write_images(tmp_path / "photos", size=(size, size))
    options = [*FAST, "--method", method, "--epochs=3", "--workers=0", "--checkpoint_minutes=0"]
    run(train, [str(photos), *options, f"--run={tmp_path}/whole"])
    with monkeypatch.context() as patch:
        kill_at(patch, step=5)
        with pytest.raises(Killed):
            run(train, [str(photos), *options, f"--run={tmp_path}/cut"])
    run(train, ["--resume", f"{tmp_path}/cut"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_run_with_a_usable_checkpoint(photos, tmp_path, monkeypatch, capsys, number):
    record = Log.record

    def interrupting(self, step, values):
        record(self, step, values)
        if step == 2:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "record", interrupting)
        with pytest.raises(SystemExit) as stop:
            run(train, [str(photos), *FAST, "--epochs=4", f"--run={tmp_path}/r"])
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert "crosslevel train --resume" in capsys.readouterr().out
    load_encoder(tmp_path / "r")
    assert max(losses(tmp_path / "r")) == 2
    run(train, ["--resume", f"{tmp_path}/r"])
    assert max(losses(tmp_path / "r")) == 12


def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *FAST, "--epochs=30", "--lr=1e30", "--warmup_epochs=0", f"--run={tmp_path}/r"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the loss is no longer a number from step" in said
    assert "Lower --lr" in said
    assert "group_loss" in said


def test_the_monitor_never_influences_the_run(photos, tmp_path):
    for name, every in (("with", 1), ("without", 0)):
        options = ["--epochs=2", f"--monitor_every={every}", f"--run={tmp_path}/{name}"]
        run(train, [str(photos), *FAST, *options])
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert same_weights(tmp_path / "with", tmp_path / "without")
    assert sum(bool(r["knn"]) for r in metrics(tmp_path / "with")) == 2
    assert not any(r["knn"] for r in metrics(tmp_path / "without"))


def test_each_epochs_line_shows_its_own_figures(photos, tmp_path, capsys):
    run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=3", "--monitor_every=1", *FAST])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    shown = [(line.split()[1], line.split("kNN")[1].split()[0]) for line in lines]
    measured = [
        (f"{float(row['epoch']):.0f}/3", f"{float(row['knn']):.1f}") for row in metrics(tmp_path / "r") if row["knn"]
    ]
    assert shown == measured
    assert len(shown) == 3


def test_the_monitor_looks_at_images_of_the_views_size(photos, tmp_path, monkeypatch):
    seen = []
    extract = monitor.extract
    monkeypatch.setattr(
        monitor, "extract", lambda encoder, *a, **b: (seen.append(encoder.view.size), extract(encoder, *a, **b))[1]
    )
    run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=1", *FAST])
    assert seen == [16]


def test_what_comes_next_fits_the_images(photos, tmp_path, capsys):
    """Only labelled images are proposed to evaluate on."""
    write_images(tmp_path / "plain", classes=("",))
    for source, named in ((photos, photos), (tmp_path / "plain", "LABELLED_IMAGES")):
        run(train, [str(source), *FAST, "--epochs=1", f"--run={tmp_path}/{source.name}"])
        assert f"{named} --test LABELLED_TEST_IMAGES" in capsys.readouterr().out


def test_unlabelled_images_have_no_knn(tmp_path):
    folder = write_images(tmp_path / "one", classes=("",), count=16)
    run(train, [str(folder), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    assert not any(r["knn"] for r in metrics(tmp_path / "r"))


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


def test_the_cld_branch_and_both_heads_are_trained(photos, tmp_path):
    torch.manual_seed(0)
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r", "--optimizer=lars"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)
    trained = {k for k in state["state_dict"] if k.startswith(("encoder.", "method.branch", "cld.branch"))}
    moments = state["optimizer_states"][0]["state"]
    parameters = [k for k in trained if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(moments) == len(parameters)


def test_what_is_said_of_a_broken_loss_is_of_the_step_that_broke(photos, tmp_path, capsys):
    slow = [option for option in FAST if not option.startswith("--log_every")]
    options = ["--log_every=100", "--epochs=8", "--lr=1e30", "--warmup_epochs=0", "--checkpoint_minutes=100"]
    with pytest.raises(SystemExit):
        run(train, [str(photos), *slow, *options, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    first = int(said.split("from step ")[1].split()[0])
    assert first < int(said.split("at step ")[1].split(".")[0])


def test_an_epochs_line_has_no_older_epochs_knn(photos, tmp_path, capsys):
    run(train, [str(photos), f"--run={tmp_path / 'r'}", "--epochs=4", "--monitor_every=2", *FAST])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["kNN" in line for line in lines] == [False, True, False, True]


def test_no_track_is_on_both_sides_of_the_monitor():
    tracks = torch.arange(40).repeat_interleave(7)
    source = InMemoryImages(torch.zeros(280, 3, 1, 1, dtype=torch.uint8), [str(i) for i in range(280)])
    source.tracks = tracks
    queries, others = monitor.held_apart(source, seed=0)
    assert len(queries) == 6 * 7
    assert len(queries) + len(others) == 280
    assert not set(tracks[queries].tolist()) & set(tracks[others].tolist())


def test_unreadable_files_are_remembered_by_a_run_that_breaks_and_one_that_continues(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "photos")
    (folder / "cat" / "broken.png").write_bytes(b"")
    listed = tmp_path / "r" / "bad_files.txt"
    with monkeypatch.context() as patch:
        kill_at(patch, step=3)
        with pytest.raises(Killed):
            run(train, [str(folder), *FAST, "--epochs=3", "--checkpoint_minutes=0", f"--run={tmp_path}/r"])
    assert listed.read_text() == "cat/broken.png\tempty file\n"
    listed.write_text("dog/seen\\tbefore.png\tempty file\n")
    run(train, ["--resume", f"{tmp_path}/r"])
    assert listed.read_text() == "cat/broken.png\tempty file\ndog/seen\\tbefore.png\tempty file\n"


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(photos, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("images: gone\n")
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    load_encoder(tmp_path / "r")


@pytest.mark.parametrize("head", ["linear", "mlp", "norm-linear", "norm-mlp"])
def test_both_branches_are_read_back_whatever_their_heads(photos, tmp_path, head):
    heads = [f"--method.head={head}", f"--cld.head={head}"]
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r", *heads])
    assert load_cld(tmp_path / "r").head == head
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    found = load_branches(tmp_path / "r")
    for name, prefix in (("instance branch", "method.branch."), ("group branch", "cld.branch.")):
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        assert kept.keys() == found[name].state_dict().keys()
        for key, value in found[name].state_dict().items():
            torch.testing.assert_close(value, kept[key])


def test_branches_are_judged_by_the_figures_that_recipes_name(photos, tmp_path):
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    fixed = ["--device=cpu", "--precision=fp32", "--branches=true", "--protocol=knn"]
    rows = run(evaluate, [f"{tmp_path}/r", str(photos), f"--test={photos}", *fixed]).popitem()[1]
    assert list(rows)[-3:] == ["trained encoder", "instance branch", "group branch"]


def test_the_settings_keep_the_number_of_views_that_was_given(photos, tmp_path):
    run(train, [str(photos), *FAST, "--method=MoCo", "--epochs=1", f"--run={tmp_path}/r"])
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["method"]["init_args"]["online"] == 1


def test_a_network_for_one_size_gets_views_of_that_size(photos, tmp_path, capsys):
    options = ["--batch_size=8", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    name = ["--encoder.name=test_vit", "--encoder.image_size=48"]
    run(train, [str(photos), *options, *name, f"--run={tmp_path}/r"])
    assert load_encoder(tmp_path / "r").view.size == 48
    with pytest.raises(SystemExit):
        run(train, [str(photos), *options, *name, "--views.size=32", f"--run={tmp_path}/s"])
    assert "views.size=32 does not suit test_vit" in capsys.readouterr().err


def test_a_network_for_one_size_takes_small_crops_in_whole_patches(photos, tmp_path, capsys):
    options = [str(photos), "--batch_size=12", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    options += ["--encoder.name=test_vit", "--encoder.image_size=80", "--method=dino", "--method.outputs=12"]
    with pytest.raises(SystemExit) as stop:
        run(train, [*options, "--views.small_size=20", f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "views.small_size=20: test_vit needs a multiple of its patches' 16 pixels" in said
    run(train, [*options, f"--run={tmp_path}/r"])
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["views"]["small_size"] == 32
    assert "2 views of 80 pixels and 8 of 32" in capsys.readouterr().out
    assert len(losses(tmp_path / "r")) == 2
    assert load_encoder(tmp_path / "r").fixed_size == 80


def test_a_jigsaw_needs_a_network_for_patches(photos, tmp_path, capsys):
    options = ["--batch_size=4", "--log_every=1", "--device=cpu", "--report_html=false", "--epochs=1"]
    options += ["--encoder.name=test_vit", "--encoder.image_size=48", "--method=infomin"]
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *options, f"--run={tmp_path}/r"])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert "InfoMin's patches are 14 pixels, test_vit is built for 48: give --method.jigsaw 0 or a conv" in said
    assert not (tmp_path / "r").exists()
    run(train, [str(photos), *options, "--method.jigsaw=0", f"--run={tmp_path}/r"])
    assert len(losses(tmp_path / "r")) == 6


def test_synchronized_statistics_keep_activations_through_a_run(photos, tmp_path, monkeypatch):
    """On one device nothing but the layers' class changes: the same losses and weights."""
    calls, forward = {"true": 0, "false": 0}, SyncBatchNormAct.forward
    for sync in calls:

        def counted(self, x, sync=sync):
            calls[sync] += 1
            return forward(self, x)

        monkeypatch.setattr(SyncBatchNormAct, "forward", counted)
        options = [
            "--encoder.name=test_efficientnet",
            "--views.size=64",
            "--precision=fp32",
            f"--sync_batchnorm={sync}",
        ]
        run(train, [str(photos), *FAST[2:], *options, "--epochs=1", f"--run={tmp_path}/{sync}"])
    assert calls["true"] > 0 == calls["false"]
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    assert same_weights(tmp_path / "true", tmp_path / "false")


@pytest.mark.parametrize(("size", "packed"), [((32, 32), True), ((31, 33), True), ((32, 64), False), ((64, 32), False)])
def test_only_square_images_are_packed(tmp_path, monkeypatch, size, packed):
    seen = []
    monkeypatch.setattr(
        feed, "TrainBatches", lambda source, *a, **b: seen.append(source) or TrainBatches(source, *a, **b)
    )
    folder = write_images(tmp_path / "photos", size=size)
    options = ["--encoder.width=0.0625", "--batch_size=8", "--device=cpu", "--report_html=false", "--workers=0"]
    run(train, [str(folder), *options, "--epochs=1", f"--run={tmp_path}/r"])
    assert isinstance(seen[0], InMemoryImages) == packed


def test_both_heads_may_share_their_hidden_layer(photos, tmp_path):
    """One layer, trained by both branches; the last layers are each branch's own."""
    heads = ["--method=MoCo", "--method.head=norm-mlp", "--cld.head=norm-mlp", "--share_hidden=true"]
    run(train, [str(photos), *FAST, "--epochs=1", *heads, f"--run={tmp_path}/r"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(state["cld.branch.0.weight"], state["method.branch.0.weight"])
    assert not torch.equal(state["cld.branch.2.weight"], state["method.branch.2.weight"])
    torch.testing.assert_close(load_cld(tmp_path / "r").branch[0].weight, state["cld.branch.0.weight"])


def test_a_shared_layer_has_the_gradient_of_both_branches():
    encoder = torch.nn.Identity()
    encoder.num_features = 6
    method = SimCLR(encoder, head="mlp", out_features=4, hidden=6, batch_norm=False)
    cld = CrossLevel(6, groups=3, head="norm-mlp", out_features=4)
    share_hidden(method, cld)
    h = [torch.randn(8, 6) for _ in range(2)]
    slopes = []
    for branches in ((1, 0), (0, 1), (1, 1)):
        method.zero_grad()
        (branches[0] * method([], h, torch.arange(8)) + branches[1] * cld(*h)).backward()
        slopes.append(method.branch[0].weight.grad.clone())
    assert min(slope.abs().max() for slope in slopes[:2]) > 1e-5
    torch.testing.assert_close(slopes[0] + slopes[1], slopes[2])
    assert len({id(p) for p in (*method.parameters(), *cld.parameters())}) == 2 + 2 + 1


def test_npid_saves_its_bank_with_the_run(photos, tmp_path):
    """In float16, with sampled negatives."""
    options = ["--method=NPID", "--method.negatives=7", "--method.float16=true", "--epochs=1"]
    run(train, [str(photos), *FAST, *options, f"--run={tmp_path}/r"])
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    rows = state["method.bank.rows"]
    assert (rows.dtype, tuple(rows.shape)) == (torch.float16, (24, 128))


def test_the_memories_are_not_sent_between_devices():
    """Nothing that grows with images or queue is broadcast in each step; batch statistics are."""
    encoder = Encoder("resnet18", width=0.0625)
    for method, names in (
        (MoCo(encoder), {"method.negatives.keys", "method.negatives.position"}),
        (NPID(encoder, 30, negatives=4, sharded=True), {"method.bank.bank.rows"}),
        (BYOL(encoder), set()),
    ):
        assert set(remembered(method, "method")) == names


def test_what_is_left_open_is_chosen_told_and_kept(photos, tmp_path, capsys):
    """In the first lines and in config.yaml, with the reason; what is given is no choice."""
    open_ones = [option for option in FAST if not option.startswith("--batch_size")]
    run(train, [str(photos), *open_ones, "--epochs=2", "--lr=0.07", "--method=MoCo", f"--run={tmp_path}/r"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chosen: ")]
    text = (tmp_path / "r" / "config.yaml").read_text()
    assert [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")] == told
    names = {line.split()[1] for line in told}
    assert {"--batch_size", "--weight_decay", "--method.momentum", "--method.queue", "--cld.groups"} <= names
    assert not names & {"--lr", "--epochs"}
    saved = yaml.safe_load(text)
    assert (saved["lr"], saved["epochs"], saved["batch_size"]) == (0.07, 2, 16)
    assert saved["method"]["init_args"]["queue"] == 8
    assert saved["method"]["init_args"]["momentum"] == pytest.approx(0.9)
    state = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert len(state["method.negatives.keys"]) == 8


def test_minutes_become_epochs_that_a_resumed_run_keeps(photos, tmp_path, monkeypatch, capsys):
    """Measured once, 24 images a second in 0.1 minutes: 5.4 epochs' time, of which whole ones are used."""
    monkeypatch.setattr("crosslevel.training.plan.seconds_a_step", lambda *parts: 8 / 24)
    run(train, [str(photos), *FAST, "--minutes=0.1", f"--run={tmp_path}/r"])
    assert "chosen: --epochs 5: 0.1 minutes at 24 images a second" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (saved["epochs"], saved["minutes"]) == (5, None)
    assert max(losses(tmp_path / "r")) == 15
    monkeypatch.setattr("crosslevel.training.plan.seconds_a_step", lambda *parts: 1 / 0)
    run(train, ["--resume", f"{tmp_path}/r"])
    assert max(losses(tmp_path / "r")) == 15


def test_the_measured_step_is_a_whole_one_and_leaves_no_trace(photos):
    encoder, views = Encoder("resnet18", True, 0.0625), Views(size=16)
    batches = TrainBatches(pack(open_images(str(photos)), 16, bad=BadFiles()), 8, seed=0, bad=BadFiles())
    before, state = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    seen = []
    encoder.register_forward_hook(lambda module, x, out: seen.append(out.requires_grad))
    began = time.perf_counter()
    seconds = seconds_a_step(encoder, views, batches, choose("cpu", "fp32"))
    assert 0 < seconds < time.perf_counter() - began
    assert all(seen)
    assert len(seen) >= 2 * 3
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_end_of_a_run_tells_what_it_was_worth(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", count=60)
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "raw pixels" in line)
    assert "trained" in line
    assert "untrained" in line


@pytest.mark.parametrize("how", [["--order=natural"], ["--workers=0"]])
def test_positives_from_tracks(tmp_path, how):
    """Kept with the settings, other losses than without, and refused where there are no tracks."""
    size = (16, 16) if "--order=natural" in how else (24, 40)  # in memory, or decoded as they are needed
    source = f"{write_images(tmp_path / 'photos', size=size)}@bursts"
    options = [*FAST, *how, "--monitor_every=0", "--track_positives=0.9"]
    run(train, [source, *options, "--epochs=2", f"--run={tmp_path}/whole"])
    run(train, [source, *options, "--epochs=2", "--track_positives=0", f"--run={tmp_path}/without"])
    run(train, [source, *options, "--epochs=1", "--warmup_epochs=0.2", f"--run={tmp_path}/half"])
    assert yaml.safe_load((tmp_path / "half" / "config.yaml").read_text())["track_positives"] == 0.9
    assert losses(tmp_path / "whole").keys() == losses(tmp_path / "without").keys()
    assert losses(tmp_path / "whole")[1] != losses(tmp_path / "without")[1]
    assert losses(tmp_path / "half")[1] == losses(tmp_path / "whole")[1]


def test_positives_need_tracks(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(train, [str(photos), *FAST, "--track_positives=0.5", f"--run={tmp_path}/r"])
    assert "has no tracks: films, turntable and @repeat have some, and @bursts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(train, [f"{photos}@bursts", *FAST, "--track_positives=2", f"--run={tmp_path}/r"])
    assert "track_positives=2.0 must be from 0 to 1" in capsys.readouterr().err


def test_images_that_are_held_out_judge_and_are_not_trained_on(tmp_path, capsys):
    """Their number is a choice that is told and kept; a run of before, whose settings lack it, goes on with all."""
    photos = write_images(tmp_path / "photos", count=100, classes=(".",))
    run(train, [str(photos), *FAST, "--epochs=1", "--hold_out=44", f"--run={tmp_path}/r"])
    said = capsys.readouterr().out
    assert "56 images, 7 steps an epoch" in said
    assert "of 44 images held out, those whose other view is the nearest: trained" in said
    config = tmp_path / "r" / "config.yaml"
    assert yaml.safe_load(config.read_text())["hold_out"] == 44
    run(train, [f"--resume={tmp_path}/r", "--epochs=2"])
    assert "56 images, 7 steps an epoch" in capsys.readouterr().out
    config.write_text("".join(line for line in config.open() if not line.startswith("hold_out")))
    run(train, [f"--resume={tmp_path}/r", "--epochs=3"])
    assert "100 images, 12 steps an epoch" in capsys.readouterr().out


def test_a_twentieth_is_held_out_unless_there_are_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "LEAST_TO_HOLD_OUT", 60)
    for name, classes, said in (("plain", (".",), "57 images"), ("labelled", ("a", "b"), "60 images")):
        photos = write_images(tmp_path / name, count=60 // len(classes), classes=classes)
        run(train, [str(photos), *FAST, "--epochs=0.2", "--monitor_every=0", f"--run={tmp_path}/{name}-run"])
        out = capsys.readouterr().out
        assert said in out
        assert ("chosen: --hold_out 3: of 60 images without labels" in out) == (name == "plain")
