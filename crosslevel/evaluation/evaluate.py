"""``crosslevel evaluate``: what a run's features are good for, beside an untrained encoder and raw pixels."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation import protocols
from crosslevel.evaluation.detection import benchmark
from crosslevel.evaluation.detection.model import Sizes
from crosslevel.evaluation.finetune import FineTune, Semi
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.protocols import PIXELS, Kind, Row, Subject
from crosslevel.evaluation.results import FILE, keep, print_table
from crosslevel.evaluation.scores import Scores
from crosslevel.features.extract import Runtime
from crosslevel.metrics.shots import describe_limits
from crosslevel.models.encoder import Encoder, load_encoder, untrained
from crosslevel.runs import load_branches
from crosslevel.utils.device import Device, Hardware, Precision, choose
from crosslevel.utils.errors import SourceError

Calls = dict[str, tuple[dict[str, Any], Callable[[], dict[str, Row]]]]

PROTOCOLS = ("knn", "linear", "semi", "transfer", "detection", "retrieval", "clustering")


@dataclass(frozen=True)
class Detection:
    """How object detectors are fine-tuned (He et al. 2020, sec. 4.2).

    Args:
        images: annotated images to train on, in the layout of Pascal VOC or COCO; those to evaluate on unless given.
        test: annotated images to test on; likewise.
        kind: Faster R-CNN with the last stage as its box head (c4), or with a feature pyramid (fpn).
        iterations: steps; the paper's schedule for the data set's layout, scaled. Its own length unless given.
        batch_size: images a step.
        rate: for 16 images a step; others in proportion.
        short_side: pixels of the images' shorter side; the paper's unless given.
        batchnorm: trained, or frozen as it is in the encoder.

    """

    images: str | None = None
    test: str | None = None
    kind: Literal["c4", "fpn"] = "c4"
    iterations: int | None = None
    batch_size: int = 16
    rate: float = 0.02
    short_side: int | None = None
    batchnorm: Literal["train", "frozen"] = "train"


def evaluate(
    run: str,
    images: str,
    test: str | None = None,
    protocol: str = "knn",
    k: int = 200,
    temperature: float = 0.1,
    shots: tuple[int, int] | None = None,
    clusters: int | None = None,
    linear: Linear = Linear(),
    semi: Semi = Semi(),
    transfer: FineTune = FineTune(schedule="cosine"),
    detection: Detection = Detection(),
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
    batch_size: int = 256,
    data_root: str | None = None,
    crops: Crops | None = None,
    seed: int = 0,
    cache: bool = True,
    branches: bool = False,
    output: str | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Judge the features of a run by one protocol or several, beside an untrained encoder and raw pixels.

    knn: temperature-weighted nearest neighbours. linear: a linear classifier on frozen features. semi: fine-tuning with
    few labels. transfer: linear and fine-tuned accuracy on these images. detection: Faster R-CNN. retrieval: recall and
    mean average precision. clustering: k-means against labels. All in percent, accuracies with 95 % intervals by
    bootstrap over the test images, and for many-, medium- and few-shot classes where classes differ in frequency.

    Args:
        run: the folder of a run, or its encoder.safetensors.
        images: labelled images to learn from: a class-per-folder layout of images or videos, .tar shards, Parquet
            files, hf://owner/name, annotations (with --crops), cifar10, cifar100, stl10 or turntable; a suffix such as
            @imbalance=100, @list=FILE or @classes=FILE takes a part.
        test: labelled images to classify.
        protocol: which of the protocols; several joined by commas.
        k: knn: how many neighbours vote.
        temperature: knn: T; a neighbour's vote is exp(cosine / T).
        shots: few-shot classes have fewer training images than the first, many-shot ones more than the second; 20 and
            100 where that leaves none empty, thirds of the classes elsewhere.
        clusters: clustering: how many; as many as classes unless given.
        linear: settings of linear and of transfer's linear part.
        semi: settings of semi.
        transfer: settings of transfer's fine-tuning.
        detection: settings of detection.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        seed: of the untrained encoder's weights, and of all draws.
        cache: keep features and unfinished trainings in the run's folder: no other call computes them again.
        branches: judge the features of the instance and the group branch as well: published figures on CIFAR are of the
            instance branch.
        output: the figures' JSON file; evaluation.json in the run's folder unless given.

    Returns:
        of each protocol the figures of each kind of features.
    """
    names = _asked(protocol)
    if test is None and not (names == ["detection"] and detection.test):
        raise ValueError("--test is missing: name the labelled images to classify")
    console, began = Console(soft_wrap=True), time.monotonic()
    hardware = choose(device, precision)
    encoder = load_encoder(run)
    console.print(f"device: {hardware.why}", highlight=False)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    file, home = Path(output) if output else folder / FILE, folder if cache else None
    where: dict[str, Any] = {"images": _place(images), "test": _place(test), "data_root": data_root, "seed": seed}
    if crops is not None:
        where["crops"] = asdict(crops)
    bad, total = BadFiles(), 0
    calls: Calls = {
        "detection": (
            asdict(detection),
            lambda: _detection(encoder, images, test, detection, hardware, seed, workers, home, bad, console),
        )
    }
    if set(names) - {"detection"}:
        assert test is not None
        bank, queries = labelled_pair(images, test, data_root, crops)
        kinds: dict[str, Kind] = {
            "raw pixels": PIXELS,
            "untrained encoder": untrained(encoder, seed),
            "trained encoder": encoder,
        }
        subject = Subject(
            kinds, bank, queries, Runtime(hardware, workers, batch_size), bad, home,
            load_branches(folder) if branches else {}, console, shots, seed,
        )  # fmt: skip
        total = len(bank) + len(queries)
        for part in (bank, queries):
            bad.leave_out(part.left_out)
        split = subject.split
        where["shots"] = None if split is None else [split.low, split.high]
        calls |= _calls(subject, k, temperature, clusters, linear, semi, transfer)
    figures = {}
    for name in names:
        given, call = calls[name]
        for title, row in call().items():
            print_table(console, title, row)
            keep(file, {"protocol": title, **where, "settings": given, "skipped": bad.reasons}, row)
            figures[title] = {kind: judged.figures for kind, judged in row.items()}
    _explain(console, names, images, where.get("shots"))
    if len(bad):
        console.print(bad.summary(total), highlight=False, markup=False)
    console.print(f"{time.monotonic() - began:.1f} s; written to {file}", highlight=False, markup=False)
    return figures


def _calls(
    subject: Subject,
    k: int,
    temperature: float,
    clusters: int | None,
    linear: Linear,
    semi: Semi,
    transfer: FineTune,
) -> Calls:
    """Each protocol's settings, for the record, and what runs it."""
    both = {"fine_tuned": asdict(transfer), "linear": asdict(linear)}
    return {
        "knn": ({"k": k, "temperature": temperature}, lambda: protocols.knn(subject, k, temperature)),
        "linear": (asdict(linear), lambda: protocols.linear(subject, linear)),
        "semi": (asdict(semi), lambda: protocols.semi(subject, semi)),
        "transfer": (both, lambda: protocols.transfer(subject, transfer, linear)),
        "retrieval": ({}, lambda: protocols.retrieval(subject)),
        "clustering": ({"clusters": clusters}, lambda: protocols.clustering(subject, clusters)),
    }


def _detection(
    encoder: Encoder,
    images: str,
    test: str | None,
    how: Detection,
    hardware: Hardware,
    seed: int,
    workers: int | None,
    home: Path | None,
    bad: BadFiles,
    console: Console,
) -> dict[str, Row]:
    """Detectors from random and from trained weights, trained alike."""
    train, queries = annotated(parse(how.images or images)), annotated(parse(how.test or test or ""))
    plan = benchmark.published(train)
    schedule = plan.schedule._replace(batch_size=how.batch_size, rate=how.rate)
    if how.iterations is not None:
        schedule = schedule._replace(iterations=how.iterations)
    plan = plan._replace(schedule=schedule, kind=how.kind, batchnorm=how.batchnorm)
    if how.short_side is not None:
        plan = plan._replace(sizes=Sizes((how.short_side,), how.short_side, 2 * how.short_side))
    figures = benchmark.detection(
        encoder, train, queries, settings=plan, hardware=hardware, seed=seed,
        workers=4 if workers is None else workers, folder=None if home is None else home / "probe" / "detection",
        bad=bad, console=console,
    )  # fmt: skip
    title = f"detection, {how.kind}, {plan.schedule.iterations:,} iterations"
    return {title: {name: Scores(row) for name, row in figures.items()}}


def _explain(console: Console, names: list[str], images: str, shots: list[int] | None) -> None:
    """What a reader of the tables has to know."""
    if shots is not None:
        console.print(describe_limits(*shots), highlight=False)
    if "transfer" in names and protocols.convention(images) == "balanced":
        console.print("papers report this data set's mean per-class accuracy: the balanced column", highlight=False)


def _asked(protocol: str) -> list[str]:
    names = [name.strip() for name in protocol.split(",")]
    for name in names:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name.lower(), PROTOCOLS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PROTOCOLS)}"
            raise ValueError(f"protocol={name!r} is unknown: {hint}")
    return sorted(set(names), key=names.index)


def _place(source: str | None) -> str | None:
    """A source as any other call would find it."""
    return None if source is None else parse(source).absolute().text


def labelled_pair(
    images: str, test: str, data_root: str | None = None, crops: Crops | None = None
) -> tuple[Images, Images]:
    """Both sources opened.

    Raises:
        SourceError: one has no labels, or the test images have classes that the others lack.
    """
    bank, queries = (_labelled(source, data_root, crops) for source in (images, test))
    unknown = sorted(set(queries.classes or []) - set(bank.classes or []))
    if unknown:
        named = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
        raise SourceError(f"{test} has classes that {images} lacks: {named}")
    return bank, queries


def _labelled(source: str, data_root: str | None, crops: Crops | None) -> Images:
    images = open_images(source, data_root=data_root, crops=crops)
    if images.labels is None:
        raise SourceError(f"{source} has no labels: put each class into a folder of its own to evaluate on it")
    return images
