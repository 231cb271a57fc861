"""A run on two processes, through the commands themselves: one of them dies, is stopped, is started again.

The commands have the settings in common, so that one undisturbed run is what all are held against. It starts as a
user's does, and so does a torchrun; all others are forks of the test's process, which has all imports.
"""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fork_server import stand_in
from forked import Forked, fork_ranks

from crosslevel import load_encoder

pytestmark = pytest.mark.slow

SOURCE = "turntable,classes=4,objects=24,frames=6,size=16,imbalance=4"
EPOCHS, STEPS = 5, 20  # 144 images in two shares of 72: four batches of 16 each an epoch
TINY = ["--encoder.width=0.0625", "--batch_size=16", "--device=cpu", "--log_every=1", "--workers=0"]
TINY += [f"--epochs={EPOCHS}", "--checkpoint_minutes=0", "--cld.gather=true"]
TINY += ["--method=NPID", "--method.negatives=16", "--method.sharded=true"]  # a bank in parts, a part a process
CROSSLEVEL = str(Path(sys.executable).with_name("crosslevel"))
COMMAND = [CROSSLEVEL, "train", SOURCE, *TINY]
QUIET = "--report_html=false"


def started(line, folder, popen=subprocess.Popen, **variables):
    """The command, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return popen(line, cwd=folder, env=environment, start_new_session=True, **pipes)


def forked(line, folder, **variables):
    """The same in a fork, where the system says which files are open; so are the processes that it starts."""

    def fork(line, **options):
        with pytest.MonkeyPatch.context() as patch:
            fork_ranks(patch)
            return Forked(line, **options)

    return started(line, folder, fork if sys.platform == "linux" else subprocess.Popen, **variables)


def rows(run):
    if not (run / "metrics.csv").is_file():
        return []
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def losses(run):
    return [float(row["loss"]) for row in rows(run)]


def bank(run):
    """All rows of NPID's bank, as the last checkpoint has them."""
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    [name] = [key for key in state if key.endswith("bank.rows")]
    assert state[name].shape == (144, 128)
    return state[name]


def ranks_of(process):
    """The processes that a command started to train, the first one first."""
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(number) for file in files for number in file.read_text().split())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(steps, process, run):
    while process.poll() is None and len(rows(run)) < steps:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of the command's run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    process = started([*COMMAND, "--devices=2"], folder)
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 0, error
    [run] = (folder / "runs").iterdir()
    return run


def test_two_processes_train_one_run(undisturbed):
    assert undisturbed.name == "turntable-npid-cld"
    assert [int(row["step"]) for row in rows(undisturbed)] == list(range(1, STEPS + 1))
    # Groups over both ranks: three quarters of 32 images, not of 16.
    used = [float(row["groups_used"]) for row in rows(undisturbed)]
    assert 12 < min(used) <= max(used) <= 24
    load_encoder(undisturbed)
    assert "Groups that CLD finds" in (undisturbed / "report.html").read_text()


def test_a_dead_process_ends_the_run_with_a_line_and_it_goes_on_until_stopped_and_again(tmp_path, undisturbed):
    """A bank in parts is saved whole each time, and the losses are those of an undisturbed run."""
    run = tmp_path / "run"
    process = forked([*COMMAND, QUIET, "--devices=2", f"--run={run}"], tmp_path)
    until(5, process, run)
    [other] = ranks_of(process)
    os.kill(other, signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2, error
    [line] = [line for line in error.splitlines() if line.startswith("crosslevel train: ")]
    gone = r"(process 1 ended with status -9|a process is gone), and the 2 of this training need each other$"
    assert re.search(gone, line)
    assert "Traceback" not in error
    resume = [CROSSLEVEL, "train", "--resume", str(run)]
    process = forked(resume, tmp_path)
    until(9, process, run)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert 9 <= len(rows(run)) < STEPS
    half = bank(run)
    process = forked(resume, tmp_path)
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 0, error
    assert losses(run) == losses(undisturbed)
    whole = bank(run)
    torch.testing.assert_close(whole, bank(undisturbed))
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(144))
    assert (whole != half).any(1).float().mean() > 0.9


def test_torchrun_restarts_a_run_where_its_checkpoint_is(tmp_path, undisturbed):
    """Elastic: a killed process has all of them started again, and the losses are those of an undisturbed run."""
    run = tmp_path / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    with stand_in(tmp_path) as python:
        command = [python, "-m", "crosslevel", *COMMAND[1:]]
        process = started([*line, "--no-python", "--", *command, QUIET, f"--run={run}"], tmp_path)
        until(5, process, run)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
        error = process.communicate(timeout=400)[1]
    assert process.returncode == 0, error
    assert "continues it" in error or "failed" in error  # it was killed, and not at its end
    assert losses(run) == losses(undisturbed)


def agent(number, port, folder, run):
    """One of torchrun's two, each with a process of the training."""
    about = f"is_host={number == 0},keep_alive_interval=1,keep_alive_max_attempt=3"
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    line += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={about}", "--rdzv-id=run"]
    line += ["--local-addr=127.0.0.1", "--monitor-interval=0.5", "--no-python", "--", *COMMAND, QUIET, f"--run={run}"]
    return forked(line, folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def test_a_lost_machine_of_torchrun_joins_again_where_the_checkpoint_is(tmp_path, undisturbed):
    """Its agent counts no restart, the other one does; yet they meet, and the losses are the undisturbed run's."""
    run, port = tmp_path / "run", free_port()
    first, lost = (agent(number, port, tmp_path, run) for number in range(2))
    until(5, first, run)
    for pid in (lost.pid, *ranks_of(lost)):
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    assert len(rows(run)) < STEPS
    agents = [first, agent(1, port, tmp_path, run)]
    said = [process.communicate(timeout=400) for process in agents]
    assert [process.returncode for process in agents] == [0, 0], said
    assert not re.search("may not restart|different checkpoints", said[0][1] + said[1][1])
    assert losses(run) == losses(undisturbed)


def test_two_commands_with_two_nodes_train_one_run(tmp_path, undisturbed):
    """What SLURM says to each is what they need to find each other; with the encoder in parts nothing changes."""
    name = f"--run={tmp_path}/run"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_TASKS": "2"}
    line = [*COMMAND, QUIET, "--nodes=2", "--strategy=fsdp", "--checkpoint_minutes=10", name]
    both = [forked(line, tmp_path, **slurm, SLURM_NODEID=str(node)) for node in range(2)]
    said = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-4)
    assert "next" in said[0][0]
    assert not said[1][0].strip()
