"""``crosslevel evaluate``: what a run's features are good for, beside an untrained encoder and raw pixels."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

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


PIXELS: Literal["pixels"] = "pixels"
"""The kind of features that are the pixels themselves, at `PIXEL_SIZE`."""

PIXEL_SIZE = 32
DECODED_ONCE = 2e9  # bytes: smaller sources stay in memory for all kinds of features

Kind = Encoder | Literal["pixels"]


class Place(NamedTuple):
    """Where and how encoders run."""

    hardware: Hardware
    workers: int | None = None
    batch_size: int = 256


class Truth(NamedTuple):
    """Test labels in the training set's numbering, training frequencies, and the shot split."""

    train: Int64[Tensor, " N"]
    test: Int64[Tensor, " Q"]
    counts: Int64[Tensor, " C"]
    shots: Shots | None


def evaluate(
    run: str,
    images: str,
    test: str | None = None,
    k: int = 200,
    temperature: float = 0.1,
    shots: tuple[int, int] | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
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
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10 and cifar100.
        seed: of the untrained encoder's weights.
        output: the figures' JSON file; evaluation.json in the run's folder unless given.

    Returns:
        the figures of each kind of features.
    """
    if test is None:
        raise ValueError("--test is missing: name the labelled images to classify")
    console = Console(soft_wrap=True)
    hardware = choose(device, precision)
    encoder = load_encoder(run)
    console.print(f"device: {hardware.why}", highlight=False)
    began, bad = time.monotonic(), BadFiles()
    place = Place(hardware, workers, batch_size)
    kinds: dict[str, Kind] = {
        "raw pixels": PIXELS,
        "untrained encoder": untrained(encoder, seed),
        "trained encoder": encoder,
    }
    bank, queries = labelled_pair(images, test, data_root)
    figures, truth = compare(kinds, bank, queries, place, bad, k, temperature, shots, console)
    title = f"kNN accuracy, % (k = {k}, T = {temperature}; {len(truth.test):,} among {len(truth.train):,} images)"
    print_table(console, title, figures, truth)
    if len(bad):
        console.print(bad.summary(len(bank) + len(queries)), highlight=False, markup=False)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    file = Path(output) if output else folder / "evaluation.json"
    settings = {"protocol": "knn", "images": images, "test": test, "k": k, "temperature": temperature}
    limits = None if truth.shots is None else [truth.shots.low, truth.shots.high]
    record = {**settings, "shots": limits, "skipped": bad.reasons, "accuracy_percent": figures}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"{time.monotonic() - began:.1f} s; written to {file}", highlight=False, markup=False)
    return figures


def compare(
    kinds: dict[str, Kind],
    bank: Images,
    queries: Images,
    place: Place,
    bad: BadFiles,
    k: int = 200,
    temperature: float = 0.1,
    shots: tuple[int, int] | None = None,
    console: Console | None = None,
) -> tuple[dict[str, dict[str, float]], Truth]:
    """KNN figures of several kinds of features on the same images.

    Args:
        kinds: by name, an encoder, or `PIXELS`.
        bank: labelled images to look among.
        queries: labelled images to classify.
        place: where the encoders run.
        bad: collects what could not be read.
        k: how many neighbours vote.
        temperature: T of the vote.
        shots: limits of few- and many-shot classes.
        console: shows what is being measured.
    """
    size = max([kind.view.size for kind in kinds.values() if isinstance(kind, Encoder)], default=32)
    if max(len(bank), len(queries)) * 3 * size**2 < DECODED_ONCE:
        bank, queries = (pack(part, size, bad=bad) for part in (bank, queries))
    figures, truth = {}, None
    for name, kind in kinds.items():
        with console.status(f"{name} ...") if console else nullcontext():
            known, asked = (_features(kind, part, place, bad) for part in (bank, queries))
            truth = _truth(bank, queries, known, asked, shots)
            votes = weighted_knn(known.features, truth.train, asked.features, len(truth.counts), k, temperature)
            figures[name] = accuracies(votes, truth.test, truth.counts, truth.shots)
    if truth is None:
        raise ValueError("kinds is empty: there are no features to compare")
    return figures, truth


def print_table(console: Console, title: str, figures: dict[str, dict[str, float]], truth: Truth) -> None:
    """The figures, one row a kind of features."""
    table = Table(title=title)
    names = columns(figures)
    table.add_column("features")
    for name in names:
        table.add_column(COLUMNS[name], justify="right")
    for kind, row in figures.items():
        table.add_row(kind, *(f"{row[name]:.1f}" for name in names))
    console.print(table)
    if truth.shots is not None:
        console.print(truth.shots.describe(), highlight=False)


def columns(figures: dict[str, dict[str, float]]) -> list[str]:
    """Which figures there are, in the table's order."""
    return [name for name in COLUMNS if any(name in row for row in figures.values())]


def labelled_pair(images: str, test: str, data_root: str | None = None) -> tuple[Images, Images]:
    """Both sources opened.

    Raises:
        SourceError: one has no labels, or the test images have classes that the others lack.
    """
    bank, queries = (_labelled(source, data_root) for source in (images, test))
    unknown = sorted(set(queries.classes or []) - set(bank.classes or []))
    if unknown:
        named = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
        raise SourceError(f"{test} has classes that {images} lacks: {named}")
    return bank, queries


def _labelled(source: str, data_root: str | None) -> Images:
    images = image_sources.open(source, data_root=data_root)
    if images.labels is None:
        raise SourceError(f"{source} has no labels: put each class into a folder of its own to evaluate on it")
    return images


def _features(kind: Kind, images: Images, place: Place, bad: BadFiles) -> Features:
    if isinstance(kind, Encoder):
        return extract(
            kind, images, batch_size=place.batch_size, workers=place.workers, hardware=place.hardware, bad=bad
        )
    return pixels(images, PIXEL_SIZE, workers=place.workers, bad=bad)


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
