"""A training that is asked to end, killed, doubled or starved of disk: nothing is lost, and each is said in one line.

Trainings that are signalled are forks of this process, so that what they import is imported once.
"""

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import filelock
import pytest
import torch
from run_samples import losses, metrics, write_images
from training_samples import FAST, TINY, Training, refused

from crosslevel import CrossLevel, Encoder
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop import checkpoints
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils import locks
from crosslevel.utils.errors import FolderInUse, Interrupted
from crosslevel.utils.tensors import load_tensors

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "mine", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("number", "to", "environment"),
    [
        (signal.SIGTERM, "group", {}),
        (signal.SIGTERM, "process and group", {}),
        (signal.SIGHUP, "group", {}),
        (signal.SIGUSR1, "process", SLURM),
        (signal.SIGUSR2, "group", {}),
    ],
)
def test_what_asks_a_training_to_end_saves_it(photos, tmp_path, number, to, environment):
    """Workers leave it to the main process; no step is lost, and nobody starts the job anew."""
    options = [*TINY[:2], "--batch_size=2", *TINY[3:], "--workers=2", "--epochs=500", "--monitor_every=0"]
    going = Training(tmp_path / "r", [str(photos), *options], environment)
    going.until(5)
    assert len(going.children()) >= 2
    if "process" in to:
        os.kill(going.pid, number)
    if "group" in to:
        os.killpg(going.pid, number)
    code, said = going.end()
    assert code == 128 + number, said
    assert "Traceback" not in said
    assert "requeue" not in said
    assert f"crosslevel train --resume {tmp_path}/r" in said
    last = load_tensors(going.run.last)["global_step"]
    assert last == max(losses(going.run.path))
    assert last < 6000


def test_a_worker_that_is_killed_ends_the_training_in_one_line(photos, tmp_path):
    going = Training(tmp_path / "r", [str(photos), *TINY, "--workers=2", "--epochs=5000", "--monitor_every=0"])
    going.until(4)
    os.kill(going.children()[-1], signal.SIGKILL)
    code, said = going.end()
    assert code == 2, said
    assert "Traceback" not in said
    *_, hint, error = said.strip().splitlines()
    assert hint == f"to continue what was saved: crosslevel train --resume {tmp_path}/r"
    assert error.startswith("crosslevel train: a process that decodes images has died: it is killed by signal: Killed")
    assert checkpoints.damage_of(going.run.last) == ""


def test_a_folder_has_one_writer_and_a_dead_one_holds_it_no_longer(photos, tmp_path, capsys):
    going = Training(tmp_path / "r", [str(photos), *TINY, "--workers=2", "--epochs=5000", "--monitor_every=0"])
    going.until(4)
    for option in (f"--run={tmp_path}/r", f"--resume={tmp_path}/r"):
        said = refused([photos, *FAST, option], capsys)
        assert f"{tmp_path}/r is in use by crosslevel train (process {going.pid} on " in said or "already holds" in said
    assert "is in use by" in said
    os.kill(going.pid, signal.SIGKILL)
    assert going.end()[0] == -signal.SIGKILL
    step = load_tensors(going.run.last)["global_step"]
    run(train, [f"--resume={tmp_path}/r", f"--epochs={step // 3 + 1}", "--warmup_epochs=0", "--workers=0"])
    rows = [int(row["step"]) for row in metrics(tmp_path / "r")]
    assert rows == list(range(1, 3 * (step // 3 + 1) + 1))


def test_runs_without_a_name_avoid_one_that_is_being_written(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locks.folder_lock(Path("runs") / f"{photos.name}-moco-cld", "another"):
        run(train, [str(photos), *FAST, "--method=MoCo", "--epochs=1"])
    assert (tmp_path / "runs" / f"{photos.name}-moco-cld-2" / "metrics.csv").exists()


def test_a_lock_is_told_by_name_and_free_after_its_block(tmp_path):
    with locks.folder_lock(tmp_path / "x", "pack"):
        assert locks.holder(tmp_path / "x").startswith(f"pack (process {os.getpid()} on ")
        with pytest.raises(FolderInUse, match=rf"x is in use by pack \(process {os.getpid()} on "):
            locks.folder_lock(tmp_path / "x", "embed").__enter__()
    assert locks.holder(tmp_path / "x") is None
    with locks.folder_lock(tmp_path / "x", "embed"):
        assert locks.holder(tmp_path / "x").startswith("embed")


@pytest.mark.parametrize("number", ["EROFS", "ENOLCK", "EACCES"])
def test_a_folder_that_cannot_be_locked_is_written_with_a_warning(tmp_path, monkeypatch, number):
    import errno

    def fails(self, *a, **b):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    with pytest.warns(UserWarning, match="cannot be locked"), locks.folder_lock(tmp_path, "train"):
        (tmp_path / "written").touch()


@pytest.mark.parametrize(("name", "value"), [("SLURM_NTASKS", "2"), ("SLURM_STEP_NUM_TASKS", "4")])
def test_several_tasks_of_slurm_are_refused(photos, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    said = refused([photos, *FAST, f"--run={tmp_path}/r"], capsys)
    assert f"{name}={value}: SLURM is to start this command once" in said
    assert f"--devices {value}" in said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("number", "status", "queued"), [("USR1", 0, "requeue 7\n"), ("TERM", 143, "")])
def test_the_sbatch_file_queues_a_stopped_training_again(tmp_path, number, status, queued):
    """With the command and SLURM's own played by scripts."""
    script = Path(__file__).parents[3] / "examples" / "slurm.sbatch"
    command = (
        f'echo "$@" >> {tmp_path}/called\ntrap "exit 138" USR1\ntrap "exit 143" TERM\nwhile :; do sleep 0.05; done'
    )
    for name, does in (("crosslevel", command), ("scontrol", f'echo "$@" >> {tmp_path}/queued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    called = tmp_path / "called"
    for begun, where in ((0, "--run"), (1, "--resume")):
        job = subprocess.Popen(["bash", script, "my photos", "r", "--epochs=9"], env=environment, cwd=tmp_path)
        patience = time.monotonic() + 60
        while not (called.exists() and called.read_text().count("\n") > begun):
            assert time.monotonic() < patience
            time.sleep(0.02)
        while job.poll() is None:  # a script may miss a signal that comes while it begins
            assert time.monotonic() < patience or job.kill()
            job.send_signal(getattr(signal, f"SIG{number}"))
            time.sleep(0.3)
        assert job.returncode == status
        assert called.read_text().splitlines()[-1] == f"train my photos {where} r --devices 1 --epochs=9"
        (tmp_path / "r" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / "checkpoints" / "last.ckpt").touch()
    assert (tmp_path / "queued").read_text() == 2 * queued if queued else not (tmp_path / "queued").exists()


def test_a_memory_of_images_does_not_go_on_with_others(tmp_path, capsys):
    photos = write_images(tmp_path / "photos")
    run(train, [str(photos), *FAST, "--method=NPID", "--epochs=1", f"--run={tmp_path}/r"])
    before = Run(tmp_path / "r").last.read_bytes()
    (photos / "cat" / "003.png").unlink()
    said = refused([f"--resume={tmp_path}/r", "--epochs=2"], capsys)
    assert "has changed since the run began (24 images then, 23 now): NPID remembers each image" in said
    assert Run(tmp_path / "r").last.read_bytes() == before


def test_equal_runs_leave_equal_files_that_all_may_read(photos, tmp_path):
    before = os.umask(0o027)
    try:
        for name in ("a", "b"):
            run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path / name}"])
    finally:
        os.umask(before)
    for name in ("encoder.safetensors", "instance.safetensors", "cld.safetensors"):
        a, b = tmp_path / "a" / name, tmp_path / "b" / name
        assert a.read_bytes() == b.read_bytes()
        assert a.stat().st_mode & 0o777 == 0o640
    head = (tmp_path / "a" / "encoder.safetensors").read_bytes()
    names = list(json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"])
    assert names == sorted(names)


def test_no_name_of_a_file_steers_the_terminal(tmp_path, capsys):
    photos = write_images(tmp_path / "pho\x1b[31mtos")
    (photos / "cat" / "bro\x1b]0;x\x07ken.png").write_bytes(b"")
    run(train, [str(photos), *FAST, "--epochs=1", f"--run={tmp_path}/r\x1b[2J"])
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "r\\x1b[2J" in said.out
    assert "pho\\x1b[31mtos" in refused([photos / "nowhere", *FAST, f"--run={tmp_path}/s"], capsys)


SMALL = {"views": partial(Views, size=16), "cld": partial(CrossLevel, weight=0.25)}
OPTIONS = {"epochs": 1, "batch_size": 8, "log_every": 1, "precision": "fp32", "device": "cpu", "workers": 0}
QUIET = {"monitor_every": 0, "report_html": False}


def test_a_seed_holds_from_python_as_from_the_command_line(photos, tmp_path):
    encoder = partial(Encoder, width=0.0625)
    for name, before in (("a", 1), ("b", 2)):
        torch.manual_seed(before)
        folder = train(str(photos), encoder, **SMALL, **OPTIONS, **QUIET, seed=3, run=str(tmp_path / name))
        assert folder == tmp_path / name
    run(train, [str(photos), *FAST, "--epochs=1", "--seed=3", f"--run={tmp_path}/c"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c")
    files = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_a_training_does_not_change_what_it_is_given(photos, tmp_path):
    torch.manual_seed(0)
    parts = Encoder(width=0.0625), CrossLevel(32, weight=0.25), Views(size=16)
    state = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    facts = parts[0].view, parts[1].generator, parts[1].gather, parts[2].count, parts[0].small_images
    train(str(photos), *parts, **OPTIONS, **QUIET, run=str(tmp_path / "r"))
    assert facts == (parts[0].view, parts[1].generator, parts[1].gather, parts[2].count, parts[0].small_images)
    for part, before in zip(parts, state, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())


def test_a_stopped_training_raises_and_does_not_exit(photos, tmp_path):
    class Asked:
        def on_log(self, step, figures, module):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

    more = {**OPTIONS, **QUIET, "callbacks": [Asked()]}
    with pytest.raises(Interrupted, match="crosslevel train --resume") as end:
        train(str(photos), partial(Encoder, width=0.0625), **SMALL, **more, run=str(tmp_path / "r"))
    assert (end.value.status, end.value.folder) == (143, str(tmp_path / "r"))
    assert load_tensors(Run(tmp_path / "r").last)["global_step"] == 2
