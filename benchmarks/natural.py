"""What `crosslevel inspect` estimates without labels, beside the truth of collections that are made for it.

python benchmarks/natural.py FOLDER [-o FILE]   # FOLDER: CIFAR-10's training images, a folder a class
python benchmarks/natural.py --good [-o FILE]   # turntables seen by good features, and constructed features

The estimates see pixels alone: `Unlabelled` has no labels and no tracks to read. Each collection of `TRAINED` is
written to the ignored runs/ folder as nameless files and trained on, as a user would; all of these have 1,800 images,
so that no estimate can rank their sizes. A run that is there is not repeated. With ``--good`` the encoder is one that a
supervised training on other objects made, in place of pretrained weights: what the estimate does with features in which
classes lie apart. The estimate reads no label there either.

What was tried on development collections of other seeds (5 turntables, 5 long-tailed CIFAR-10, each with its own run;
the first 7 or 8 of them in the first two rounds), Spearman of estimated and true imbalance: k-means of 10 and 50 groups
(Gini -0.47, 0.05); Ward, average and complete linkage cut at 5, 12 and 30 (-0.52 to 0.45); Louvain communities of
neighbour graphs (-0.56 to 0.05); HDBSCAN (-0.65 to 0.14; its share of noise 0.83); Dirichlet process mixtures on 8 to
48 components, by largest share, Gini index or effective number (-0.40 to 0.70; at most 0.47 on all 10, as many tracks
drawn of each); spread, skewness and intrinsic dimension of local density (-0.43 to 0.54); effective rank and leading
eigenvalues (-0.47 to -0.04); kurtosis of whitened components (0.85 on 7, 0.73 on 8). Of some 90 figures some are high
by chance, and none stayed high. k-means started at the classes' true means did not rank them either (0.13), nor did a
mixture started at the truth (0.46).

On 12 other turntables (seeds 500 to 511) seen by the encoder of ``--good``, by Gini index: Dirichlet process mixtures
of spherical and diagonal components 0.77 to 0.94; Gaussian mixtures by BIC 0.77 to 0.83; k-means, Ward and average
linkage with the best silhouette -0.06 to 0.29; HDBSCAN with regions of at least 3 to 8 tracks 0.92 to 0.99, with 5 and
what lies outside given to the nearest 0.99.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import records
import torch
from beside import machine
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from torchvision.io import write_png

from crosslevel import load_encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import long_tailed, take
from crosslevel.features.extract import Runtime
from crosslevel.inspection.scan import find, known_features, look
from crosslevel.inspection.summary import summary
from crosslevel.metrics import long_tail
from crosslevel.models.encoder import Encoder, View
from crosslevel.settings.parser import run as command
from crosslevel.training.train import train
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

BATCH = 256
# objects, frames, imbalance; images of the largest class, copies, imbalance.
TURNTABLES = [(600, 1, 1), (60, 20, 2), (150, 6, 5), (200, 5, 20), (120, 12, 50), (220, 2, 100), (60, 30, 20)]
CIFARS = [(150, 1, 1), (300, 1, 10), (500, 1, 100), (60, 5, 3), (300, 2, 50), (400, 1, 30)]

TRAINED = [
    *(("turntable", 12, 600, 3, imbalance, seed) for imbalance, seed in ((1, 300), (10, 302), (30, 303), (100, 304))),
    *(("CIFAR-10", 10, 1800, 1, imbalance, seed) for imbalance, seed in ((1, 306), (10, 308), (30, 309), (100, 310))),
]
"""Source, classes, objects (images of CIFAR-10), frames of each, imbalance, seed; nothing was chosen on these seeds."""
GOOD = [
    (300, 1, 1, 12), (60, 10, 2, 12), (150, 4, 5, 12), (200, 3, 10, 12), (300, 2, 20, 12), (240, 3, 50, 12),
    (400, 2, 100, 12), (120, 6, 20, 8), (260, 2, 3, 10), (220, 2, 35, 10),
]  # fmt: skip
"""Objects, frames, imbalance, classes; nothing was chosen on these."""
CONSTRUCTED = [(1, 10), (2, 12), (4, 6), (8, 8), (16, 10), (32, 12), (64, 6), (128, 8)]
"""Imbalance, classes."""
SETTINGS = [
    "--method=SimCLR", "--encoder.width=0.25", "--encoder.small_images=false", "--encoder.zero_init_last=false",
    "--batch_size=128", "--epochs=32", "--optimizer=adamw", "--lr=0.002", "--cld.groups=64", "--cld.weight=0.5",
    "--monitor_every=0", "--report_html=false", "--method.temperature=0.5", "--method.hidden=128",
    "--method.batch_norm=false",
]  # fmt: skip
"""Of each run: as on the command line."""


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


class Made(NamedTuple):
    name: str
    data: torch.Tensor
    labels: torch.Tensor
    tracks: torch.Tensor


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
    sections = {
        "By the features of a run on each collection": trained(arguments.folder, Path(arguments.runs)),
        "Without a run": ((made, None) for made in collections(arguments.folder)),
    }
    for heading, made in sections.items():
        rows = []
        for collection, run in made:
            rows.append(measured(*collection, run))
            print(rows[-1], flush=True)
        text += ["", f"## {heading}", "", *tabled(rows)]
        Path(arguments.output).write_text("\n".join(text) + "\n", encoding="utf-8")


def good(home: Path) -> list[str]:
    """The table of `GOOD`, by an encoder that has learnt the classes from other objects."""
    run = supervised(home / "supervised")
    rows = []
    for seed, (objects, frames, imbalance, classes) in enumerate(GOOD, 700):
        made = Turntable(classes=classes, objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        name = f"turntable, {classes} classes, {objects} x {frames}, {imbalance}"
        rows.append(measured(name, made.data, made.labels, made.tracks, run))
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
    rate, draws = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps),
        torch.Generator().manual_seed(0),
    )
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=draws)
        [shown] = views(images.batch(index), draws)
        scores = network(shown.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, images.labels[index]).backward()
        optimizer.step()
        rate.step()
    run.mkdir(parents=True, exist_ok=True)
    encoder.eval().save(run / "encoder.safetensors")
    return run


def collections(folder: str) -> Iterator[Made]:
    """Of different sizes and tracks."""
    for seed, (objects, frames, imbalance) in enumerate(TURNTABLES, 100):
        made = Turntable(objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        yield Made(f"turntable, {objects} objects x {frames}, {imbalance}", made.data, made.labels, made.tracks)
    cifar = pack(open_images(folder), 32, bad=BadFiles(), workers=0)
    for seed, (most, copies, imbalance) in enumerate(CIFARS, 200):
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cifar), generator=draws)
        first = torch.cat([order[cifar.labels[order] == c][:most] for c in range(10)])
        # Which class is frequent differs: else colour alone could tell.
        renamed = torch.randperm(10, generator=draws)[cifar.labels[first]]
        part = take(cifar, first[long_tailed(renamed, imbalance, draws)])
        data, tracks = repeated(part.data, copies, draws)
        yield Made(f"CIFAR-10, {len(part)} x {copies}, {imbalance}", data, part.labels.repeat(copies), tracks)


def trained(folder: str, home: Path) -> Iterator[tuple[Made, Path]]:
    """The collections of `TRAINED`, each with the run that was trained on it."""
    cifar = pack(open_images(folder), 32, bad=BadFiles(), workers=0)
    for source, classes, objects, frames, imbalance, seed in TRAINED:
        name = f"{source}, {classes} classes, {objects} x {frames}, {imbalance}"
        if source == "turntable":
            made = Turntable(classes=classes, objects=objects, frames=frames, imbalance=imbalance, seed=seed)
            made = Made(name, made.data, made.labels, made.tracks)
        else:
            part = take(cifar, exponential(cifar.labels, objects, imbalance, torch.Generator().manual_seed(seed)))
            made = Made(name, part.data, part.labels, torch.arange(objects))
        yield made, run_on(made, home / f"{source}-{classes}-{imbalance}-{seed}".lower())


def exponential(labels: torch.Tensor, total: int, imbalance: float, draws: torch.Generator) -> torch.Tensor:
    """``total`` images whose classes, in a drawn order, decrease as in `long_tailed`, rounded."""
    order = torch.randperm(len(labels), generator=draws)
    renamed = torch.randperm(10, generator=draws)[labels[order]]
    weights = imbalance ** (-torch.arange(10).double() / 9)
    bounds = (weights / weights.sum() * total).cumsum(0).round().long()
    wanted = bounds.diff(prepend=torch.zeros(1, dtype=torch.long))
    return torch.cat([order[renamed == c][:count] for c, count in enumerate(wanted.tolist())])


def run_on(made: Made, home: Path) -> Path:
    """The run that was trained on these images, which lie there in a drawn order and without names."""
    if not (home / "run" / "encoder.safetensors").exists():
        (home / "images").mkdir(parents=True, exist_ok=True)
        for i, place in enumerate(torch.randperm(len(made.data), generator=torch.Generator().manual_seed(0)).tolist()):
            write_png(made.data[place], str(home / "images" / f"{i:04}.png"))
        shutil.rmtree(home / "run", ignore_errors=True)  # what a killed one left
        command(train, [str(home / "images"), f"--run={home / 'run'}", *SETTINGS])
    return home / "run"


def repeated(data: torch.Tensor, copies: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image several times, each copy shifted by up to 2 pixels; what leaves the frame is reflected."""
    wide = torch.nn.functional.pad(data.float(), (2, 2, 2, 2), mode="reflect").byte()
    made = torch.empty(copies, *data.shape, dtype=torch.uint8)
    for copy in made:
        for i, (down, across) in enumerate(torch.randint(5, (len(data), 2), generator=draws).tolist()):
            copy[i] = wide[i, :, down : down + 32, across : across + 32]
    return (made if copies > 1 else data.unsqueeze(0)).flatten(0, 1), torch.arange(len(data)).repeat(copies)


def measured(name: str, data: torch.Tensor, labels: torch.Tensor, tracks: torch.Tensor, run: Path | None) -> Row:
    source: Images = Unlabelled(data, name)
    bad, features, threshold, accuracy = BadFiles(), None, 1.0, None
    looked = look(source, bad, 0)
    if run is not None:
        features, threshold = known_features(load_encoder(run), source, looked, Runtime(choose(), 0), None, bad, 0)
        accuracy = neighbours(features, labels, tracks)
    found = find(looked, features, threshold)
    told = summary(name, len(source), source, looked, found, bad, BATCH, None if run is None else str(run))
    tail, sizes = told["long_tail"]["by_track"], torch.bincount(labels)
    return Row(
        name, long_tail.imbalance_factor(sizes), tail["imbalance"], long_tail.gini(sizes), tail["gini"],
        long_tail.duplicate_share(tracks.unique(return_counts=True)[1], BATCH), told["batch"]["duplicate_share"],
        told["long_tail"]["separation"], accuracy, bound(found.features, labels, tracks),
    )  # fmt: skip


def neighbours(features: torch.Tensor, labels: torch.Tensor, tracks: torch.Tensor) -> float:
    """Of 5 neighbours from other tracks: accuracy in percent, the mean over classes. For the table alone."""
    unit = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    cosine = (unit @ unit.T).masked_fill_(tracks[:, None] == tracks, -2)
    known = torch.nn.functional.one_hot(labels)
    right = known[cosine.topk(5).indices].sum(1).argmax(1) == labels
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
    """Of Gaussian classes, 1,000 points each: how the estimate ranks, by how far apart the classes are."""
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


def ranked(apart: float, imbalance: int, classes: int, seed: int) -> tuple[float, float, float, float, float]:
    """True and estimated imbalance, estimated Gini index, separation, accuracy in percent."""
    draws = torch.Generator().manual_seed(seed)
    weights = imbalance ** (-torch.arange(classes).double() / (classes - 1))
    sizes = (weights / weights.sum() * 1000).round().long().clamp(min=2)
    labels, tracks = torch.arange(classes).repeat_interleave(sizes), torch.arange(int(sizes.sum()))
    centres = torch.nn.functional.normalize(torch.randn(classes, 16, generator=draws), dim=1) * apart
    spread = torch.cat([torch.linspace(0.5, 1.5, 16), torch.full((48,), 0.3)])
    features = torch.randn(len(labels), 64, generator=draws) * spread
    features[:, :16] += centres[labels]
    found = long_tail.grouped(features, tracks)
    estimated = torch.bincount(found.groups)
    return (
        long_tail.imbalance_factor(sizes), long_tail.exponential_imbalance(estimated), long_tail.gini(estimated),
        found.separation, neighbours(features, labels, tracks),
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
    for what, of, by in (
        ("imbalance by its estimate", "imbalance", "imbalance"),
        ("imbalance by the groups' Gini index", "imbalance", "gini"),
        ("imbalance by the Gini index of k-means from the true means", "imbalance", "bound"),
        ("duplicate share", "share", "share"),
    ):
        found = [
            spearmanr([getattr(r, f"true_{of}") for r in f], [getattr(r, by) for r in f]).statistic for f in families
        ]
        lines.append(f"- {what}: {', '.join('-' if rho != rho else f'{rho:.2f}' for rho in found)}")
    return lines


if __name__ == "__main__":
    main()
