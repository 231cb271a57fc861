"""A training that is asked to end, killed, doubled or starved of disk: nothing is lost, and each is said in one line.

Trainings that are signalled are forks of this process, so that what they import is imported once.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import fork
from run_samples import losses, metrics, write_images

from crosslevel import CrossLevel, Encoder
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.log import Log
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils import files, locks
from crosslevel.utils.errors import FolderInUse, Interrupted, UserError
from crosslevel.utils.tensors import load_tensors

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false", "--precision=fp32", "--monitor_every=0", "--workers=0"]
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "mine", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


class Training:
    """`crosslevel train` in a session of its own."""

    def __init__(self, folder, arguments, environment=None, limit=None):
        self.run, self.said = Run(folder), folder.with_name(f"{folder.name}.said")
        self.pid = fork()
        if self.pid == 0:
            self._child([*arguments, f"--run={folder}"], environment or {}, limit)

    def _child(self, arguments, environment, limit):
        code = 99
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run(train, arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def until(self, step):
        """Wait for a row of metrics.csv."""
        while not (self.run.metrics.exists() and len(self.run.metrics.read_text().splitlines()) > step):
            assert os.waitpid(self.pid, os.WNOHANG)[0] == 0, self.said.read_text()
            time.sleep(0.05)

    def children(self):
        task = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def end(self):
        """Exit status and what was said."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.said.read_text()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Larger than the views: decoded by workers, where there are any."""
    return write_images(tmp_path_factory.mktemp("photos"), size=(40, 40))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "r"
    run(train, [str(photos), *FAST, "--epochs=2", f"--run={folder}"])
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return Run(shutil.copytree(trained, tmp_path / "r"))


def refused(arguments, capsys):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(train, list(map(str, arguments)))
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1), said
    return said


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
    assert hint == f"what was saved goes on with: crosslevel train --resume {tmp_path}/r"
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

    monkeypatch.setattr(locks.FileLock, "acquire", fails)
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
    script = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
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
        patch.setattr(files.os, "replace", dies)
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
    assert f"previous.ckpt beside it is whole (step 3); to go on from there: {offered}, then --resume again" in said
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
    with pytest.raises(OSError, match=r"last\.ckpt: what was written is not what is read back"):
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
    assert hint == f"what was saved goes on with: crosslevel train --resume {copied}"
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


def test_a_memory_of_images_does_not_go_on_with_others(tmp_path, capsys):
    photos = write_images(tmp_path / "photos")
    run(train, [str(photos), *FAST, "--method=NPID", "--epochs=1", f"--run={tmp_path}/r"])
    before = Run(tmp_path / "r").last.read_bytes()
    (photos / "cat" / "003.png").unlink()
    said = refused([f"--resume={tmp_path}/r", "--epochs=2"], capsys)
    assert "has changed since the run began (24 images then, 23 now): NPID remembers each image" in said
    assert Run(tmp_path / "r").last.read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_by_the_first_part_that_differs(copied, capsys):
    said = refused([f"--resume={copied}", "--epochs=3", "--encoder.width=0.125"], capsys)
    assert "last.ckpt does not fit: cld.branch.0.weight is [" in said


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


def test_a_damaged_encoder_is_named(copied):
    """Cut anywhere, or with another header."""
    whole = copied.encoder.read_bytes()
    for damaged in (b"", whole[:5], whole[:400], whole[:-1], whole.replace(b"conv1", b"conv7", 1)):
        copied.encoder.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"encoder\.safetensors (is not read: it is damaged|says how to)"):
            copied.load_encoder()


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


def test_a_stopped_training_raises_and_does_not_exit(photos, tmp_path, monkeypatch):
    record = Log.record

    def interrupting(self, step, values):
        record(self, step, values)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "record", interrupting)
    with pytest.raises(Interrupted, match="crosslevel train --resume") as end:
        train(str(photos), partial(Encoder, width=0.0625), **SMALL, **OPTIONS, **QUIET, run=str(tmp_path / "r"))
    assert (end.value.status, end.value.folder) == (143, str(tmp_path / "r"))
    assert load_tensors(Run(tmp_path / "r").last)["global_step"] == 2
