"""What a run chooses or is told of its images: their number, order, positives, and those held out."""

import itertools
import os
import time
import warnings

import pytest
import torch
import yaml
from run_samples import losses, write_images
from train_samples import FAST, Killed, killed_after

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches, pack
from crosslevel.data.open import open_images
from crosslevel.models.encoder import Encoder
from crosslevel.settings.parser import run
from crosslevel.training.inputs import prepared
from crosslevel.training.plan import seconds_a_step
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.console import printer
from crosslevel.utils.device import choose


@pytest.mark.parametrize(("size", "packed"), [((32, 32), True), ((31, 33), True), ((32, 64), False), ((64, 32), False)])
def test_only_square_images_are_packed(tmp_path, size, packed):
    images = open_images(write_images(tmp_path / "photos", size=size))
    encoder = Encoder("resnet18", width=0.0625)
    found = prepared(images, encoder, Views(), memory=4.0, bad_files=BadFiles(), console=printer(quiet=True))
    assert isinstance(found, InMemoryImages) == packed


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no process to a core")
def test_pinned_to_one_core_a_run_starts_one_process_that_decodes(tmp_path):
    """PyTorch warns of more processes than there are cores that this one may use."""
    photos, usable = write_images(tmp_path / "photos", size=(40, 30)), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    finally:
        os.sched_setaffinity(0, usable)
    assert not [str(w.message) for w in warned if "worker processes" in str(w.message)]
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["workers"] == 1


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
    monkeypatch.setattr("crosslevel.training.plan.seconds_a_step", lambda *parts, cld: 8 / 24)
    run(train, [str(photos), *FAST, "--minutes=0.1", f"--run={tmp_path}/r"])
    assert "chosen: --epochs 5: 0.1 minutes at 24 images a second" in capsys.readouterr().out
    saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (saved["epochs"], saved["minutes"]) == (5, None)
    assert max(losses(tmp_path / "r")) == 15
    run(train, ["--resume", f"{tmp_path}/r"])
    assert "0.1 minutes" not in capsys.readouterr().out
    assert max(losses(tmp_path / "r")) == 15


def test_the_measured_step_is_a_whole_one_and_leaves_no_trace(photos):
    encoder, views = Encoder("resnet18", True, 0.0625), Views(size=16)
    batches = TrainBatches(pack(open_images(str(photos)), 16, bad_files=BadFiles()), 8, seed=0, bad_files=BadFiles())
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    cld, seen, grouped = CrossLevel(encoder.num_features, groups=4), [], []
    weights = {k: v.clone() for k, v in cld.state_dict().items()}
    encoder.register_forward_hook(lambda module, x, out: seen.append(out.requires_grad))
    cld.register_forward_hook(lambda module, x, out: grouped.append(out.requires_grad))
    state = torch.get_rng_state()
    began = time.perf_counter()
    seconds = seconds_a_step(encoder, views, batches, choose("cpu", "fp32"), cld=cld)
    assert 0 < seconds < time.perf_counter() - began
    assert all(seen)
    assert grouped == [True] * (len(seen) // 2)
    assert cld.last is None
    assert all(torch.equal(value, weights[name]) for name, value in cld.state_dict().items())
    assert len(seen) >= 2 * 3
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stall_of_the_machine_is_not_taken_for_its_speed(photos):
    encoder, views = Encoder("resnet18", True, 0.0625), Views(size=16)
    batches = TrainBatches(pack(open_images(str(photos)), 16, bad_files=BadFiles()), 8, seed=0, bad_files=BadFiles())
    times = itertools.accumulate(itertools.chain([0, 0.25, 3], itertools.repeat(0.25)))
    seconds = seconds_a_step(encoder, views, batches, choose("cpu", "fp32"), lambda: next(times))
    assert seconds == 0.25


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


def test_more_images_a_step_than_there_are_are_one_batch(photos, tmp_path, capsys):
    """It is said, and the settings have the number that the rates were chosen for; it goes on with the same one."""
    one_batch = ["--batch_size=4096", "--cld.groups=4", "--report_html=false", *(o for o in FAST if "batch" not in o)]
    run(train, [str(photos), *one_batch, "--epochs=1", f"--run={tmp_path}/r"])
    printed = capsys.readouterr().out
    assert "24 images, 1 step an epoch" in printed
    assert "chosen: --batch_size 24: 24 images make one batch, 4,096 were asked for" in printed
    assert "chosen: --lr 0.04688: 0.5 for 256 images a step, in proportion" in printed
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["batch_size"] == 24
    run(train, [f"--resume={tmp_path}/r", "--epochs=2"])
    assert "images a step" not in capsys.readouterr().out


def test_positives_need_tracks(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(train, [str(photos), *FAST, "--track_positives=0.5", f"--run={tmp_path}/r"])
    assert "has no tracks: videos, turntable and @repeat have some, and @bursts" in capsys.readouterr().err
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


def test_a_twentieth_is_held_out_unless_there_are_labels(tmp_path, capsys):
    for name, classes, said in (("plain", (".",), "950 images"), ("labelled", ("a", "b"), "1,000 images")):
        photos = write_images(tmp_path / name, count=1000 // len(classes), classes=classes)
        run(train, [str(photos), *FAST, "--epochs=0.02", "--monitor_every=0", f"--run={tmp_path}/{name}-run"])
        out = capsys.readouterr().out
        assert said in out
        assert ("chosen: --hold_out 50: of 1,000 images without labels" in out) == (name == "plain")


def test_a_batch_in_parts_goes_on_as_it_began(tmp_path, capsys):
    """The groups are of a part; what the command line had is in the run's settings, and a part must compare images."""
    photos = str(write_images(tmp_path / "photos", size=(16, 16)))
    options = [*FAST, "--method=MoCo", "--epochs=2", "--accumulate=2"]
    run(train, [photos, *options, f"--run={tmp_path}/whole"])
    with pytest.raises(Killed):
        run(train, [photos, *options, "--checkpoint_minutes=0", f"--run={tmp_path}/cut"], callbacks=[killed_after(1)])
    run(train, ["--resume", f"{tmp_path}/cut"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    settings = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert (settings["accumulate"], settings["batch_size"]) == (2, 8)
    assert "chosen: --cld.groups 3: three quarters of 4 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(train, [photos, *FAST, "--accumulate=5", f"--run={tmp_path}/none"])
    assert "accumulate=5 leaves parts of less than 2 images of the batch of 8" in capsys.readouterr().err
