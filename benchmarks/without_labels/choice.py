"""Did the score's choices lose by chance? Trainings of their own for the choices of `label_free.py` and what was best.

python benchmarks/without_labels/choice.py -o benchmarks/results/choice --cifar TRAIN TEST

The best of thirty settings in hindsight is partly the luckiest one. Here the settings that the score chose, among all
and among those with the views that are scored, and those that were best or nearly so are trained with seeds that took
no part in choosing any of them. A training that is in OUTPUT.json is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from shared.records import read
from without_labels.label_free import COLLECTIONS, options, train_all

SETTINGS = {
    "cifar": ["mild", "weight 1", "temperature 5", "lr 0.03"],
    "turntable": ["mild", "temperature 0.05", "all gray", "colour alone"],
    "turntable, imbalance 5, seed 1": ["mild", "weight 1", "temperature 0.05", "all gray", "colour alone"],
}
SEEDS = {"cifar": range(3, 9)}
"""The other collections have seeds 3 to 6."""


def main() -> None:
    arguments = options(__doc__, "choice", list(SETTINGS)).parse_args()
    torch.set_num_threads(1)
    record = Path(arguments.output).with_suffix(".json")
    record.parent.mkdir(parents=True, exist_ok=True)
    for collection in arguments.collections:
        for seed in SEEDS.get(collection, range(3, 7)):
            values = {**vars(arguments), "collections": [collection], "repeat": seed}
            train_all(argparse.Namespace(**values), record, SETTINGS[collection])
    text = table(read(record, "runs"))
    record.with_suffix(".md").write_text(text)
    print(text)


def table(runs: dict[str, Any]) -> str:
    """Mean and standard deviation of accuracy, and the mean score, of every setting."""
    lines = [f"{'; '.join(dict.fromkeys(run['machine'] for run in runs.values()))}; mean (standard deviation), %.", ""]
    lines += ["| collection | setting | trainings | kNN | linear | combined |", "|---|---|---|---|---|---|"]
    for collection in COLLECTIONS:
        for setting in SETTINGS.get(collection, []):
            trainings = [run for run in runs.values() if (run["collection"], run["name"]) == (collection, setting)]
            if len(trainings) < 2:
                continue
            accuracies = [
                f"{mean(values):.1f} ({stdev(values):.1f})"
                for values in ([run["knn"] for run in trainings], [run["linear"] for run in trainings])
            ]
            score = mean(run["scores"]["combined"] for run in trainings)
            lines.append(f"| {collection} | {setting} | {len(trainings)} | {' | '.join(accuracies)} | {score:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
