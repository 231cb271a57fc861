"""Which images to label: a linear classifier on n images that `crosslevel curate` chooses, and on n random ones.

    python benchmarks/quality/curate.py ENCODER cifar10-jpeg/train@imbalance=100 cifar10-jpeg/test --n 100,300 -o out.md
    python benchmarks/quality/curate.py ENCODER clothing/train clothing/test --n 100,300 -o out.md

ENCODER is the folder of a run, or its encoder.safetensors. The labels are read of the chosen images alone, and of the
test images. Balanced accuracy in percent, the mean of five seeds and half of its 95 % interval (t distribution);
"against random" is the mean of the seeds' differences, with its own interval. Near-duplicates and outliers take no
part, as in the command; random ones are drawn from all images.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

import crosslevel
from crosslevel.curation.choose import choose
from crosslevel.curation.curate import curate
from crosslevel.features.table import open_table

sys.path.append(str(Path(__file__).parents[1]))

from shared.records import options

HOWS = ("random", "balanced", "diverse", "covering")
C = 10.0  # of the logistic regression, on features of length 1 that are standardized: the same for all


def main() -> None:
    given = options(__doc__)
    given.add_argument("encoder")
    given.add_argument("images")
    given.add_argument("test")
    given.add_argument("--n", default="100,300")
    given.add_argument("--seeds", type=int, default=5)
    given.add_argument("-o", "--output", default="")
    arguments = given.parse_args()
    kept, features, labels, classes = candidates(arguments.encoder, arguments.images)
    test = crosslevel.embed(arguments.encoder, arguments.test, quiet=True)
    asked = F.normalize(torch.from_numpy(test.features), dim=1)
    truth = torch.tensor([classes.index(test.classes[label]) for label in test.labels.tolist()])
    lines = [
        f"{arguments.images}, {len(features):,} images, {len(kept):,} left to choose among; {len(truth):,} test images",
        "",
        "| n | chosen | balanced accuracy | against random | classes found |",
        "|---|---|---|---|---|",
    ]
    for n in map(int, arguments.n.split(",")):
        figures = {}
        for how in HOWS:
            among = torch.arange(len(features)) if how == "random" else kept
            rows = [among[choose(features[among], n, how, seed)] for seed in range(arguments.seeds)]
            figures[how] = [judged(features[own], labels[own], asked, truth) for own in rows]
            found = statistics.mean(len(labels[own].unique()) for own in rows)
            gains = [a - b for a, b in zip(figures[how], figures["random"], strict=True)]
            beside = "-" if how == "random" else shown(gains)
            lines.append(f"| {n} | {how} | {shown(figures[how])} | {beside} | {found:.1f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")


def candidates(encoder: str, images: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """The rows that the command would choose among, and all features, labels and names of classes."""
    with tempfile.TemporaryDirectory() as folder:
        file = crosslevel.embed(encoder, images, output=Path(folder) / "f.parquet", quiet=True)
        left, table = set(curate(str(file), quiet=True).paths), open_table(file)
        kept = torch.tensor([row for row, path in enumerate(table.paths) if path in left])
        return kept, F.normalize(table.features, dim=1), *table.labels


def judged(features: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean of the classes' accuracies, in percent; a class that nobody labelled is never right."""
    if len(labels.unique()) < 2:
        return 100 * float(1 / len(truth.unique()))
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=C / len(labels), max_iter=500).fit(((features - mean) / deviation).numpy(), labels)
    right = torch.from_numpy(fitted.predict(((asked - mean) / deviation).numpy())) == truth
    return 100 * statistics.mean(float(right[truth == c].double().mean()) for c in truth.unique())


def shown(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
