"""The paper's comparison: methods, each with and without CLD, over heads and seeds, on one data set and budget.

python benchmarks/quality/paper.py TRAIN TEST -o results/paper-cpu --methods SimCLR MoCo NPID BYOL --seeds 0 1 \
    --imbalance 100 --epochs 30 --width 0.25 --jobs 2 [-- options of crosslevel train]

TRAIN and TEST are labelled; the labels only judge. ``--imbalance`` makes TRAIN long-tailed. With and without CLD
a method sees the same number of views in the same steps (``--published``: without CLD only as many as the method
itself asks for). Every cell is one `crosslevel train` in its own process, continued where it was killed or stopped; a
cell that is in OUTPUT.json, with the same images and options, is not run again. OUTPUT.json has every cell and the
rows with mean and spread, OUTPUT.md the rows as a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.subsets.select import long_tailed
from crosslevel.evaluation.session import labelled_pair
from crosslevel.features.extract import extract
from crosslevel.metrics.knn import weighted_knn
from crosslevel.models.encoder import load_encoder
from crosslevel.runs import load_branches
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine

# What the authors' CIFAR-10 recipes set; SimCLR and BYOL with CLD are no recipe of theirs.
WITH_CLD = {
    "npid": ["--cld.weight=1.0", "--cld.groups=0.5"],
    "moco": ["--cld.weight=0.8", "--cld.groups=0.78"],
    "simclr": ["--cld.weight=0.25", "--cld.groups=0.78"],
    "byol": ["--cld.weight=0.25", "--cld.groups=0.78"],
}
TWO_QUERIES = {"npid", "moco"}
FIGURES = {
    "knn": "kNN, backbone",
    "knn_instance": "kNN, instance branch",
    "knn_group": "kNN, group branch",
    "linear": "linear, backbone",
    "knn_all": "kNN, backbone, all labels",
    "linear_all": "linear, backbone, all labels",
}


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("-o", "--output", default="benchmarks/results/paper")
    parser.add_argument("--methods", nargs="+", default=["SimCLR", "MoCo", "NPID", "BYOL"])
    parser.add_argument("--cld", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--heads", nargs="+", default=["default"], help="of both branches: linear, norm-mlp, ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--imbalance", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--options", nargs="*", default=[], help="METHOD:--option=value, for that method's cells alone")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--again", action="store_true", help="judge finished runs anew")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, sharing the processor's cores")
    parser.add_argument("--runs", default="runs/paper", help="where the runs' folders go")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    words = sys.argv[1:]
    separator = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:separator])
    arguments.rest = words[separator + 1 :]
    if arguments.one:
        one_cell(json.loads(arguments.one))
    else:
        grid(arguments)


def grid(arguments: argparse.Namespace) -> None:
    """Run every cell that has no result yet, and write the table after each."""
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    source = long_tailed_list(arguments.train, arguments.imbalance, output.with_suffix(".txt"))
    runs_dir = Path(arguments.runs) / output.name
    counts = [len(open_images(split)) for split in (source, arguments.test)]
    data = {"imbalance": arguments.imbalance, "images": counts[0], "test_images": counts[1]}
    cells = [
        cell(arguments, source, runs_dir, *key) | {"data": data}
        for key in itertools.product(arguments.seeds, arguments.heads, arguments.methods, arguments.cld)
    ]
    record = output.with_suffix(".json")
    done: dict[str, Any] = json.loads(record.read_text())["cells"] if record.exists() else {}
    lock, cores = Lock(), len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // arguments.jobs))}

    def work(requested: dict[str, Any]) -> None:
        name = requested["name"]
        if same(done.get(name), requested) and not arguments.again:
            return
        folder = Path(requested["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{name}.log").open("a") as log:
            line = [sys.executable, __file__, arguments.train, arguments.test, "--one", json.dumps(requested)]
            code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        if code:
            print(f"{name}: exit status {code}; see {folder.parent / name}.log", flush=True)
            return
        with lock:
            done[name] = json.loads((folder / "figures.json").read_text())
            write(record, done, [done[c["name"]] for c in cells if same(done.get(c["name"]), c)], arguments)
        print(f"{name}: { ({k: round(v, 1) for k, v in done[name]['figures'].items()}) }", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, cells))
    missing = [requested["name"] for requested in cells if not same(done.get(requested["name"]), requested)]
    if missing:
        sys.exit(f"no result: {', '.join(missing)}; the same command tries them again")
    print(output.with_suffix(".md").read_text())


def same(done: dict[str, Any] | None, requested: dict[str, Any]) -> bool:
    """Whether a recorded cell is the one that is wanted: of the same images and options."""
    return done is not None and all(done.get(key) == requested[key] for key in ("line", "data"))


def write(record: Path, done: dict[str, Any], cells: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write all cells that are done, and the rows of this grid's ``cells``."""
    rows = summarized(cells)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "rows": rows, "cells": done}, indent=1) + "\n")
    os.replace(temporary, record)
    record.with_suffix(".md").write_text(markdown(rows, arguments))


def cell(
    arguments: argparse.Namespace, source: str, runs_dir: Path, seed: int, head: str, method: str, cld: str
) -> dict[str, Any]:
    """One run: its name, its folder, and the options of `crosslevel train`."""
    name = f"{method.lower()}{'-cld' if cld == 'on' else ''}-{head}-{seed}"
    line = [f"--method={method}", f"--epochs={arguments.epochs}", f"--batch_size={arguments.batch_size}"]
    line += [f"--encoder.width={arguments.width}", f"--seed={seed}", "--report_html=false"]
    if head != "default":
        line += [f"--method.head={head}", f"--cld.head={head}"]
    if method.lower() in TWO_QUERIES and not (arguments.published and cld == "off"):
        line += ["--method.online=2"]
    for option in WITH_CLD[method.lower()] if cld == "on" else ["--cld.weight=0"]:
        key, value = option.split("=")
        line += [f"{key}={round(float(value) * arguments.batch_size)}" if key == "--cld.groups" else option]
    of_method = [option.partition(":") for option in arguments.options]
    line += [option for name, _, option in of_method if name.lower() == method.lower()]
    line += arguments.rest
    return {
        "name": name, "method": method, "cld": cld, "head": head, "seed": seed, "folder": str(runs_dir / name),
        "source": source, "train": arguments.train, "test": arguments.test, "line": shlex.join(line),
    }  # fmt: skip


def one_cell(requested: dict[str, Any]) -> None:
    """Train, or go on with a killed training, and judge."""
    folder = Path(requested["folder"])
    trained(requested["source"], shlex.split(requested["line"]), folder)
    figures = judge(folder, requested["source"], requested["test"])
    if requested["source"] != requested["train"]:
        # The same features, judged by labels that are not long-tailed themselves.
        more = judge(folder, requested["train"], requested["test"])
        figures |= {f"{name}_all": more[name] for name in ("knn", "linear")}
    record = {k: requested[k] for k in ("method", "cld", "head", "seed", "line", "data")}
    (folder / "figures.json").write_text(json.dumps({**record, "figures": figures}))


def trained(source: str, line: list[str], folder: Path, rules: str = "", **more: Any) -> None:
    """Train in ``folder``, or go on there with the same training; files of another training are deleted.

    ``rules`` changes with the defaults that the line leaves open; ``more`` are arguments of `train` that no command
    line sets.
    """
    begun, ended = (folder.with_name(f"{folder.name}.{word}") for word in ("begun", "ended"))
    command = shlex.join([source, *line]) + (rules and f" # {rules}")
    if not begun.is_file() or begun.read_text() != command:
        for file in (ended, folder.with_name(f"{folder.name}.seconds")):
            file.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun.write_text(command)
    if not ended.is_file():  # a training that is stopped leaves an encoder as well
        started = (folder / "checkpoints" / "last.ckpt").is_file()
        run(train, [source, *(["--resume", str(folder)] if started else [*line, "--run", str(folder)])], **more)
        ended.touch()


def judge(folder: Path, source: str, test: str) -> dict[str, float]:
    """Accuracies in percent: kNN (k = 200, T = 0.1) of three features, and a linear classifier on the backbone's."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, queries = labelled_pair(source, test)
    if bank.classes != queries.classes:
        sys.exit(f"{source} and {test} differ in their classes")
    encoder, hardware = load_encoder(folder), choose()
    bank_features, query_features = (
        extract(encoder, pack(part, encoder.view.size, bad_files=BadFiles()), hardware=hardware)
        for part in (bank, queries)
    )
    heads = {f"knn_{name.removesuffix(' branch')}": head for name, head in load_branches(folder).items()}
    branches = {"knn": torch.nn.Identity(), **heads}
    figures = {}
    with torch.no_grad():
        for name, branch in branches.items():
            a, b = branch.eval()(bank_features.features), branch(query_features.features)
            votes = weighted_knn(a, bank_features.labels, b, len(bank.classes or []))
            figures[name] = 100 * float((votes.argmax(1) == query_features.labels).float().mean())
    # The regularization is chosen by cross-validation within the training set.
    linear = make_pipeline(
        StandardScaler(), LogisticRegressionCV(Cs=[0.001, 0.01, 0.1], cv=3, max_iter=1000, scoring="accuracy")
    )
    linear.fit(bank_features.features.numpy(), bank_features.labels.numpy())
    return figures | {
        "linear": 100 * float(linear.score(query_features.features.numpy(), query_features.labels.numpy()))
    }


def long_tailed_list(source: str, imbalance: float, file: Path, most: int | None = None) -> str:
    """``source`` itself, or a list of its long-tailed part's files, of the largest class at most ``most``."""
    if imbalance == 1 and most is None:
        return source
    images = open_images(source)
    if images.labels is None or not os.path.isdir(source):
        sys.exit(f"{source}: --imbalance needs a folder with one sub-folder a class")
    rows = torch.arange(len(images))
    if most is not None:
        rows = torch.cat([(images.labels == c).nonzero().squeeze(1)[:most] for c in images.labels.unique()])
    index = rows[long_tailed(images.labels[rows], imbalance, torch.Generator().manual_seed(0))]
    paths = [os.path.abspath(os.path.join(source, images.paths[i])) for i in index.tolist()]
    target = Path("runs") / file.name
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(paths) + "\n")
    return str(target)


def summarized(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds (None of a single one) of every figure, a row a method, head and CLD."""
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for done in cells:
        groups.setdefault((done["method"], done["head"], done["cld"]), []).append(done["figures"])
    rows = []
    for (method, head, cld), figures in sorted(groups.items()):
        row: dict[str, Any] = {"method": method, "head": head, "cld": cld, "seeds": len(figures)}
        for name in FIGURES:
            values = [one[name] for one in figures if name in one]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                row[name] = {"mean": statistics.mean(values), "deviation": deviation}
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The rows as a table."""
    lines = [
        f"{machine()}; imbalance {arguments.imbalance:g}, {arguments.epochs} epochs, batch {arguments.batch_size}, "
        f"ResNet-18 x {arguments.width:g}; accuracy in %, mean ± standard deviation over seeds.",
        "",
        "| method | head | CLD | seeds | " + " | ".join(FIGURES.values()) + " |",
        "|---|---|---|---|" + "---|" * len(FIGURES),
    ]
    for row in rows:
        figures = " | ".join(spread(row.get(name)) for name in FIGURES)
        lines.append(f"| {row['method']} | {row['head']} | {row['cld']} | {row['seeds']} | {figures} |")
    return "\n".join(lines) + "\n"


def spread(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:.1f}" + ("" if figure["deviation"] is None else f" ± {figure['deviation']:.1f}")


if __name__ == "__main__":
    main()
