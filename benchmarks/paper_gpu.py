"""The paper's table for CIFAR-10 on one GPU: NPID and MoCo, each with and without CLD, 200 epochs by the recipes.

python benchmarks/paper_gpu.py DATA --cells next --minutes 8 [-o OUTPUT] [--runs RUNS] [-- options of crosslevel train]

DATA is a folder with one sub-folder a class in train/ and in test/, or a tar of it (cifar10-jpeg.tar.xz). A cell is one
`crosslevel train --recipe cifar10-NAME` in its own process. After so many minutes it is asked to stop, writes its
checkpoint, and goes on from there in the next call; a cell that is whole is not trained again. Every 20 epochs the
test images are classified by weighted kNN (k = 200, T as the recipe's head says) among the training images, on the
instance branch's features (the published figure), the group branch's, and the shared ones. OUTPUT.json has all of
these with the card and the date, OUTPUT.md the table of the newest. The labels judge, and do nothing else.

Cells: npid, npid-cld, moco, moco-cld, further ones by a recipe's name; `next` is the first that is not whole, `all`
are these four, each for so many minutes. A cell that falls short is tried again with what may be the reason, as
npid-cld+fp32: torch-init (weights drawn as the authors' code does), fp32, per-view (NPID's bank moved by each view),
splits (batch statistics of half batches). The step is compiled where `crosslevel train --compile auto` would; options
after ``--``, such as --compile=off, make another cell. --until 40 stops a cell after 40 of its epochs. Without a GPU

    python benchmarks/paper_gpu.py DATA --cpu

trains the first 50 epochs of npid and npid-cld at a quarter of the width, with figures every 10 epochs, into
benchmarks/results/paper_cpu.md: whether NPID alone is stable at the recipe's rate. It, too, goes on where it was.

Beside PyTorch it needs torchvision, timm, lightning-fabric (or pytorch-lightning, which has it), pyarrow, pyyaml, rich,
filelock (4.2 or later), jaxtyping, jinja2, matplotlib, numpy, pillow, safetensors, scikit-learn and scipy; shtab and
tensorboard are optional. Where nothing can be downloaded, those that `python benchmarks/paper_gpu.py --missing` prints
must be carried as wheels (`benchmarks/gpu.py` says how). Crosslevel itself need not be installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.paper_table import BRANCHES, PUBLISHED, VARIANTS, markdown

ROOT = Path(__file__).resolve().parents[1]
INSTEAD = {"lightning-fabric": "pytorch-lightning"}  # packages of the same versions that have the other in them
EVERY = 20  # epochs
GRACE = 60  # seconds in which a cell that was asked to stop has to write its checkpoint
VOTE = {"MoCo": 0.07, "NPID": 0.1}  # T of the kNN's votes in the authors' programs
QUARTER = "--encoder.width=0.25"
CPU: dict[str, Any] = {
    "cells": ["npid", "npid-cld"], "minutes": math.inf, "every": 10, "until": 50,
    "output": "benchmarks/results/paper_cpu", "runs": "runs/paper_cpu",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--cells", nargs="+", default=["next"])
    parser.add_argument("--minutes", type=float, default=8.0, help="of one cell in this call")
    parser.add_argument("--every", type=int, default=EVERY, help="epochs between figures")
    parser.add_argument("--until", type=int, help="stop a cell after so many of its epochs, a multiple of --every")
    parser.add_argument("--cpu", action="store_true", help="the first 50 epochs of NPID at a quarter of the width")
    parser.add_argument("-o", "--output", default="benchmarks/results/paper_gpu")
    parser.add_argument("--runs", default="runs/paper_gpu")
    parser.add_argument("--missing", action="store_true", help="only print which packages are missing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    words, rest = sys.argv[1:], []
    if "--" in words:
        separator = words.index("--")
        words, rest = words[:separator], words[separator + 1 :]
    if "--cpu" in words:
        parser.set_defaults(**CPU)
        rest = [QUARTER, *rest]
    arguments = parser.parse_args(words)
    if arguments.missing:
        print(" ".join(missing()) or "nothing is missing")
        return
    if arguments.one:
        train_cell(json.loads(arguments.one))
        return
    if not arguments.data:
        parser.error("DATA: give the folder with train/ and test/, or a tar of it")
    if arguments.until is not None and arguments.until % arguments.every:
        parser.error(f"--until {arguments.until}: a multiple of --every {arguments.every}, where figures are taken")
    grid(arguments, rest)


def missing(version: Callable[[str], str] = importlib.metadata.version) -> list[str]:
    """The packages, as pyproject.toml names them, that are missing or older than needed, by their ``version``."""

    def present(name: str, least: str) -> bool:
        try:
            return _numbers(version(name)) >= _numbers(least)
        except importlib.metadata.PackageNotFoundError:
            return False

    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lacks = []
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        if not present(name, least) and not present(INSTEAD.get(name, name), least):
            lacks.append(requirement)
    return lacks


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def grid(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run each requested cell for its minutes, then write the table."""
    from shared import records  # after --missing, which tells that filelock is

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    record = Path(arguments.output).with_suffix(".json")
    names = wanted(arguments.cells, record, rest, arguments.until)
    cells = {name: cell(name, arguments, rest, record) for name in names}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    for name, one in cells.items():
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, __file__, "--one", json.dumps(one)], env=environment)
        try:
            process.wait(None if math.isinf(arguments.minutes) else 60 * arguments.minutes)
        except subprocess.TimeoutExpired:
            end(process)
        except KeyboardInterrupt:  # the cell got the signal as well
            process.wait()
            raise
        except SystemExit:
            end(process)
            raise
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes, exit status {process.returncode}", flush=True)
    table = markdown(records.read(record, "cells"), [] if arguments.cpu else list(PUBLISHED))
    record.with_suffix(".md").write_text(table)
    print(table)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a cell to stop, which writes its checkpoint; kill it where that takes too long."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wanted(requested: list[str], record: Path, rest: list[str], until: int | None = None) -> list[str]:
    """The cells to run: those that are named, `next` or `all`, without what the record has whole."""
    from shared import records

    recorded = records.read(record, "cells")
    left = [name for name in PUBLISHED if not whole(recorded.get(title(name, rest)), until)]
    selected = left[:1] if requested == ["next"] else left if requested == ["all"] else requested
    return [name for name in selected if not whole(recorded.get(title(name, rest)), until)]


def title(name: str, rest: list[str]) -> str:
    """A cell's name in the record: with other options it is another one."""
    return shlex.join([name, *rest])


def whole(recorded: dict[str, Any] | None, until: int | None = None) -> bool:
    """Whether a recorded cell was trained to its end, or for so many epochs."""
    if recorded is None:
        return False
    return bool(recorded["epochs_done"] >= min(recorded["epochs"], until or recorded["epochs"]))


def cell(name: str, arguments: argparse.Namespace, rest: list[str], record: Path) -> dict[str, Any]:
    """The settings of a cell, which its own process reads."""
    base, *variants = name.split("+")
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise SystemExit(f"no variant is named {unknown[0]}: take {', '.join(VARIANTS)}")
    return {
        "name": title(name, rest), "recipe": f"cifar10-{base}" if base in PUBLISHED else base, "data": arguments.data,
        "runs": arguments.runs, "record": str(record), "until": arguments.until, "every": arguments.every,
        "options": [*(VARIANTS[variant] for variant in variants), *rest],
    }  # fmt: skip


def train_cell(wanted: dict[str, Any]) -> None:
    """Train, or go on with, one cell, and record its figures; in a process of its own."""
    import torch
    from quality.paper import trained

    from crosslevel.data.pack import pack

    data, runs = unpacked(Path(wanted["data"]), Path(wanted["runs"])), Path(wanted["runs"])
    packs = {part: runs / f"{part}.pack" for part in ("train", "test")}
    for part, target in packs.items():
        pack(str(data / part), str(target), size=32, quiet=True)
    line = ["--recipe", wanted["recipe"], f"--monitor_every={wanted['every']}", "--report_html=false", "--compile=auto"]
    line += wanted["options"]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    trained(str(packs["train"]), line, folder_of(wanted), watch=Judge(wanted, packs, card))


def folder_of(wanted: dict[str, Any]) -> Path:
    """Where a cell is trained."""
    return Path(wanted["runs"]) / re.sub(r"[^\w.=+-]+", "_", wanted["name"])


def unpacked(data: Path, runs: Path) -> Path:
    """The folder with train/ and test/; a tar is unpacked below ``runs``."""
    if data.is_dir():
        return data
    target = runs / data.name.split(".")[0]
    if not (target / ".whole").is_file():
        with tarfile.open(data) as tar:
            tar.extractall(target, filter="data")
        (target / ".whole").touch()
    return next(folder.parent for folder in sorted(target.rglob("train")) if folder.is_dir())


class Judge:
    """A `Watch` that classifies the test images every so many epochs and after the last, and keeps the record."""

    def __init__(self, wanted: dict[str, Any], packs: dict[str, Path], card: str) -> None:
        self.wanted, self.packs, self.card = wanted, packs, card
        self.file = folder_of(wanted)

    def part(self, source: Any) -> Any:
        """All images are trained on."""
        return source

    def monitor(self, encoder: Any, method: Any, cld: Any, hardware: Any, unreadable: Any) -> Any:
        """The function to call at the end of an epoch."""
        import yaml
        from shared import records

        from crosslevel.data.bad_files import BadFiles
        from crosslevel.data.loaders.batches import pack
        from crosslevel.data.open import open_images

        bank, queries = (pack(open_images(p), encoder.view.size, bad_files=BadFiles()) for p in self.packs.values())
        settings = yaml.safe_load((self.file / "config.yaml").read_text())
        every, total = settings["monitor_every"], settings["epochs"]
        mine = records.read(Path(self.wanted["record"]), "cells").get(self.wanted["name"], {})
        done = self._epochs_done()
        curve = {k: v for k, v in mine.get("figures", {}).items() if int(k) <= done}
        temperature = VOTE.get(type(method).__name__, 0.1)
        epoch = [done // every * every]

        def measure() -> dict[str, float]:
            epoch[0] = min(epoch[0] + every, int(total))
            figures = accuracies(encoder, method, cld, bank, queries, hardware, temperature)
            curve[str(epoch[0])] = figures
            self._keep(curve, epoch[0], int(total), temperature, settings)
            print(f"{self.wanted['name']}: epoch {epoch[0]}: {figures}", flush=True)
            if self.wanted["until"] is not None and self.wanted["until"] <= epoch[0] < total:
                os.kill(os.getpid(), signal.SIGTERM)  # the training ends with a checkpoint
            return {"knn": figures["shared"]}

        return measure

    def _epochs_done(self) -> int:
        """Whole epochs in the checkpoint that the training goes on from."""
        from crosslevel.runs import Run
        from crosslevel.training.loop import checkpoints

        run = Run(self.file)
        return int(checkpoints.read(run)["epoch"]) if run.last.is_file() else 0

    def _keep(self, curve: dict[str, Any], epoch: int, total: int, vote: float, settings: dict[str, Any]) -> None:
        import torch
        from shared import records

        with (self.file / "metrics.csv").open() as file:
            rates = [float(row["images_per_second"]) for row in csv.DictReader(file) if row["images_per_second"]]
        value = {
            "recipe": self.wanted["recipe"], "options": self.wanted["options"], "epochs": total, "epochs_done": epoch,
            "figures": curve, "vote_temperature": vote, "precision": settings["precision"],
            "images_per_second": statistics.median(rates) if rates else None, "card": self.card,
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        records.add(Path(self.wanted["record"]), "cells", self.wanted["name"], value, {"program": Path(__file__).name})


def accuracies(
    encoder: Any, method: Any, cld: Any, bank: Any, queries: Any, hardware: Any, temperature: float
) -> dict[str, float]:
    """Weighted kNN (k = 200) of the test images, in percent, by each branch's features and the shared ones."""
    import torch

    from crosslevel.features.extract import extract
    from crosslevel.metrics.knn import weighted_knn

    bank_features, query_features = (extract(encoder, part, hardware=hardware) for part in (bank, queries))
    features = [part.features.to(hardware.device) for part in (bank_features, query_features)]
    labels, truth = (part.labels.to(hardware.device) for part in (bank_features, query_features))
    project = {"instance": method.project, "group": None if cld is None else cld.project, "shared": lambda h: h}
    result = {}
    with torch.no_grad():
        for name in BRANCHES:
            branch = project[name]
            if branch is None:
                continue
            a, b = (branch(h) for h in features)
            votes = weighted_knn(a, labels, b, int(labels.max()) + 1, k=200, temperature=temperature)
            result[name] = round(100 * float((votes.argmax(1) == truth).float().mean()), 2)
    return result


if __name__ == "__main__":
    main()
