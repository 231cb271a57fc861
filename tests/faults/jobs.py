"""The commands that are killed, by name. To add one: subclass `kills.Job`, and put it into `JOBS`."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from kills import Job
from PIL import Image

from crosslevel import Encoder
from crosslevel.features import embed as embedding
from crosslevel.models.encoder import View
from crosslevel.runs import Run
from crosslevel.settings.parser import run
from crosslevel.training.loop import log as logging
from crosslevel.training.loop.checkpoints import damage_of
from crosslevel.training.train import train
from crosslevel.utils.tensors import load_tensors

torch.set_num_threads(1)
embedding.load_encoder = functools.cache(embedding.load_encoder)


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
        embedding.load_encoder(str(inputs / "encoder.safetensors"))  # once for all tries
        os.environ["CROSSLEVEL_CACHE"] = str(inputs / "cache")

    def before(self, inputs: Path, out: Path) -> None:
        if self.older:
            (out / f"f{self.suffix}").write_bytes(b"older")
            if self.suffix == ".npy":
                (out / "f.csv").write_bytes(b"older")

    def run(self, inputs: Path, out: Path) -> None:
        embedding.ROWS = 8
        asked = [inputs / "encoder.safetensors", inputs / "photos", "-o", out / f"f{self.suffix}"]
        run(embedding.embed, [*map(str, asked), "--device=cpu", "--workers=0", "--batch_size=4"])

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
        logging.TensorBoardLogger = _NoBoard

    def run(self, inputs: Path, out: Path) -> None:
        small = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=6", "--precision=fp32", "--device=cpu"]
        often = ["--log_every=1", "--checkpoint_minutes=0", "--workers=0", "--monitor_every=0", "--report_html=false"]
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


class _NoBoard:
    def __init__(self, *where: Any, **how: Any) -> None: ...

    def log_metrics(self, *row: Any) -> None: ...

    def finalize(self, how: str) -> None: ...


def _digest(thing: object) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


JOBS: dict[str, Job] = {
    "train": Train(),
    "embed.parquet": Embed(".parquet"),
    "embed.npy": Embed(".npy"),
    "embed.parquet, in place of an older table": Embed(".parquet", older=True),
    "embed.npy, in place of an older table": Embed(".npy", older=True),
}
