"""A run on two processes, through the command itself."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from crosslevel import load_encoder

SOURCE = "turntable,classes=4,objects=24,frames=6,size=16,imbalance=4"


def test_two_processes_train_one_run(tmp_path):
    options = [
        "--encoder.width=0.0625",
        "--batch_size=16",
        "--epochs=2",
        "--device=cpu",
        "--devices=2",
        "--log_every=1",
    ]
    options += ["--cld.gather=true", "--workers=0"]
    out = subprocess.run(
        [Path(sys.executable).with_name("crosslevel"), "train", SOURCE, *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["turntable-moco-cld"]
    folder = tmp_path / "runs" / "turntable-moco-cld"
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    # 144 images in two shares of 72: four batches of 16 each an epoch.
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    # Groups over both ranks: three quarters of 32 images, not of 16.
    assert {float(row["groups_used"]) for row in rows} <= {23.5, 24.0}
    load_encoder(folder)
    assert "Groups that CLD finds" in (folder / "report.html").read_text()
