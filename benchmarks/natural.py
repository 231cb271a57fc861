"""What `crosslevel inspect` estimates without labels, beside the truth of collections that are made for it.

python benchmarks/natural.py FOLDER [--run RUN] [-o FILE]   # FOLDER: CIFAR-10's training images, a folder a class

The estimates see pixels alone: `Unlabelled` has no labels and no tracks to read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from beside import machine
from scipy.stats import spearmanr

from crosslevel import images as image_sources
from crosslevel import load_encoder
from crosslevel.collection import find, known_features, look
from crosslevel.features import Place
from crosslevel.hardware import choose
from crosslevel.images import BadFiles, Images, Packed, Turntable, pack
from crosslevel.images.subsets import long_tailed, take
from crosslevel.inspect import summary
from crosslevel.metrics import long_tail

BATCH = 256
# objects, frames, imbalance; images of the largest class, copies, imbalance.
TURNTABLES = [(600, 1, 1), (60, 20, 2), (150, 6, 5), (200, 5, 20), (120, 12, 50), (220, 2, 100), (60, 30, 20)]
CIFARS = [(150, 1, 1), (300, 1, 10), (500, 1, 100), (60, 5, 3), (300, 2, 50), (400, 1, 30)]


class Unlabelled(Packed):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--run", help="a run whose features are used as well")
    parser.add_argument("-o", "--output", default="benchmarks/results/natural.md")
    arguments = parser.parse_args()
    made = list(collections(arguments.folder))
    text = [machine(), f"batch {BATCH}; collections of seeds that nothing was chosen on"]
    for run in (None, arguments.run) if arguments.run else (None,):
        rows = []
        for name, data, labels, tracks in made:
            rows.append(measured(name, data, labels, tracks, run))
            print(rows[-1], flush=True)
        text += ["", f"## {'By the features of a run' if run else 'Without a run'}", "", *tabled(rows)]
        Path(arguments.output).write_text("\n".join(text) + "\n", encoding="utf-8")


def collections(folder: str):
    """Name, images, labels and tracks of each."""
    for seed, (objects, frames, imbalance) in enumerate(TURNTABLES, 100):
        made = Turntable(objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        yield f"turntable, {objects} objects x {frames}, {imbalance}", made.data, made.labels, made.tracks
    cifar = pack(image_sources.open(folder), 32, bad=BadFiles(), workers=0)
    for seed, (most, copies, imbalance) in enumerate(CIFARS, 200):
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cifar), generator=draws)
        first = torch.cat([order[cifar.labels[order] == c][:most] for c in range(10)])
        # Which class is frequent differs: else colour alone could tell.
        renamed = torch.randperm(10, generator=draws)[cifar.labels[first]]
        part = take(cifar, first[long_tailed(renamed, imbalance, draws)])
        data, tracks = repeated(part.data, copies, draws)
        yield f"CIFAR-10, {len(part)} x {copies}, {imbalance}", data, part.labels.repeat(copies), tracks


def repeated(data: torch.Tensor, copies: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image several times, each copy shifted by up to 2 pixels; what leaves the frame is reflected."""
    wide = torch.nn.functional.pad(data.float(), (2, 2, 2, 2), mode="reflect").byte()
    made = torch.empty(copies, *data.shape, dtype=torch.uint8)
    for copy in made:
        for i, (down, across) in enumerate(torch.randint(5, (len(data), 2), generator=draws).tolist()):
            copy[i] = wide[i, :, down : down + 32, across : across + 32]
    return (made if copies > 1 else data.unsqueeze(0)).flatten(0, 1), torch.arange(len(data)).repeat(copies)


def measured(name: str, data: torch.Tensor, labels: torch.Tensor, tracks: torch.Tensor, run: str | None) -> Row:
    source: Images = Unlabelled(data, name)
    bad, features, threshold = BadFiles(), None, 1.0
    looked = look(source, bad, 0)
    if run is not None:
        features, threshold = known_features(load_encoder(run), source, looked, Place(choose(), 0), None, bad, 0)
    told = summary(name, len(source), source, looked, find(looked, features, threshold), bad, BATCH, run)
    tail = told["long_tail"]["by_track"]
    sizes = torch.bincount(labels)
    return Row(
        name, long_tail.imbalance_factor(sizes), tail["imbalance"], long_tail.gini(sizes), tail["gini"],
        long_tail.duplicate_share(tracks.unique(return_counts=True)[1], BATCH), told["batch"]["duplicate_share"],
    )  # fmt: skip


def tabled(rows: list[Row]) -> list[str]:
    lines = [
        "| collection | imbalance | estimated | Gini | estimated | duplicates a batch, % | estimated |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.true_imbalance:.1f} | {row.imbalance:.1f} | {row.true_gini:.2f} | {row.gini:.2f} "
            f"| {100 * row.true_share:.1f} | {100 * row.share:.1f} |"
        )
    ranks = [
        (what, spearmanr([getattr(r, f"true_{of}") for r in rows], [getattr(r, by) for r in rows]).statistic)
        for what, of, by in (
            ("imbalance by the ratio of groups", "imbalance", "imbalance"),
            ("imbalance by the groups' Gini index", "imbalance", "gini"),
            ("duplicate share", "share", "share"),
        )
    ]
    return [*lines, "", "Spearman correlation of estimate and truth: " + ", ".join(f"{w} {r:.2f}" for w, r in ranks)]


if __name__ == "__main__":
    main()
