"""Rows and checkpoints of a training after kills, damage and full disks."""

import os
import shutil

import pytest
import torch
from run_samples import losses, metrics
from training_samples import Training, refused

from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.log import Log
from crosslevel.training.train import train
from crosslevel.utils.errors import UserError

HEAD = "step,epoch,loss,instance_loss,lr\n"
ROWS = "".join(f"{n},{n / 3:.6g},{1 / n:.6g},{1 / n:.6g},0.1\n" for n in range(1, 6))


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ("", [1, 2, 3, 4, 5]),
        ("6,2,0.1666", [1, 2, 3, 4, 5]),
        ("6,2,0.166667,0.166667,0", [1, 2, 3, 4, 5]),
        ("\0" * 4000, [1, 2, 3, 4, 5]),
        ("6,2,0.1\0\0\0\n", [1, 2, 3, 4, 5]),
        ("6,2,0.16,0.17,0.1\n6,2,0.1", [1, 2, 3, 4, 5, 6]),
        ("\xff\xfe\n", [1, 2, 3, 4, 5]),
        ("7,2.3,0.1,0.1,0.1\n", [1, 2, 3, 4, 5]),
    ],
)
def test_whole_rows_up_to_the_checkpoint_are_kept(tmp_path, tail, kept):
    """A former version's file, with fewer columns, and what a kill or a cut of power left at its end."""
    (tmp_path / "metrics.csv").write_bytes((HEAD + ROWS + tail).encode("latin-1"))
    log = Log(Run(tmp_path), 3, 6)
    assert [int(row["step"]) for row in metrics(tmp_path)] == kept
    log.record(7, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path)][-1] == ("7", "0.5")
    assert [row["lr"] for row in metrics(tmp_path)][:5] == ["0.1"] * 5


def test_a_kill_while_rows_are_taken_over_loses_none(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(HEAD + ROWS)

    class Killed(BaseException):
        pass

    def dies(*names):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            Log(Run(tmp_path), 3, 4)
    assert (tmp_path / "metrics.csv").read_text() == HEAD + ROWS


def test_a_changed_byte_of_a_checkpoint_is_noticed(trained, tmp_path):
    """Or it changes nothing: names and dates of its parts are written twice, and read once."""
    whole, run = Run(trained).last.read_bytes(), Run(tmp_path)
    run.checkpoints.mkdir()
    run.last.write_bytes(whole)
    expected = checkpoints.read(run)
    places = torch.randint(len(whole), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    unnoticed = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        run.last.write_bytes(changed)
        try:
            found = checkpoints.read(run)
        except UserError:
            continue
        unnoticed += 1
        assert found["global_step"] == expected["global_step"]
        for name, value in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], value), (place, name)
    assert unnoticed < 30
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        run.last.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged"):
            checkpoints.read(run)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(copied, capsys, damage):
    content = bytearray(copied.last.read_bytes())
    if damage == "cut":
        copied.last.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        copied.last.write_bytes(content)
    else:
        copied.last.unlink()
    said = refused([f"--resume={copied}", "--epochs=3"], capsys)
    assert str(copied.last) in said
    offered = f"cp {copied.previous} {copied.last}"
    assert f"previous.ckpt beside it is whole (step 3); to continue from there: {offered}, then --resume again" in said
    shutil.copy(copied.previous, copied.last)
    run(train, [f"--resume={copied}", "--epochs=3"])
    assert list(losses(copied.path)) == list(range(1, 10))
    copied.last.unlink()  # not in its place: the best may be the same file
    copied.last.write_bytes(b"")
    copied.previous.unlink()
    copied.previous.write_bytes(b"x")
    assert "best.ckpt beside it is whole" in refused([f"--resume={copied}", "--epochs=4"], capsys)
    copied.best.write_bytes(b"y")
    assert "no checkpoint beside it is whole: start the run anew" in refused([f"--resume={copied}"], capsys)


def test_what_is_not_read_back_as_written_does_not_replace_a_checkpoint(copied, monkeypatch):
    before = copied.last.read_bytes()
    save = torch.save

    def flips(state, file):
        save(state, file)
        file.seek(len(before) // 2)
        file.write(b"\0\1\2\3")

    monkeypatch.setattr(torch, "save", flips)
    with pytest.raises(OSError, match=r"last\.ckpt: it reads back differently from what was written"):
        checkpoints.write(copied, {"state_dict": {"a": torch.randn(900_000)}}, best=True)
    assert copied.last.read_bytes() == before
    assert sorted(file.name for file in copied.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(copied, photos, tmp_path):
    """Files can have a million bytes here; a checkpoint has more."""
    before, rows = copied.last.read_bytes(), copied.metrics.read_bytes()
    assert len(before) > 1_000_000
    going = Training(tmp_path / "other", [f"--resume={copied}", "--epochs=3"], limit=1_000_000)
    code, said = going.end()
    assert code == 2, said
    assert "Traceback" not in said
    *_, hint, error = said.strip().splitlines()
    assert hint == f"to continue what was saved: crosslevel train --resume {copied}"
    assert "File too large" in error or "cannot be written" in error
    assert copied.last.read_bytes() == before
    assert copied.metrics.read_bytes().startswith(rows)
    assert not [file for file in copied.path.rglob("*.part")]


def test_what_killed_writers_left_is_removed(copied):
    left = [copied.checkpoints / "last.tmp", copied.checkpoints / ".last.ckpt.deadbeef.part"]
    left += [copied.path / ".metrics.csv.01234567.part", copied.path / ".config.yaml.01234567.part"]
    for file in left:
        file.write_bytes(b"half")
    run(train, [f"--resume={copied}", "--epochs=3"])
    assert not any(file.exists() for file in left)


def test_a_kill_between_a_checkpoint_s_two_names_leaves_nothing_beside_the_next_ones(tmp_path):
    """``previous.ckpt`` was named, ``last.ckpt`` not yet replaced: both are one file."""
    run, state = Run(tmp_path), {"state_dict": {"x": torch.ones(3)}}
    run.checkpoints.mkdir()
    checkpoints.write(run, state, best=False)
    run.previous.hardlink_to(run.last)
    checkpoints.write(run, state, best=True)
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert not run.previous.samefile(run.last)
    assert run.best.samefile(run.last)


def test_a_checkpoint_of_other_settings_is_refused_by_the_first_part_that_differs(copied, capsys):
    said = refused([f"--resume={copied}", "--epochs=3", "--encoder.width=0.125"], capsys)
    assert "last.ckpt does not fit: cld.branch.0.weight is [" in said


def test_a_damaged_encoder_is_named(copied):
    """Cut anywhere, or with another header."""
    whole = copied.encoder.read_bytes()
    for damaged in (b"", whole[:5], whole[:400], whole[:-1], whole.replace(b"conv1", b"conv7", 1)):
        copied.encoder.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"encoder\.safetensors (is not read: it is damaged|says how to)"):
            copied.load_encoder()
