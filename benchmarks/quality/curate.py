r"""The value of `crosslevel curate`: labels for a classifier, and a tenth of a collection to train on.

    python benchmarks/quality/curate.py cifar10-jpeg/train@imbalance=100 cifar10-jpeg/test \
        -o benchmarks/results/curate_cifar
    python benchmarks/quality/curate.py clothing/train clothing/test -o benchmarks/results/curate_clothing \
        -- --views.size=64

**Labels.** A linear classifier on the features of n images that `curate` chose, and on those of n random ones. The
features are those of --encoder, a run, or else of the first training below, which saw all images. Near-duplicates and
outliers take no part, as in the command; random ones are drawn from all images. "Of each class" is what the labels
themselves would choose: as many images of each class, the most that a balanced choice can be worth.

**A tenth.** For each seed three trainings that see --seen images in as many steps: on all images, on the tenth that
`curate` chose by the features of the first, and on a random tenth; then a linear classifier on each one's features of
all training images and their labels. Options after -- go to `crosslevel train` for all of them.

Labels are read only to judge. Figures are balanced accuracies of the test images in percent: the mean over seeds and
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
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

import crosslevel
from crosslevel.curation.choose import Strategy, choose
from crosslevel.curation.curate import curate
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse
from crosslevel.features.embed import Embedded
from crosslevel.features.table import open_table

sys.path.append(str(Path(__file__).parents[1]))

from quality.paper import trained
from shared import records
from shared.beside import machine

Subset = Literal["all", "random", "balanced"]
Rule = Strategy | Literal["of each class"]
HOWS: tuple[Rule, ...] = ("random", "balanced", "typical", "diverse", "covering", "of each class")
"""The last one is a bound and no rule: as many random images of each class, by the labels."""
TENTH: tuple[Subset, ...] = ("all", "random", "balanced")
C = 10.0  # of the logistic regression, on features of length 1 that are standardized: the same for all
USUAL = ("--encoder.width=0.25", "--batch_size=128", "--views.flip=0.5", "--monitor_every=0", "--report_html=false")


class Features(NamedTuple):
    """Features of length 1 and labels of training images, with the rows that `curate` leaves; the same of test images.

    ``queries`` and ``truth`` are the features and labels of the test images.
    """

    features: torch.Tensor
    labels: torch.Tensor
    remaining: torch.Tensor
    queries: torch.Tensor
    truth: torch.Tensor


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--encoder", help="of the labels' part: a run or weights by name")
    parser.add_argument("--n", type=int, nargs="*", default=[100, 300])
    parser.add_argument("--seeds", type=int, default=5, help="of the labels' part")
    parser.add_argument("--trainings", type=int, default=5, help="seeds of the tenth's part")
    parser.add_argument("--seen", type=int, default=40_000, help="images that a training sees")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/curate"))
    words = sys.argv[1:]
    separator = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:separator])
    arguments.line = [*USUAL, *words[separator + 1 :]]
    Study(arguments).go()


class Study:
    """All figures of one collection: those of the record are read, and the missing ones are computed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.record = arguments, arguments.output.with_suffix(".json")
        self.runs_dir = arguments.runs / arguments.output.name
        self.images = len(open_images(arguments.train))
        self.about = shlex.join([arguments.train, f"{self.images} images", f"{arguments.seen} seen", *arguments.line])
        self._features: dict[str, Features] = {}

    def go(self) -> None:
        labels = itertools.product(self.arguments.n, HOWS, range(self.arguments.seeds))
        tenths = itertools.product(range(self.arguments.trainings), TENTH)
        for n, rule, seed in labels:
            name = f"{n} labels, {rule}, {seed}"
            if name not in self.done():
                features = self.features_of(self.arguments.encoder or str(self.run("all", 0)))
                self.add(name, **labelled(features, n, rule, seed))
        for seed, subset in tenths:
            name = f"trained on {subset}, {seed}"
            if name not in self.done():
                features = self.features_of(str(self.run(subset, seed)))
                self.add(name, accuracy=judged(features.features, features.labels, features.queries, features.truth))
        self.write()
        print(self.arguments.output.with_suffix(".md").read_text())

    def done(self) -> dict[str, dict[str, float]]:
        return records.read(self.record, self.about)

    def add(self, name: str, **figures: float) -> None:
        records.add(self.record, self.about, name, figures, {})
        print(f"{name}: {figures}", flush=True)
        self.write()

    def run(self, subset: Subset, seed: int) -> Path:
        """The run on all images or on a tenth of them, trained where it is not there yet."""
        source, count = self.arguments.train, self.images
        if subset != "all":
            count = self.images // 10
            file = self.runs_dir / f"{subset}-{seed}.txt"
            if not file.is_file():
                self.choose(subset, seed, count, file)
            source = parse(source).with_list(str(file)).text
        line = [*self.arguments.line, f"--epochs={self.arguments.seen / count:.3f}", f"--seed={seed}"]
        trained(source, line, self.runs_dir / f"{subset}-{seed}")
        return self.runs_dir / f"{subset}-{seed}"

    def choose(self, subset: Strategy, seed: int, count: int, file: Path) -> None:
        """Write the list of a tenth: by the features of the run on all images, or by chance."""
        table = self.table(str(self.run("all", seed)))
        if subset != "random":
            curate(str(table), n=count, how=subset, seed=seed, output=str(file), quiet=True)
            return
        paths = open_table(table).paths
        rows = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:count]
        file.write_text("".join(f"{paths[row]}\t-1\n" for row in rows.tolist()))

    def table(self, encoder: str) -> Path:
        """The features of the training images; a complete table of this encoder is reused."""
        file = self.runs_dir / f"{Path(encoder).name.replace(':', '-')}.parquet"
        weights = Path(encoder) / "encoder.safetensors"
        if not file.is_file() or (weights.is_file() and weights.stat().st_mtime > file.stat().st_mtime):
            crosslevel.embed(encoder, self.arguments.train, output=file, quiet=True)
        return file

    def features_of(self, encoder: str) -> Features:
        if encoder not in self._features:
            table = open_table(self.table(encoder))
            left = set(curate(str(table.file), quiet=True).paths)
            remaining = torch.tensor([row for row, path in enumerate(table.paths) if path in left])
            test = crosslevel.embed(encoder, self.arguments.test, quiet=True)
            assert isinstance(test, Embedded)  # without an output
            if table.labels is None or test.labels is None or test.classes is None:
                sys.exit("TRAIN and TEST: both need labels")
            labels, classes = table.labels
            truth = torch.tensor([classes.index(test.classes[label]) for label in test.labels.tolist()])
            unit, queries = (F.normalize(x, dim=1) for x in (table.features, torch.from_numpy(test.features)))
            self._features = {encoder: Features(unit, labels, remaining, queries, truth)}
        return self._features[encoder]

    def write(self) -> None:
        done, train = self.done(), Path(self.arguments.train)
        lines = [f"{machine()}; {train.parent.name}/{train.name}, {self.images:,} images"]
        if any(" labels, " in name for name in done):
            lines += ["", "| labels | chosen | seeds | balanced accuracy | against random | classes found |"]
            lines += ["|---|---|---|---|---|---|"]
        for n, rule in itertools.product(self.arguments.n, HOWS):
            cells = of_seeds(done, f"{n} labels, {rule}", self.arguments.seeds)
            if cells:
                classes = statistics.mean(cell["classes"] for cell in cells.values())
                difference = against(cells, of_seeds(done, f"{n} labels, random", self.arguments.seeds), rule)
                lines.append(f"| {n} | {rule} | {len(cells)} | {accuracy(cells)} | {difference} | {classes:.1f} |")
        lines += ["", "| trained on | images | seeds | balanced accuracy | against random |", "|---|---|---|---|---|"]
        for subset in TENTH:
            cells = of_seeds(done, f"trained on {subset}", self.arguments.trainings)
            if cells:
                difference = against(cells, of_seeds(done, "trained on random", self.arguments.trainings), subset)
                name, count = ("all", self.images) if subset == "all" else (f"a tenth, {subset}", self.images // 10)
                lines.append(f"| {name} | {count:,} | {len(cells)} | {accuracy(cells)} | {difference} |")
        self.arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def labelled(data: Features, n: int, rule: Rule, seed: int) -> dict[str, float]:
    """A classifier on n labels: its accuracy, and how many classes these are of."""
    if rule == "of each class":
        rows = in_turns(data.labels, n, seed)
    else:
        among = torch.arange(len(data.features)) if rule == "random" else data.remaining
        rows = among[choose(data.features[among], n, rule, seed)]
    right = judged(data.features[rows], data.labels[rows], data.queries, data.truth)
    return {"accuracy": right, "classes": len(data.labels[rows].unique())}


def in_turns(labels: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """``n`` random images, one of each class in turn while it has any."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == c].tolist() for c in labels.unique().tolist()]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*classes))
    return torch.tensor([row for row in turns if row is not None][:n])


def judged(features: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean of the classes' accuracies, in percent; a class that nobody labelled is never right."""
    if len(labels.unique()) < 2:
        return 100 * float(1 / len(truth.unique()))
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=C / len(labels), max_iter=500).fit(((features - mean) / deviation).numpy(), labels)
    right = torch.from_numpy(fitted.predict(((queries - mean) / deviation).numpy())) == truth
    return 100 * statistics.mean(float(right[truth == c].double().mean()) for c in truth.unique())


def of_seeds(done: dict[str, dict[str, float]], name: str, seeds: int) -> dict[int, dict[str, float]]:
    return {seed: done[f"{name}, {seed}"] for seed in range(seeds) if f"{name}, {seed}" in done}


def accuracy(cells: dict[int, dict[str, float]]) -> str:
    return interval([cell["accuracy"] for cell in cells.values()])


def against(cells: dict[int, dict[str, float]], random: dict[int, dict[str, float]], rule: str) -> str:
    """The mean of the seeds' differences from the random choice."""
    seeds = [seed for seed in cells if seed in random]
    if rule == "random" or not seeds:
        return "-"
    return interval([cells[seed]["accuracy"] - random[seed]["accuracy"] for seed in seeds])


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
