"""``crosslevel evaluate``: what a run's features are good for, beside an untrained encoder and raw pixels."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from rich.console import Console
from rich.table import Table
from torch import Tensor

from crosslevel import images as image_sources
from crosslevel.encoder import Encoder, load_encoder
from crosslevel.features import Features, extract, pixels
from crosslevel.hardware import Device, Hardware, Precision, choose
from crosslevel.images import BadFiles, Images, SourceError, pack
from crosslevel.metrics.knn import weighted_knn
from crosslevel.metrics.shots import Shots, accuracies, split_by_frequency

COLUMNS = {"top1": "top-1", "top5": "top-5", "balanced": "balanced", "many": "many", "medium": "medium", "few": "few"}


class Truth(NamedTuple):
    """Test labels in the training set's numbering, training frequencies, and the shot split."""

    train: Int64[Tensor, " N"]
    test: Int64[Tensor, " Q"]
    counts: Int64[Tensor, " C"]
    shots: Shots | None


def evaluate(
    run: str,
    images: str,
    test: str,
    k: int = 200,
    temperature: float = 0.1,
    shots: tuple[int, int] | None = None,
    baselines: bool = True,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int = 0,
    batch_size: int = 256,
    data_root: str | None = None,
    seed: int = 0,
    output: str | None = None,
) -> dict[str, dict[str, float]]:
    """Classify test images by their nearest training images, in the features of a run.

    The temperature-weighted kNN classifier (Wu et al. 2018): top-1, top-5 and balanced accuracy, and accuracy of
    many-, medium- and few-shot classes where classes differ in frequency; in percent. The same figures of an
    untrained encoder and of raw pixels stand beside them.

    Args:
        run: the folder of a run, or its encoder.safetensors.
        images: labelled images to look among: a class-per-folder layout, cifar10, cifar100 or turntable.
        test: labelled images to classify.
        k: how many neighbours vote.
        temperature: T; a neighbour's vote is exp(cosine / T).
        shots: few-shot classes have fewer training images than the first, many-shot ones more than the second; 20 and
            100 where that leaves none empty, thirds of the classes elsewhere.
        baselines: also measure the untrained encoder and raw pixels.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread, which is best for small images.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10 and cifar100.
        seed: of the untrained encoder's weights.
        output: the figures' JSON file; evaluation.json in the run's folder unless given.

    Returns:
        the figures of each kind of features.
    """
    console = Console(soft_wrap=True)
    hardware = choose(device, precision)
    encoder = load_encoder(run)
    bad = BadFiles()
    train_images = _labelled(images, data_root)
    test_images = _labelled(test, data_root)
    _same_classes(train_images, test_images)
    console.print(f"device: {hardware.why}", highlight=False)
    began = time.monotonic()
    size = encoder.view.size
    small = max(len(train_images), len(test_images)) * 3 * size**2 < 2e9
    if small:
        # Decoded once, they serve the trained encoder, the untrained one and the pixels.
        train_images, test_images = (pack(part, size, bad=bad) for part in (train_images, test_images))
    figures: dict[str, dict[str, float]] = {}
    kinds = ["raw pixels", "untrained encoder", "trained encoder"] if baselines else ["trained encoder"]
    for kind in kinds:
        with console.status(f"{kind} ..."):
            bank, queries = (
                _features(kind, encoder, part, hardware, workers, batch_size, bad, seed)
                for part in (train_images, test_images)
            )
            truth = _truth(train_images, test_images, bank, queries, shots)
            votes = weighted_knn(bank.features, truth.train, queries.features, len(truth.counts), k, temperature)
            figures[kind] = accuracies(votes, truth.test, truth.counts, truth.shots)
    _print(console, figures, truth, k, temperature)
    if len(bad):
        console.print(bad.summary(len(train_images) + len(test_images)), highlight=False, markup=False)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    file = Path(output) if output else folder / "evaluation.json"
    record = {
        "protocol": "knn",
        "images": os.fspath(images),
        "test": os.fspath(test),
        "k": k,
        "temperature": temperature,
    }
    file.write_text(json.dumps({**record, "accuracy_percent": figures}, indent=2) + "\n", encoding="utf-8")
    console.print(f"{time.monotonic() - began:.1f} s; written to {file}", highlight=False, markup=False)
    return figures


def _labelled(source: str, data_root: str | None) -> Images:
    images = image_sources.open(source, data_root=data_root)
    if images.labels is None:
        raise SourceError(f"{source} has no labels: put each class into a folder of its own to evaluate on it")
    return images


def _same_classes(train: Images, test: Images) -> None:
    unknown = sorted(set(test.classes or []) - set(train.classes or []))
    if unknown:
        named = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
        raise SourceError(f"{test.name} has classes that {train.name} lacks: {named}")


def _features(
    kind: str, encoder: Encoder, images: Images, hardware: Hardware, workers: int, batch: int, bad: BadFiles, seed: int
) -> Features:
    if kind == "raw pixels":
        return pixels(images, min(encoder.view.size, 32), workers=workers, bad=bad)
    used = encoder if kind == "trained encoder" else untrained(encoder, seed)
    return extract(used, images, batch_size=batch, workers=workers, hardware=hardware, bad=bad)


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same network with fresh random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Encoder(
            encoder.name, encoder.small_images, encoder.width, zero_init_last=encoder.zero_init_last,
            image_size=encoder.image_size,
        )  # fmt: skip
    fresh.view = encoder.view
    return fresh


def _truth(train: Images, test: Images, bank: Features, queries: Features, shots: tuple[int, int] | None) -> Truth:
    assert train.classes is not None
    assert test.classes is not None
    places = {name: i for i, name in enumerate(train.classes)}
    renumbered = torch.tensor([places[name] for name in test.classes])
    counts = torch.bincount(bank.labels, minlength=len(train.classes))
    return Truth(bank.labels, renumbered[queries.labels], counts, split_by_frequency(counts, shots))


def _print(console: Console, figures: dict[str, dict[str, float]], truth: Truth, k: int, temperature: float) -> None:
    title = (
        f"kNN accuracy, % (k = {k}, T = {temperature}; {len(truth.train):,} images, {len(truth.test):,} test images)"
    )
    table = Table(title=title)
    names = [name for name in COLUMNS if any(name in row for row in figures.values())]
    table.add_column("features")
    for name in names:
        table.add_column(COLUMNS[name], justify="right")
    for kind, row in figures.items():
        table.add_row(kind, *(f"{row[name]:.1f}" for name in names))
    console.print(table)
    if truth.shots is not None:
        console.print(truth.shots.describe(), highlight=False)
