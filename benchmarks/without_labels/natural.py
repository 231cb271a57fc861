"""What `crosslevel inspect` estimates without labels, beside the truth of collections that are made for it.

python benchmarks/without_labels/natural.py FOLDER [-o FILE]   # FOLDER: CIFAR-10's training images, a folder a class
python benchmarks/without_labels/natural.py --good [-o FILE]   # turntables seen by good features, and constructed ones

The estimates see pixels alone: `Unlabelled` has no labels and no tracks to read. Each collection that is trained on is
written to the ignored runs/ folder as nameless files and trained on, as a user would; all of these have 1,800 images,
so that no estimate can rank their sizes. A run that is there is not repeated. With ``--good`` the encoder is one that a
supervised training on other objects made, in place of pretrained weights: it shows the estimate on features that
separate the classes. The estimate reads no label there either.

Methods were tried on development collections of other seeds (5 turntables, 5 long-tailed CIFAR-10, each with its own
run; the first 7 or 8 of them in the first two rounds), with this Spearman correlation of estimated and true imbalance:
k-means of 10 and 50 groups (Gini -0.47, 0.05); Ward, average and complete linkage cut at 5, 12 and 30 (-0.52 to 0.45);
Louvain communities of neighbour graphs (-0.56 to 0.05); HDBSCAN (-0.65 to 0.14; its share of noise 0.83); Dirichlet
process mixtures on 8 to 48 components, by largest share, Gini index or effective number (-0.40 to 0.70; at most 0.47 on
all 10, as many tracks drawn of each); spread, skewness and intrinsic dimension of local density (-0.43 to 0.54);
effective rank and leading eigenvalues (-0.47 to -0.04); kurtosis of whitened components (0.85 on 7, 0.73 on 8). Some of
these 90 or so figures are high by chance, and none stayed high. k-means started at the classes' true means did not rank
them either (0.13), nor did a mixture started at the truth (0.46).

Correlations on 12 other turntables (seeds 500 to 511), by the encoder of ``--good`` and the Gini index: Dirichlet
process mixtures of spherical and diagonal components 0.77 to 0.94; Gaussian mixtures by BIC 0.77 to 0.83; k-means, Ward
and average linkage with the best silhouette -0.06 to 0.29; HDBSCAN with regions of at least 3 to 8 tracks 0.92 to 0.99,
with 5 and outliers assigned to the nearest region 0.99.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from sklearn.cluster import KMeans

from crosslevel import load_encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.scan import scan
from crosslevel.data.duplicates.sets import duplicate_sets
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.features.extract import Runtime
from crosslevel.inspection.scan import run_features, structure
from crosslevel.inspection.summary import summary
from crosslevel.metrics import long_tail
from crosslevel.models.encoder import Encoder, View
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine
from without_labels.natural_collections import Collection, collections, of_turntable, trained

BATCH = 256

GOOD = [
    (300, 1, 1, 12), (60, 10, 2, 12), (150, 4, 5, 12), (200, 3, 10, 12), (300, 2, 20, 12), (240, 3, 50, 12),
    (400, 2, 100, 12), (120, 6, 20, 8), (260, 2, 3, 10), (220, 2, 35, 10),
]  # fmt: skip
"""Objects, frames, imbalance, classes; nothing was chosen on these."""
CONSTRUCTED = [(1, 10), (2, 12), (4, 6), (8, 8), (16, 10), (32, 12), (64, 6), (128, 8)]
"""Imbalance, classes."""


class Unlabelled(InMemoryImages):
    """Pixels and nothing else: asking for labels, classes or tracks fails."""

    def __init__(self, data: torch.Tensor, name: str) -> None:
        self.data, self.paths, self.name = data, [f"{i}.png" for i in range(len(data))], name

    def __getattribute__(self, name: str) -> object:
        if name in ("labels", "classes", "tracks"):
            raise AssertionError(f"an estimate asked for {name}")
        return super().__getattribute__(name)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.data[i], -1


class Row(NamedTuple):
    name: str
    true_imbalance: float
    imbalance: float
    true_gini: float
    gini: float
    true_share: float
    share: float
    separation: float
    accuracy: float | None
    bound: float


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--good", action="store_true", help="by the features of an encoder trained with labels")
    parser.add_argument("--runs", default="runs/natural", help="where collections and their runs go")
    parser.add_argument("-o", "--output")
    arguments = parser.parse_args()
    if arguments.good:
        text = [machine(), "", *good(Path(arguments.runs)), "", "Constructed features, classes ever further apart:", ""]
        output = Path(arguments.output or "benchmarks/results/natural_good.md")
        output.write_text("\n".join([*text, *constructed()]) + "\n", encoding="utf-8")
        return
    if not arguments.folder:
        parser.error("give the folder of CIFAR-10's training images, or --good")
    arguments.output = arguments.output or "benchmarks/results/natural.md"
    text = [machine(), f"batch {BATCH}; collections of seeds that nothing was chosen on"]
    sections: dict[str, Iterator[tuple[Collection, Path | None]]] = {
        "By the features of a run on each collection": trained(arguments.folder, Path(arguments.runs)),
        "Without a run": ((collection, None) for collection in collections(arguments.folder)),
    }
    for heading, pairs in sections.items():
        rows = []
        for collection, run in pairs:
            rows.append(measured(collection, run))
            print(rows[-1], flush=True)
        text += ["", f"## {heading}", "", *tabled(rows)]
        Path(arguments.output).write_text("\n".join(text) + "\n", encoding="utf-8")


def good(runs_dir: Path) -> list[str]:
    """The table of `GOOD`, by an encoder that has learnt the classes from other objects."""
    run = supervised(runs_dir / "supervised")
    rows = []
    for seed, (objects, frames, imbalance, classes) in enumerate(GOOD, 700):
        turntable = Turntable(classes=classes, objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        name = f"turntable, {classes} classes, {objects} x {frames}, {imbalance}"
        rows.append(measured(of_turntable(name, turntable), run))
        print(rows[-1], flush=True)
    return tabled(rows)


def supervised(run: Path, steps: int = 1600, batch: int = 128) -> Path:
    """An encoder trained with labels, on 4,800 objects that no collection has; as good as its kNN says."""
    if (run / "encoder.safetensors").is_file():
        return run
    torch.manual_seed(0)
    images = Turntable(classes=12, objects=4800, frames=4, imbalance=1, seed=9000)
    assert images.labels is not None
    encoder, views = Encoder("resnet18", small_images=False, width=0.25), Views("cifar", 32)
    views.count, encoder.view = 1, View(32, views.mean, views.std)
    network = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, 12)).train()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    rate, generator = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps),
        torch.Generator().manual_seed(0),
    )
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        [view] = views(images.batch(index), generator)
        scores = network(view.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, images.labels[index]).backward()
        optimizer.step()
        rate.step()
    run.mkdir(parents=True, exist_ok=True)
    encoder.eval().save(run / "encoder.safetensors")
    return run


def measured(collection: Collection, run: Path | None) -> Row:
    """What is estimated of a collection without its labels and tracks, beside the truth."""
    name, data, labels, tracks = collection
    source: Images = Unlabelled(data, name)
    bad_files, features, threshold, accuracy = BadFiles(), None, 1.0, None
    scanned = scan(source, bad_files, 0)
    if run is not None:
        features, threshold = run_features(load_encoder(run), source, scanned, Runtime(choose(), 0), None, bad_files, 0)
        accuracy = neighbours(features, labels, tracks)
    groups = structure(scanned, features, threshold)
    sets = duplicate_sets(scanned, groups.pairs, source.paths)
    report = summary(
        name, len(source), source, scanned, groups, sets, bad_files, BATCH, None if run is None else str(run)
    )
    tail, sizes = report["long_tail"]["by_track"], torch.bincount(labels)
    return Row(
        name, long_tail.imbalance_factor(sizes), tail["imbalance"], long_tail.gini(sizes), tail["gini"],
        long_tail.duplicate_share(tracks.unique(return_counts=True)[1], BATCH), report["batch"]["duplicate_share"],
        report["long_tail"]["separation"], accuracy, bound(groups.features, labels, tracks),
    )  # fmt: skip


def neighbours(features: torch.Tensor, labels: torch.Tensor, tracks: torch.Tensor) -> float:
    """Accuracy in percent by 5 neighbours from other tracks, the mean over classes; only for the table."""
    unit = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    cosine = (unit @ unit.T).masked_fill_(tracks[:, None] == tracks, -2)
    one_hot = torch.nn.functional.one_hot(labels)
    right = one_hot[cosine.topk(5).indices].sum(1).argmax(1) == labels
    return 100 * float(torch.stack([right[labels == c].double().mean() for c in labels.unique()]).mean())


def bound(features: torch.Tensor, labels: torch.Tensor, tracks: torch.Tensor) -> float:
    """The Gini index of k-means that starts at the true classes' means: no estimate, it reads labels and tracks."""
    owner = tracks.unique(return_inverse=True)[1]
    total = int(owner.max()) + 1
    label = torch.empty(total, dtype=torch.long).scatter_(0, owner, labels)
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    means = torch.zeros(total, unit.shape[1]).index_add_(0, owner, unit)
    unit = torch.nn.functional.normalize(means / torch.bincount(owner)[:, None] - unit.mean(0), dim=1)
    starts = torch.stack([unit[label == c].mean(0) for c in label.unique()])
    groups = KMeans(len(starts), init=starts.numpy(), n_init=1).fit_predict(unit.numpy())
    return long_tail.gini(torch.bincount(torch.from_numpy(groups)))


def constructed() -> list[str]:
    """How the estimate ranks collections of 1,000 points in Gaussian classes, by the distance of the classes."""
    lines = [
        "| distance of a class from the centre | kNN, % | separation | Spearman, imbalance | Spearman, Gini |",
        "|---|---|---|---|---|",
    ]
    for apart in (2.0, 3.0, 4.0, 4.5, 5.0, 7.0):
        rows = [ranked(apart, imbalance, classes, seed) for seed, (imbalance, classes) in enumerate(CONSTRUCTED, 1000)]
        true, ratio, gini, separation, accuracy = (list(column) for column in zip(*rows, strict=True))
        ranks = " | ".join(f"{spearmanr(true, by).statistic:.2f}" for by in (ratio, gini))
        lines.append(
            f"| {apart} | {sum(accuracy) / len(rows):.0f} | {min(separation):.2f} to {max(separation):.2f} | {ranks} |"
        )
    return lines


def ranked(distance: float, imbalance: int, classes: int, seed: int) -> tuple[float, float, float, float, float]:
    """True and estimated imbalance, estimated Gini index, separation, accuracy in percent."""
    generator = torch.Generator().manual_seed(seed)
    weights = imbalance ** (-torch.arange(classes).double() / (classes - 1))
    sizes = (weights / weights.sum() * 1000).round().long().clamp(min=2)
    labels, tracks = torch.arange(classes).repeat_interleave(sizes), torch.arange(int(sizes.sum()))
    centres = torch.nn.functional.normalize(torch.randn(classes, 16, generator=generator), dim=1) * distance
    spread = torch.cat([torch.linspace(0.5, 1.5, 16), torch.full((48,), 0.3)])
    features = torch.randn(len(labels), 64, generator=generator) * spread
    features[:, :16] += centres[labels]
    grouping = long_tail.grouped(features, tracks)
    estimated = torch.bincount(grouping.groups)
    return (
        long_tail.imbalance_factor(sizes), long_tail.exponential_imbalance(estimated), long_tail.gini(estimated),
        grouping.separation, neighbours(features, labels, tracks),
    )  # fmt: skip


def tabled(rows: list[Row]) -> list[str]:
    lines = [
        "| collection | imbalance | estimated | Gini | estimated | separation | kNN, % "
        "| Gini by k-means from the true means | duplicates a batch, % | estimated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.0f}"
        lines.append(
            f"| {row.name} | {row.true_imbalance:.1f} | {row.imbalance:.1f} | {row.true_gini:.2f} | {row.gini:.2f} "
            f"| {row.separation:.2f} | {accuracy} | {row.bound:.2f} "
            f"| {100 * row.true_share:.1f} | {100 * row.share:.1f} |"
        )
    lines += [
        "",
        "Spearman correlation of estimate and truth, of all, turntable and CIFAR-10 (-: the truth is constant):",
        "",
    ]
    families = [rows, *([row for row in rows if row.name.startswith(name)] for name in ("turntable", "CIFAR-10"))]
    for title, of, by in (
        ("imbalance by its estimate", "imbalance", "imbalance"),
        ("imbalance by the groups' Gini index", "imbalance", "gini"),
        ("imbalance by the Gini index of k-means from the true means", "imbalance", "bound"),
        ("duplicate share", "share", "share"),
    ):
        correlations = [
            spearmanr([getattr(r, f"true_{of}") for r in f], [getattr(r, by) for r in f]).statistic for f in families
        ]
        lines.append(f"- {title}: {', '.join('-' if rho != rho else f'{rho:.2f}' for rho in correlations)}")
    return lines


if __name__ == "__main__":
    main()
