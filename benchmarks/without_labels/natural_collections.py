"""The collections of `natural.py`, with their true classes and tracks, and the runs that are trained on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.io import write_png

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import long_tailed
from crosslevel.settings.parser import run as command
from crosslevel.training.train import train

# objects, frames, imbalance; images of the largest class, copies, imbalance.
TURNTABLES = [(600, 1, 1), (60, 20, 2), (150, 6, 5), (200, 5, 20), (120, 12, 50), (220, 2, 100), (60, 30, 20)]
CIFARS = [(150, 1, 1), (300, 1, 10), (500, 1, 100), (60, 5, 3), (300, 2, 50), (400, 1, 30)]
TRAINED = [
    *(("turntable", 12, 600, 3, imbalance, seed) for imbalance, seed in ((1, 300), (10, 302), (30, 303), (100, 304))),
    *(("CIFAR-10", 10, 1800, 1, imbalance, seed) for imbalance, seed in ((1, 306), (10, 308), (30, 309), (100, 310))),
]
"""Source, classes, objects (images of CIFAR-10), frames of each, imbalance, seed; nothing was chosen on these seeds."""
SETTINGS = [
    "--method=SimCLR", "--encoder.width=0.25", "--encoder.small_images=false", "--encoder.zero_init_last=false",
    "--batch_size=128", "--epochs=32", "--optimizer=adamw", "--lr=0.002", "--cld.groups=64", "--cld.weight=0.5",
    "--monitor_every=0", "--report_html=false", "--method.temperature=0.5", "--method.hidden=128",
    "--method.batch_norm=false",
]  # fmt: skip
"""The options of each run, as on the command line."""


class Collection(NamedTuple):
    name: str
    data: torch.Tensor
    labels: torch.Tensor
    tracks: torch.Tensor


def collections(folder: str) -> Iterator[Collection]:
    """Collections of different sizes and tracks."""
    for seed, (objects, frames, imbalance) in enumerate(TURNTABLES, 100):
        turntable = Turntable(objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        yield of_turntable(f"turntable, {objects} objects x {frames}, {imbalance}", turntable)
    cifar = pack(open_images(folder), 32, bad_files=BadFiles(), workers=0)
    labels = labels_of(cifar)
    for seed, (most, copies, imbalance) in enumerate(CIFARS, 200):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cifar), generator=generator)
        first = torch.cat([order[labels[order] == c][:most] for c in range(10)])
        # Which class is frequent differs: else colour alone could tell.
        renamed = torch.randperm(10, generator=generator)[labels[first]]
        part = first[long_tailed(renamed, imbalance, generator)]
        data, tracks = repeated(cifar.data[part], copies, generator)
        yield Collection(f"CIFAR-10, {len(part)} x {copies}, {imbalance}", data, labels[part].repeat(copies), tracks)


def of_turntable(name: str, turntable: Turntable) -> Collection:
    """Each object is a track."""
    assert turntable.tracks is not None
    return Collection(name, turntable.data, labels_of(turntable), turntable.tracks)


def labels_of(images: Images) -> torch.Tensor:
    """The labels, without which these programs judge nothing."""
    if images.labels is None:
        raise SystemExit(f"{images.name} needs labels: a folder with one sub-folder a class")
    return images.labels


def trained(folder: str, runs_dir: Path) -> Iterator[tuple[Collection, Path]]:
    """The collections of `TRAINED`, each with the run that was trained on it."""
    cifar = pack(open_images(folder), 32, bad_files=BadFiles(), workers=0)
    labels = labels_of(cifar)
    for source, classes, objects, frames, imbalance, seed in TRAINED:
        name = f"{source}, {classes} classes, {objects} x {frames}, {imbalance}"
        if source == "turntable":
            turntable = Turntable(classes=classes, objects=objects, frames=frames, imbalance=imbalance, seed=seed)
            collection = of_turntable(name, turntable)
        else:
            part = exponential(labels, objects, imbalance, torch.Generator().manual_seed(seed))
            collection = Collection(name, cifar.data[part], labels[part], torch.arange(objects))
        yield collection, run_on(collection, runs_dir / f"{source}-{classes}-{imbalance}-{seed}".lower())


def exponential(labels: torch.Tensor, total: int, imbalance: float, generator: torch.Generator) -> torch.Tensor:
    """``total`` images whose classes, in a drawn order, decrease as in `long_tailed`, rounded."""
    order = torch.randperm(len(labels), generator=generator)
    renamed = torch.randperm(10, generator=generator)[labels[order]]
    weights = imbalance ** (-torch.arange(10).double() / 9)
    bounds = (weights / weights.sum() * total).cumsum(0).round().long()
    counts = bounds.diff(prepend=torch.zeros(1, dtype=torch.long))
    return torch.cat([order[renamed == c][:count] for c, count in enumerate(counts.tolist())])


def run_on(collection: Collection, run_dir: Path) -> Path:
    """The run that was trained on these images, which are stored in random order and without names."""
    if not (run_dir / "run" / "encoder.safetensors").exists():
        (run_dir / "images").mkdir(parents=True, exist_ok=True)
        for i, index in enumerate(
            torch.randperm(len(collection.data), generator=torch.Generator().manual_seed(0)).tolist()
        ):
            write_png(collection.data[index], str(run_dir / "images" / f"{i:04}.png"))
        shutil.rmtree(run_dir / "run", ignore_errors=True)  # what a killed one left
        command(train, [str(run_dir / "images"), f"--run={run_dir / 'run'}", *SETTINGS])
    return run_dir / "run"


def repeated(data: torch.Tensor, copies: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image several times, each copy shifted by up to 2 pixels; what leaves the frame is reflected."""
    wide = torch.nn.functional.pad(data.float(), (2, 2, 2, 2), mode="reflect").byte()
    result = torch.empty(copies, *data.shape, dtype=torch.uint8)
    for copy in result:
        for i, (down, across) in enumerate(torch.randint(5, (len(data), 2), generator=generator).tolist()):
            copy[i] = wide[i, :, down : down + 32, across : across + 32]
    return (result if copies > 1 else data.unsqueeze(0)).flatten(0, 1), torch.arange(len(data)).repeat(copies)
