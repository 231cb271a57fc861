r"""What `crosslevel curate` is worth: labels for a classifier, and a tenth of a collection to train on.

    python benchmarks/quality/curate.py cifar10-jpeg/train@imbalance=100 cifar10-jpeg/test \
        -o benchmarks/results/curate_cifar
    python benchmarks/quality/curate.py clothing/train clothing/test -o benchmarks/results/curate_clothing \
        -- --views.size=64

**Labels.** A linear classifier on the features of n images that `curate` chose, and on those of n random ones. The
features are those of --encoder, a run, or else of the first training below, which saw all images. Near-duplicates and
outliers take no part, as in the command; random ones are drawn from all images.

**A tenth.** For each seed three trainings that see --seen images in as many steps: on all images, on the tenth that
`curate` chose by the features of the first, and on a random tenth; then a linear classifier on each one's features of
all training images and their labels. What follows -- are options of `crosslevel train` for all of them.

Labels are read to judge alone. Figures are balanced accuracies of the test images in percent: the mean over seeds and
half of its 95 % interval (t distribution); "against random" is the mean of the seeds' differences, with its own
interval. OUTPUT.json has every figure: called again, the program goes on where it was, in a training too, whose folders
are in --runs; OUTPUT.md is the table.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

import crosslevel
from crosslevel.curation.choose import choose
from crosslevel.curation.curate import curate
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse
from crosslevel.features.table import open_table

sys.path.append(str(Path(__file__).parents[1]))

from quality.paper import trained
from shared import records
from shared.beside import machine

HOWS = ("random", "balanced", "typical", "diverse", "covering")
TENTH = ("all", "random", "balanced")
C = 10.0  # of the logistic regression, on features of length 1 that are standardized: the same for all
USUAL = ("--encoder.width=0.25", "--batch_size=128", "--views.flip=0.5", "--monitor_every=0", "--report_html=false")


class Features(NamedTuple):
    """Of training images features of length 1, labels, and the rows that `curate` leaves; and of test images."""

    features: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor
    asked: torch.Tensor
    truth: torch.Tensor


def main() -> None:
    given = records.options(__doc__)
    given.add_argument("train")
    given.add_argument("test")
    given.add_argument("--encoder", help="of the labels' part: a run or weights by name")
    given.add_argument("--n", type=int, nargs="*", default=[100, 300])
    given.add_argument("--seeds", type=int, default=5, help="of the labels' part")
    given.add_argument("--trainings", type=int, default=5, help="seeds of the tenth's part")
    given.add_argument("--seen", type=int, default=40_000, help="images that a training sees")
    given.add_argument("--runs", type=Path, default=Path("runs"))
    given.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/curate"))
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    arguments = given.parse_args(words[:place])
    arguments.line = [*USUAL, *words[place + 1 :]]
    Study(arguments).go()


class Study:
    """All figures of one collection, those that were there before and those that are missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self.record = arguments, arguments.output.with_suffix(".json")
        self.home = arguments.runs / arguments.output.name
        self.images = len(open_images(arguments.train))
        self.about = shlex.join([arguments.train, f"{self.images} images", f"{arguments.seen} seen", *arguments.line])
        self._known: dict[str, Features] = {}

    def go(self) -> None:
        labels = itertools.product(self.given.n, HOWS, range(self.given.seeds))
        tenths = itertools.product(range(self.given.trainings), TENTH)
        for n, how, seed in labels:
            name = f"{n} labels, {how}, {seed}"
            if name not in self.done():
                found = self.known(self.given.encoder or str(self.run("all", 0)))
                self.add(name, **labelled(found, n, how, seed))
        for seed, what in tenths:
            name = f"trained on {what}, {seed}"
            if name not in self.done():
                found = self.known(str(self.run(what, seed)))
                self.add(name, accuracy=judged(found.features, found.labels, found.asked, found.truth))
        self.write()
        print(self.given.output.with_suffix(".md").read_text())

    def done(self) -> dict[str, dict[str, float]]:
        return records.read(self.record, self.about)

    def add(self, name: str, **figures: float) -> None:
        records.add(self.record, self.about, name, figures, {})
        print(f"{name}: {figures}", flush=True)
        self.write()

    def run(self, what: str, seed: int) -> Path:
        """The run on all images or on a tenth of them, trained where it is not there yet."""
        source, count = self.given.train, self.images
        if what != "all":
            count = self.images // 10
            file = self.home / f"{what}-{seed}.txt"
            if not file.is_file():
                self.choose(what, seed, count, file)
            source = parse(source).with_list(str(file)).text
        line = [*self.given.line, f"--epochs={self.given.seen / count:.3f}", f"--seed={seed}"]
        trained(source, line, self.home / f"{what}-{seed}")
        return self.home / f"{what}-{seed}"

    def choose(self, what: str, seed: int, count: int, file: Path) -> None:
        """Write the list of a tenth: by the features of the run on all images, or by chance."""
        table = self.table(str(self.run("all", seed)))
        if what != "random":
            curate(str(table), n=count, how=what, seed=seed, output=str(file), quiet=True)
            return
        paths = open_table(table).paths
        rows = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:count]
        file.write_text("".join(f"{paths[row]}\t-1\n" for row in rows.tolist()))

    def table(self, encoder: str) -> Path:
        """The features of the training images; a table that is whole and of this encoder is not made again."""
        file = self.home / f"{Path(encoder).name.replace(':', '-')}.parquet"
        weights = Path(encoder) / "encoder.safetensors"
        if not file.is_file() or (weights.is_file() and weights.stat().st_mtime > file.stat().st_mtime):
            crosslevel.embed(encoder, self.given.train, output=file, quiet=True)
        return file

    def known(self, encoder: str) -> Features:
        if encoder not in self._known:
            table = open_table(self.table(encoder))
            left = set(curate(str(table.file), quiet=True).paths)
            kept = torch.tensor([row for row, path in enumerate(table.paths) if path in left])
            labels, classes = table.labels
            test = crosslevel.embed(encoder, self.given.test, quiet=True)
            truth = torch.tensor([classes.index(test.classes[label]) for label in test.labels.tolist()])
            unit, asked = (F.normalize(x, dim=1) for x in (table.features, torch.from_numpy(test.features)))
            self._known = {encoder: Features(unit, labels, kept, asked, truth)}
        return self._known[encoder]

    def write(self) -> None:
        done = self.done()
        lines = [
            f"{machine()}; {Path(self.given.train).parent.name}/{Path(self.given.train).name}, {self.images:,} images",
            "",
            "| labels | chosen | seeds | balanced accuracy | against random | classes found |",
            "|---|---|---|---|---|---|",
        ]
        for n, how in itertools.product(self.given.n, HOWS):
            cells = of_seeds(done, f"{n} labels, {how}", self.given.seeds)
            if cells:
                classes = statistics.mean(cell["classes"] for cell in cells.values())
                beside = against(cells, of_seeds(done, f"{n} labels, random", self.given.seeds), how)
                lines.append(f"| {n} | {how} | {len(cells)} | {accuracy(cells)} | {beside} | {classes:.1f} |")
        lines += ["", "| trained on | images | seeds | balanced accuracy | against random |", "|---|---|---|---|---|"]
        for what in TENTH:
            cells = of_seeds(done, f"trained on {what}", self.given.trainings)
            if cells:
                beside = against(cells, of_seeds(done, "trained on random", self.given.trainings), what)
                name, count = ("all", self.images) if what == "all" else (f"a tenth, {what}", self.images // 10)
                lines.append(f"| {name} | {count:,} | {len(cells)} | {accuracy(cells)} | {beside} |")
        self.given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def labelled(found: Features, n: int, how: str, seed: int) -> dict[str, float]:
    """A classifier on n labels: its accuracy, and how many classes these are of."""
    among = torch.arange(len(found.features)) if how == "random" else found.kept
    rows = among[choose(found.features[among], n, how, seed)]
    right = judged(found.features[rows], found.labels[rows], found.asked, found.truth)
    return {"accuracy": right, "classes": len(found.labels[rows].unique())}


def judged(features: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean of the classes' accuracies, in percent; a class that nobody labelled is never right."""
    if len(labels.unique()) < 2:
        return 100 * float(1 / len(truth.unique()))
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=C / len(labels), max_iter=500).fit(((features - mean) / deviation).numpy(), labels)
    right = torch.from_numpy(fitted.predict(((asked - mean) / deviation).numpy())) == truth
    return 100 * statistics.mean(float(right[truth == c].double().mean()) for c in truth.unique())


def of_seeds(done: dict[str, dict[str, float]], name: str, seeds: int) -> dict[int, dict[str, float]]:
    return {seed: done[f"{name}, {seed}"] for seed in range(seeds) if f"{name}, {seed}" in done}


def accuracy(cells: dict[int, dict[str, float]]) -> str:
    return shown([cell["accuracy"] for cell in cells.values()])


def against(cells: dict[int, dict[str, float]], random: dict[int, dict[str, float]], how: str) -> str:
    """The mean of the seeds' differences from the random choice."""
    both = [seed for seed in cells if seed in random]
    if how == "random" or not both:
        return "-"
    return shown([cells[seed]["accuracy"] - random[seed]["accuracy"] for seed in both])


def shown(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
