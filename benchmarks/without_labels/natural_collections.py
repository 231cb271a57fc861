"""The collections of `natural.py`, with their true classes and tracks, and the runs that are trained on them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.io import write_png

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import pack
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import long_tailed, take
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
"""Of each run: as on the command line."""


class Made(NamedTuple):
    name: str
    data: torch.Tensor
    labels: torch.Tensor
    tracks: torch.Tensor


def collections(folder: str) -> Iterator[Made]:
    """Of different sizes and tracks."""
    for seed, (objects, frames, imbalance) in enumerate(TURNTABLES, 100):
        made = Turntable(objects=objects, frames=frames, imbalance=imbalance, seed=seed)
        yield Made(f"turntable, {objects} objects x {frames}, {imbalance}", made.data, made.labels, made.tracks)
    cifar = pack(open_images(folder), 32, bad=BadFiles(), workers=0)
    for seed, (most, copies, imbalance) in enumerate(CIFARS, 200):
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cifar), generator=rng)
        first = torch.cat([order[cifar.labels[order] == c][:most] for c in range(10)])
        # Which class is frequent differs: else colour alone could tell.
        renamed = torch.randperm(10, generator=rng)[cifar.labels[first]]
        part = take(cifar, first[long_tailed(renamed, imbalance, rng)])
        data, tracks = repeated(part.data, copies, rng)
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


def exponential(labels: torch.Tensor, total: int, imbalance: float, rng: torch.Generator) -> torch.Tensor:
    """``total`` images whose classes, in a drawn order, decrease as in `long_tailed`, rounded."""
    order = torch.randperm(len(labels), generator=rng)
    renamed = torch.randperm(10, generator=rng)[labels[order]]
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


def repeated(data: torch.Tensor, copies: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image several times, each copy shifted by up to 2 pixels; what leaves the frame is reflected."""
    wide = torch.nn.functional.pad(data.float(), (2, 2, 2, 2), mode="reflect").byte()
    made = torch.empty(copies, *data.shape, dtype=torch.uint8)
    for copy in made:
        for i, (down, across) in enumerate(torch.randint(5, (len(data), 2), generator=rng).tolist()):
            copy[i] = wide[i, :, down : down + 32, across : across + 32]
    return (made if copies > 1 else data.unsqueeze(0)).flatten(0, 1), torch.arange(len(data)).repeat(copies)
