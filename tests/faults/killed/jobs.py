"""The commands that are killed, by name. To add one: subclass `kills.Job`, and put it into `JOBS`."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from kills import Job
from PIL import Image

from crosslevel import Encoder
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.data.pack_writer import Sizes
from crosslevel.features import embed as embedding
from crosslevel.models.encoder import View
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop.checkpoints import damage_of
from crosslevel.training.train import train
from crosslevel.tuning import storage, trial
from crosslevel.tuning.tune import tune
from crosslevel.utils.tensors import load_tensors

torch.set_num_threads(1)
embedding.open_encoder = functools.cache(embedding.open_encoder)


def pictures(folder: Path, count: int) -> None:
    """PNG files of 16 pixels, in two folders, one of them unreadable."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / "ab"[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    (folder / "b" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")


class Embed(Job):
    """A table in several pieces, beside or in place of an older one.

    Args:
        suffix: of the table.
        older: whether there is a table of other images in its place.

    """

    def __init__(self, suffix: str, older: bool = False) -> None:
        self.suffix, self.older = suffix, older

    def prepare(self, inputs: Path) -> None:
        torch.manual_seed(0)
        encoder = Encoder("resnet18", True, 0.0625)
        encoder.view = View(16)
        encoder.save(inputs / "encoder.safetensors")
        pictures(inputs / "photos", 21)
        pictures(inputs / "older", 4)
        embedding.open_encoder(str(inputs / "encoder.safetensors"))  # once for all tries
        os.environ["CROSSLEVEL_CACHE"] = str(inputs / "cache")

    def before(self, inputs: Path, out: Path) -> None:
        if self.older:
            (out / f"f{self.suffix}").write_bytes(b"older")
            if self.suffix == ".npy":
                (out / "f.csv").write_bytes(b"older")

    def run(self, inputs: Path, out: Path) -> None:
        asked = [inputs / "encoder.safetensors", inputs / "photos", "-o", out / f"f{self.suffix}"]
        run(embedding.embed, [*map(str, asked), "--device=cpu", "--workers=0", "--batch_size=4"], rows=8)

    def outcome(self, inputs: Path, out: Path) -> Any:
        bad = (out / "f.bad_files.txt").read_text()
        if self.suffix == ".parquet":
            table = pq.read_table(out / "f.parquet").to_pydict()
            return [len(table["path"]), _digest(table), bad]
        with (out / "f.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [len(rows), _digest(rows), _digest(np.load(out / "f.npy").tolist()), bad]

    def check(self, inputs: Path, out: Path) -> str | None:
        """A table in its place is whole, the older or the new one; a manifest is that of the array beside it."""
        file = out / f"f{self.suffix}"
        if not file.exists():
            return "the older table is gone" if self.older else None
        older = file.read_bytes() == b"older"
        if self.suffix == ".parquet":
            return None if older or len(pq.read_table(file)) == 21 else "a part of a table in its place"
        if not older and np.load(file).shape[0] != 21:
            return "a part of an array in its place"
        if (out / "f.csv").exists():
            manifest = (out / "f.csv").read_bytes()
            if (manifest == b"older") != older or (not older and manifest.count(b"\n") != 22):
                return "array and manifest do not belong together"
        return None


class Train(Job):
    """A training of two epochs with a checkpoint after every step; killed, it is resumed, or begun anew where nothing
    was saved yet. Its page is left out (it is drawn, and takes seconds), and TensorBoard's files are their library's.
    """

    def prepare(self, inputs: Path) -> None:
        pictures(inputs / "photos", 12)
        (inputs / "photos" / "b" / "bad.png").unlink()
        os.environ["CROSSLEVEL_CACHE"] = str(inputs / "cache")

    def run(self, inputs: Path, out: Path) -> None:
        small = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=6", "--precision=fp32", "--device=cpu"]
        often = ["--log_every=1", "--checkpoint_minutes=0", "--workers=0", "--monitor_every=0", "--report_html=false"]
        often += ["--logger=csv"]
        if Run(out / "r").holds_something():
            run(train, [f"--resume={out / 'r'}"])
        else:
            run(train, [str(inputs / "photos"), *small, *often, "--method=NPID", "--epochs=2", f"--run={out / 'r'}"])

    def outcome(self, inputs: Path, out: Path) -> Any:
        left = Run(out / "r")
        with left.metrics.open(newline="") as file:
            rows = [[row[name] for name in ("step", "loss", "lr")] for row in csv.DictReader(file)]
        weights = [_digest(file.read_bytes()) for file in (left.encoder, left.instance, left.cld)]
        state = load_tensors(left.last)["state_dict"]
        return [rows, weights, _digest({name: value.tolist() for name, value in state.items()})]

    def check(self, inputs: Path, out: Path) -> str | None:
        """What `--resume` reads is whole."""
        last = Run(out / "r").last
        return damage_of(last) or None if last.exists() else None


class Pack(Job):
    """A pack of several parts and shards, with the index of what it was made of in a cache that is watched as well.

    Args:
        kind: of the source: a folder, or a tar shard, whose index is kept.
        older: whether there is a finished pack of other images in its place, which is packed anew.

    """

    def __init__(self, kind: str, older: bool = False) -> None:
        self.kind, self.older = kind, older

    def prepare(self, inputs: Path) -> None:
        pictures(inputs / "photos", 21)
        pictures(inputs / "older", 6)
        with tarfile.open(inputs / "photos.tar", "w") as shard:
            for number, file in enumerate(sorted((inputs / "photos").rglob("*.png"))):
                shard.add(file, f"{number:03}.png")
        _packed(inputs / "older", inputs / "made")

    def before(self, inputs: Path, out: Path) -> None:
        os.environ["CROSSLEVEL_CACHE"] = str(out / "cache")
        if self.older:
            shutil.copytree(inputs / "made", out / "p")

    def run(self, inputs: Path, out: Path) -> None:
        _packed(inputs / ("photos.tar" if self.kind == "tar" else "photos"), out / "p")

    def outcome(self, inputs: Path, out: Path) -> Any:
        made = open_images(out / "p")
        about = json.loads((out / "p" / "pack.json").read_text())
        bad = (out / "p" / "bad_files.txt").read_text()
        return [made.paths[:], _digest([made[i][0].tolist() for i in range(len(made))]), about["shards"], bad]

    def check(self, inputs: Path, out: Path) -> str | None:
        """A pack that opens is whole: the older one, or the new one."""
        if not (out / "p" / "pack.json").exists():
            return None
        made = open_images(out / "p")
        for i in range(len(made)):
            made[i]
        return None if len(made) in ((21, 6) if self.older else (21,)) else f"{len(made)} images"


class Tune(Job):
    """A search over four settings, until all are tried. Its trainings are told, not done: `train` is a job of its own.

    What runs in their place is a process, as theirs is, which writes unwatched; it is killed with the search, or ends
    when that is gone.
    """

    slow = 40
    maps = "SQLite's -shm, an index of its log that it makes anew"

    def prepare(self, inputs: Path) -> None:
        pictures(inputs / "photos", 64)
        os.environ["CROSSLEVEL_CACHE"] = str(inputs / "cache")
        (inputs / "training.py").write_text(TRAINING)
        storage.patiently.__defaults__ = (0.5,)

    def run(self, inputs: Path, out: Path) -> None:
        def started(line: list[str], env: dict[str, str], **options: Any) -> Any:
            unwatched = {name: value for name, value in env.items() if name not in ("LD_PRELOAD", "FAULTS_CONTROL")}
            instead = [sys.executable, "-S", "-E", str(inputs / "training.py")]
            return subprocess.Popen([*instead, *line[3:]], env=unwatched, **options)

        training = functools.partial(trial.training, popen=started)
        small = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--epochs=2"]
        searched = ["--search=lr=0.01,0.1", "--search=cld.weight=0.0,0.5", "--trials=9", "--sampler=random"]
        run(
            tune,
            [str(inputs / "photos"), *searched, *small, "-o", str(out / "t"), "--pruning=false"],
            training=training,
        )

    def outcome(self, inputs: Path, out: Path) -> Any:
        with (out / "t" / "trials.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["outcome"] == "complete"]
        tried = sorted((row["lr"], row["cld.weight"], row["combined"]) for row in rows)
        best = yaml.safe_load((out / "t" / "config.yaml").read_text())
        return [tried, best["lr"], best["cld"]["weight"], "</html>" in (out / "t" / "report.html").read_text()]

    def files(self, out: Path) -> list[str]:
        """A trial that was cut off has a number and a folder of its own, and stays to be looked at."""
        return sorted({file for file in super().files(out) if not file.startswith("t/trials/")})

    def check(self, inputs: Path, out: Path) -> str | None:
        """What is in its place is whole; no trial that was told as complete is gone from the study."""
        best, table, page = (out / "t" / name for name in ("config.yaml", "trials.csv", "report.html"))
        if best.exists() and "cld" not in yaml.safe_load(best.read_text()):
            return "a part of the best settings in its place"
        if page.exists() and not page.read_text().rstrip().endswith("</html>"):
            return "a part of a page in its place"
        told = table.read_text().count(",complete,") if table.exists() else 0
        if not (out / "t" / "study.db").exists():
            return "the study is gone" if told else None
        with contextlib.closing(sqlite3.connect(out / "t" / "study.db")) as study:
            if study.execute("pragma integrity_check").fetchall() != [("ok",)]:
                return "the study is damaged"
            made = study.execute("select 1 from sqlite_master where name = 'trials'").fetchall()
            known = study.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0] if made else 0
        return f"{told} trials told, {known} known" if told > known else None


TRAINING = """
import hashlib, json, os, sys
folder, options = sys.argv[3], sorted(option for option in sys.argv[4:] if "lr=" in option or "weight=" in option)
os.makedirs(os.path.join(folder, "checkpoints"), exist_ok=True)
with open(os.path.join(folder, "checkpoints", "last.ckpt"), "w") as file:
    file.write("large")
score = int(hashlib.sha256(repr(options).encode()).hexdigest()[:6], 16) / 0xFFFFFF
for epoch in (1, 2):
    figures = {"combined": score * epoch / 2, "effective_rank": 5.0, "collapse": "", "symptoms": ""}
    print(json.dumps(figures), flush=True)
    if not sys.stdin.readline():
        sys.exit(1)
"""


def _packed(source: Path, folder: Path) -> None:
    run(pack, [str(source), "-o", str(folder), "--size=8", "--workers=0"], sizes=Sizes(4, 2_000, 2))


def _digest(thing: object) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


JOBS: dict[str, Job] = {
    "train": Train(),
    "pack": Pack("folder"),
    "pack of a shard": Pack("tar"),
    "pack, in place of an older one": Pack("folder", older=True),
    "tune": Tune(),
    "embed.parquet": Embed(".parquet"),
    "embed.npy": Embed(".npy"),
    "embed.parquet, in place of an older table": Embed(".parquet", older=True),
    "embed.npy, in place of an older table": Embed(".npy", older=True),
}
