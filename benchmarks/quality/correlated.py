"""CLD on correlated batches: the same run with shuffled and with natural-order batches, with and without CLD.

python benchmarks/quality/correlated.py TRAIN TEST [-o benchmarks/results/correlated] [--seeds 0 1] [--epochs 3]

TRAIN and TEST are CIFAR-10's images, a folder a class: 1,500 images of its long-tailed part, each eight times with
small shifts. The other collection is `turntable`, 20 frames of each object. Natural order is that of the source: copy
after copy, frame after frame, class after class. Cells that OUTPUT.json has are not run again; OUTPUT.md is the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from quality.paper import judge, trained
from shared import records
from shared.beside import machine

GROUPS = {"off": None, "3/4 of the batch": 0.75, "1/8 of the batch": 0.125}
FIGURES = {"knn": "kNN, backbone", "linear": "linear, backbone"}


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("-o", "--output", default="benchmarks/results/correlated")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--runs", default="runs/correlated", help="where the runs' folders go")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one_cell(json.loads(arguments.one))
    else:
        grid(arguments)


def grid(arguments: argparse.Namespace) -> None:
    """Every cell that has no result yet, each in its own process; the table is written after each."""
    repeated = f"{arguments.train}@imbalance=100@repeat=8,shift=2@tracks=1500"
    sources = {"turntable": ("turntable", "turntable:test"), "repeated CIFAR-10": (repeated, arguments.test)}
    record = Path(arguments.output).with_suffix(".json")
    record.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(record.read_text())["cells"] if record.exists() else {}
    for seed, groups, name, order in itertools.product(arguments.seeds, GROUPS, sources, ("shuffled", "natural")):
        key = f"{name}, {order}, CLD {groups}, seed {seed}"
        line = [f"--epochs={arguments.epochs}", f"--batch_size={arguments.batch_size}", f"--order={order}"]
        line += [f"--encoder.width={arguments.width}", f"--seed={seed}", "--report_html=false", "--monitor_every=0"]
        line += ["--optimizer=adamw", "--lr=0.002", "--encoder.zero_init_last=false", "--method=MoCo"]
        line += ["--method.momentum=0.99", "--method.queue=4096"]
        share = GROUPS[groups]
        line += ["--cld.weight=0"] if share is None else [f"--cld.groups={round(share * arguments.batch_size)}"]
        if share is None:
            line += ["--method.online=2"]  # as many views as CLD lets the network see
        if done.get(key, {}).get("line") == line:
            continue
        folder = Path(arguments.runs) / key.replace(" ", "_").replace("/", "-").replace(",", "")
        wanted = {"source": sources[name][0], "test": sources[name][1], "folder": str(folder), "line": line}
        records.again(__file__, "-", "-", "--one", json.dumps(wanted), show=True)
        figures = json.loads((folder / "figures.json").read_text())
        done[key] = {"source": name, "order": order, "groups": groups, "seed": seed, "line": line, "figures": figures}
        record.write_text(json.dumps({"machine": machine(), "cells": done}, indent=1) + "\n")
        record.with_suffix(".md").write_text(markdown(done, arguments))
        print(f"{key}: { ({k: round(v, 1) for k, v in figures.items()}) }", flush=True)
    print(record.with_suffix(".md").read_text())


def one_cell(wanted: dict[str, Any]) -> None:
    """Train, or go on with a killed training, and judge by labels that training never saw."""
    folder = Path(wanted["folder"])
    trained(wanted["source"], wanted["line"], folder)
    (folder / "figures.json").write_text(json.dumps(judge(folder, wanted["source"], wanted["test"])))


def markdown(done: dict[str, Any], arguments: argparse.Namespace) -> str:
    """One row a collection, order and grouping, with the gain of CLD in the same order."""
    rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for cell in done.values():
        rows.setdefault((cell["source"], cell["order"], cell["groups"]), []).append(cell["figures"])
    lines = [
        f"{machine()}; MoCo, {arguments.epochs} epochs of AdamW, batch {arguments.batch_size}, ResNet-18 x "
        f"{arguments.width:g}; accuracy in % on balanced test images, mean over seeds; in brackets: what CLD adds",
        "",
        "| collection | batches | groups of CLD | seeds | " + " | ".join(FIGURES.values()) + " |",
        "|---|---|---|---|" + "---|" * len(FIGURES),
    ]
    for (source, order, groups), results in rows.items():
        without = rows.get((source, order, "off"), results)
        cells = []
        for name in FIGURES:
            mean, base = (statistics.mean(figures[name] for figures in part) for part in (results, without))
            cells.append(f"{mean:.1f}" + ("" if groups == "off" else f" ({mean - base:+.1f})"))
        lines.append(f"| {source} | {order} | {groups} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
