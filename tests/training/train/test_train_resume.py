"""A run that ends before its time, by a kill, a signal or an error, goes on where it was."""

import signal

import pytest
from run_samples import losses, metrics, write_images
from train_samples import FAST, At, Killed, killed_after, same_weights

from crosslevel import load_encoder
from crosslevel.settings.parser import run
from crosslevel.training.train import train


# Images of 40 pixels are streamed and cropped by the loader, those of 16 are packed.
@pytest.mark.parametrize(("method", "size"), [("SwAV", 16), ("DINO", 40), ("SimCLR", 40)])
def test_a_killed_run_with_schedules_and_memories_continues_as_if_nothing_had_happened(tmp_path, method, size):
    """Small crops, queues, centres, rising temperatures, frozen layers, shares of categories, in mid-period."""
    photos = write_images(tmp_path / "photos", size=(size, size))
    own = {
        "SwAV": ["--method.small_views=2", "--method.prototypes=12", "--method.queue=16", "--method.temperature_max=1"],
        "DINO": [
            "--method.small_views=2",
            "--method.outputs=12",
            "--method.teacher_warmup=2.5",
            "--method.temperature_max=0.5",
        ],
        "SimCLR": ["--method.temperature_max=1", "--method.out_features=16"],
    }[method]
    harmony = ["--gh.weight=1", "--gh.update_epochs=1", "--gh.warmup_epochs=1", "--gh.iterations=9"]
    options = [*FAST, "--method", method, *own, *harmony, "--epochs=3", "--workers=0", "--checkpoint_minutes=0"]
    options += ["--cld.temperature_max=0.5", "--cld.temperature_period=2"]
    run(train, [str(photos), *options, f"--run={tmp_path}/whole"])
    with pytest.raises(Killed):
        run(train, [str(photos), *options, f"--run={tmp_path}/cut"], callbacks=[killed_after(5)])
    run(train, ["--resume", f"{tmp_path}/cut"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    rows = [row for row in metrics(tmp_path / "cut") if row["loss"]]
    assert all(float(row["harmonization_loss"]) == 0 for row in rows[:4])
    assert all(float(row["harmonization_loss"]) > 0 for row in rows[4:])
    assert len({row["group_temperature"] for row in rows}) > 3


@pytest.mark.parametrize(("method", "size"), [("MoCo", 40), ("NPID", 16), ("NPID", 40), ("BYOL", 16)])
def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path, method, size):
    photos = write_images(tmp_path / "photos", size=(size, size))
    options = [*FAST, "--method", method, "--epochs=3", "--workers=0", "--checkpoint_minutes=0"]
    run(train, [str(photos), *options, f"--run={tmp_path}/whole"])
    with pytest.raises(Killed):
        run(train, [str(photos), *options, f"--run={tmp_path}/cut"], callbacks=[killed_after(5)])
    run(train, ["--resume", f"{tmp_path}/cut"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_run_with_a_usable_checkpoint(photos, tmp_path, capsys, number):
    before, asking = signal.getsignal(number), At(2, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        run(train, [str(photos), *FAST, "--epochs=2", f"--run={tmp_path}/r"], callbacks=[asking])
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert "crosslevel train --resume" in capsys.readouterr().out
    load_encoder(tmp_path / "r")
    assert max(losses(tmp_path / "r")) == 2
    run(train, ["--resume", f"{tmp_path}/r"])
    assert max(losses(tmp_path / "r")) == 6


def test_unreadable_files_are_remembered_by_a_run_that_breaks_and_one_that_continues(tmp_path):
    folder = write_images(tmp_path / "photos")
    (folder / "cat" / "broken.png").write_bytes(b"")
    listed = tmp_path / "r" / "bad_files.txt"
    line = [str(folder), *FAST, "--epochs=3", "--checkpoint_minutes=0", f"--run={tmp_path}/r"]
    with pytest.raises(Killed):
        run(train, line, callbacks=[killed_after(3)])
    assert listed.read_text() == "cat/broken.png\tempty file\n"
    listed.write_text("dog/seen\\tbefore.png\tempty file\n")
    run(train, ["--resume", f"{tmp_path}/r"])
    assert listed.read_text() == "cat/broken.png\tempty file\ndog/seen\\tbefore.png\tempty file\n"


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(photos, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("images: gone\n")
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r"])
    load_encoder(tmp_path / "r")
