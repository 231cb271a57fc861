"""Does the search pay? `crosslevel tune` against random search of the same budget and against the settings as given.

python benchmarks/quality/tune.py cifar10-lt DATA/train DATA/test --imbalance 100 \
    -- --recipe cifar10-moco-cld --epochs 9
python benchmarks/quality/tune.py turntable turntable turntable:test -- --epochs 9

Each way (tune: TPE, pruning and finalists; random: none of them; given: no search) ends in settings, found without
labels. An encoder is trained with these settings on all of TRAIN, ``--trainings`` times with other seeds, since two
trainings of one setting differ as much as two good settings, and judged on TEST, balanced and labelled, by kNN against
TRAIN's labels (of its long-tailed part where there is --imbalance): with the usual k = 200, and with k = 20, since the
rare classes of a long tail have fewer than 200 images. Results in benchmarks/results/tune.json are not computed again,
and a search or a training that was killed goes on. Options after ``--`` go to `crosslevel train`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.evaluation.session import labelled_pair
from crosslevel.features.extract import extract
from crosslevel.metrics.knn import weighted_knn
from crosslevel.models.encoder import load_encoder

sys.path.append(str(Path(__file__).parents[1]))

from quality.paper import long_tailed_list
from shared import records
from shared.beside import machine
from shared.records import add, read

RESULTS = Path(__file__).parents[1] / "results" / "tune.json"
WAYS = {
    "given": None,
    "random": ["--sampler=random", "--pruning=false", "--finalists=0"],
    "tune": ["--sampler=tpe", "--pruning=true"],
}

SEEDS_APART = 100  # of the trainings of one cell
NEIGHBOURS = (200, 20)


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("name", help="of the collection, in the table")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--imbalance", type=float, default=1.0)
    parser.add_argument("--most", type=int, help="images of the largest class; all of them unless given")
    parser.add_argument("--budget", type=float, default=12)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trainings", type=int, default=4, help="of the settings of each cell, which are averaged")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", default="runs/tune-benchmark")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    words = sys.argv[1:]
    separator = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:separator])
    options = words[separator + 1 :]
    source = long_tailed_list(arguments.train, arguments.imbalance, Path(f"{arguments.name}.txt"), arguments.most)
    for seed in arguments.seeds:
        for way in arguments.ways:
            key = f"{arguments.name} {way} {seed}"
            images = about_images(arguments, source)
            search = {"options": options, "budget": arguments.budget, "images": images}
            tested = {"trainings": arguments.trainings, "test": len(open_images(arguments.test))}
            about = {**search, **tested, "neighbours": list(NEIGHBOURS)}
            if read(arguments.output, "cells").get(key, {}).get("about") == about:
                continue
            digest = hashlib.sha256(json.dumps(search).encode()).hexdigest()[:8]  # other settings, other folders
            run_dir = Path(arguments.runs) / arguments.name / f"{way}-{seed}-{digest}"
            result = cell(arguments, run_dir, source, way, seed, options)
            entry = {"name": arguments.name, "way": way, "seed": seed, "about": about, **result}
            done = add(arguments.output, "cells", key, entry, {"machine": machine()})
            arguments.output.with_suffix(".md").write_text(markdown(done))
            print(f"{key}: {result['knn']:.1f} %", flush=True)
    print(arguments.output.with_suffix(".md").read_text())


def about_images(arguments: argparse.Namespace, source: str) -> dict[str, Any]:
    """The description of the images that the cells of a table share, without their folder."""
    return {"imbalance": arguments.imbalance, "count": len(open_images(source))}


def cell(
    arguments: argparse.Namespace, run_dir: Path, source: str, way: str, seed: int, options: list[str]
) -> dict[str, Any]:
    """Search where the way has a search, train with its settings ``--trainings`` times, and judge each training."""
    settings, result = [source, *options], {"spent": 0.0, "trials": 0}
    search = WAYS[way]
    if search is not None:
        call("tune", *settings, *search, f"--budget={arguments.budget}", f"--jobs={arguments.jobs}", f"--seed={seed}",
             f"--output={run_dir / 'search'}")  # fmt: skip
        settings = ["--config", str(run_dir / "search" / "config.yaml")]
        with (run_dir / "search" / "trials.csv").open(newline="") as file:
            trials = list(csv.DictReader(file))
        result = {"spent": sum(float(trial["cost"]) for trial in trials), "trials": len(trials)}
    each: dict[str, list[float]] = {"knn": [], "knn20": []}
    for number in range(arguments.trainings):
        run = run_dir / ("run" if number == 0 else f"run-{number}")
        if not (run / "encoder.safetensors").is_file():
            resumed = (run / "checkpoints" / "last.ckpt").is_file()
            new = [*settings, f"--seed={seed + SEEDS_APART * number}", f"--run={run}", "--report_html=false"]
            call("train", *(["--resume", str(run)] if resumed else new))
        for k, accuracy in zip(each, judge(run, source, arguments.test), strict=True):
            each[k].append(accuracy)
    return {**result, **{k: statistics.mean(accuracies) for k, accuracies in each.items()}, "each": each}


def call(*line: str) -> None:
    """One command of crosslevel."""
    command = [sys.executable, "-c", "from crosslevel.cli import main; main()", *line]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"failed: crosslevel {' '.join(line)}; the same command goes on from here")


def judge(run: Path, source: str, test: str) -> list[float]:
    """KNN accuracy in percent of the backbone's features, with each of `NEIGHBOURS`."""
    bank, queries = labelled_pair(source, test)
    encoder = load_encoder(run)
    bank_features, query_features = (
        extract(encoder, pack(part, encoder.view.size, bad_files=BadFiles())) for part in (bank, queries)
    )
    accuracies = []
    for limit in NEIGHBOURS:
        k = min(limit, len(bank_features.labels) // 10)
        votes = weighted_knn(
            bank_features.features, bank_features.labels, query_features.features, len(bank.classes or []), k=k
        )
        accuracies.append(100 * float((votes.argmax(1) == query_features.labels).float().mean()))
    return accuracies


def markdown(done: dict[str, Any]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        f"{done['machine']}; kNN accuracy on the balanced test set in %, of each seed the mean of its trainings: "
        "mean ± standard deviation over seeds.",
        "",
        "| collection | settings from | trainings spent | trials | k = 200, seed by seed | k = 200 | k = 20 |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(c["name"] for c in done["cells"].values()):
        for way in WAYS:
            cells = [c for c in done["cells"].values() if (c["name"], c["way"]) == (name, way)]
            cells.sort(key=lambda c: c["seed"])
            if cells:
                columns = ("spent", "trials", "knn", "knn20")
                spent, trials, knn, few = ([float(c[x]) for c in cells] for x in columns)
                each = ", ".join(f"{accuracy:.1f}" for accuracy in knn)
                lines.append(
                    f"| {name} | {way} | {statistics.mean(spent):.1f} | {statistics.mean(trials):.0f} | "
                    f"{each} | {_spread(knn)} | {_spread(few)} |"
                )
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    deviation = f" ± {torch.tensor(values).std().item():.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
