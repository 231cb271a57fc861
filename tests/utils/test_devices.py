"""A run on two processes, through the command itself."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crosslevel import load_encoder

pytestmark = pytest.mark.slow

SOURCE = "turntable,classes=4,objects=24,frames=6,size=16,imbalance=4"
TINY = ["--encoder.width=0.0625", "--batch_size=16", "--device=cpu", "--devices=2", "--log_every=1", "--workers=0"]


def train(folder, *options):
    """The command, in a session of its own."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("crosslevel"), "train", SOURCE, *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def logged(folder):
    if not (folder / "metrics.csv").is_file():
        return []
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def test_two_processes_train_one_run(tmp_path):
    process = train(tmp_path, *TINY, "--epochs=2", "--cld.gather=true")
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["turntable-simclr-cld"]
    folder = tmp_path / "runs" / "turntable-simclr-cld"
    rows = logged(folder)
    # 144 images in two shares of 72: four batches of 16 each an epoch.
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    # Groups over both ranks: three quarters of 32 images, not of 16.
    assert {float(row["groups_used"]) for row in rows} <= {23.5, 24.0}
    load_encoder(folder)
    assert "Groups that CLD finds" in (folder / "report.html").read_text()


def test_a_bank_in_parts_is_saved_whole_and_goes_on(tmp_path):
    options = [*TINY, "--method=NPID", "--method.negatives=16", "--method.sharded=true", "--report_html=false"]
    process, folder = train(tmp_path, *options, "--epochs=12", f"--run={tmp_path / 'run'}"), tmp_path / "run"
    while process.poll() is None and len(logged(folder)) < 9:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=300)
    half = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)
    stopped = half["global_step"]
    assert stopped < 48
    [name] = [key for key in half["state_dict"] if key.endswith("bank.rows")]
    assert half["state_dict"][name].shape == (144, 128)
    process = train(tmp_path, *TINY[2:], "--resume", str(folder), "--epochs=12")
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert [int(row["step"]) for row in logged(folder)] == list(range(1, 49))
    whole = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"][name]
    assert whole.shape == (144, 128)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(144))
    assert (whole != half["state_dict"][name]).any(1).float().mean() > 0.9
