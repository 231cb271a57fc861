"""``crosslevel evaluate``: what a run's features are good for, beside an untrained encoder and raw pixels."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation import protocols
from crosslevel.evaluation.detection import benchmark
from crosslevel.evaluation.detection.model import Sizes
from crosslevel.evaluation.finetune import FineTune, Semi
from crosslevel.evaluation.judged import Data, Session, session_of, subject_of
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.overlap import in_training
from crosslevel.evaluation.protocols import Row, Subject
from crosslevel.evaluation.results import keep, print_table
from crosslevel.evaluation.scores import Scores
from crosslevel.features.extract import Runtime
from crosslevel.metrics.knn import neighbours
from crosslevel.metrics.shots import describe_limits
from crosslevel.models.encoder import Encoder
from crosslevel.utils.console import say
from crosslevel.utils.device import Device, Hardware, Precision, choose
from crosslevel.utils.errors import UserError
from crosslevel.utils.marks import verb

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


@dataclass(frozen=True)
class Settings:
    """Which protocols, and how each judges."""

    names: list[str]
    k: int | None
    temperature: float
    shots: tuple[int, int] | None
    clusters: int | None
    linear: Linear
    semi: Semi
    transfer: FineTune
    detection: Detection


@verb(
    "test", "protocol", "k", "temperature", "linear.epochs", "detection.iterations", "output", "device", "precision",
    "workers", "batch_size", "data_root", "crops", "seed", "branches", "beside",
)  # fmt: skip
def evaluate(
    run: str,
    images: str,
    test: str | None = None,
    protocol: str = "knn",
    k: int | None = None,
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
    quiet: bool = False,
    beside: list[str] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Judge the features of a run by one protocol or several, beside an untrained encoder and raw pixels.

    knn: temperature-weighted nearest neighbours. linear: a linear classifier on frozen features. semi: fine-tuning with
    few labels. transfer: linear and fine-tuned accuracy on these images. detection: Faster R-CNN. retrieval: recall and
    mean average precision. clustering: k-means against labels. All in percent, accuracies with 95 % intervals by
    bootstrap over the test images, and for many-, medium- and few-shot classes where classes differ in frequency.

    Args:
        run: the folder of a run, or its encoder.safetensors; or weights by name: timm:NAME, hf-hub:owner/name.
        images: labelled images to learn from: a class-per-folder layout of images or videos, .tar shards, Parquet
            files, hf://owner/name, annotations (with --crops), cifar10, cifar100, stl10 or turntable; a suffix such as
            @imbalance=100, @list=FILE or @classes=FILE takes a part.
        test: labelled images to classify.
        protocol: which of the protocols; several joined by commas.
        k: knn: how many neighbours vote; 200 unless given, but at most a tenth of the images to learn from.
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
        quiet: print nothing.
        beside: another run, or weights by name, such as timm:vit_small_patch14_dinov2.lvd142m: a row more; several by
            several --beside. A run that began with weights has a row of these as they were in any case.

    Returns:
        of each protocol the figures of each kind of features.
    """
    began = time.monotonic()
    data = Data(images, test, data_root, crops)
    settings = Settings(_asked(protocol), k, temperature, shots, clusters, linear, semi, transfer, detection)
    if test is None and not (settings.names == ["detection"] and detection.test):
        raise UserError("--test is missing: name the labelled images to classify")
    place = Runtime(choose(device, precision), workers, batch_size)
    session = session_of(run, beside or [], output, cache, place, seed, quiet)
    subject = subject_of(session, data, settings.names, branches, shots)
    split = None if subject is None else subject.split
    about = data.about(seed) | (
        {} if subject is None else {"shots": None if split is None else [split.low, split.high]}
    )
    calls = _calls(session, data, settings, subject)
    figures = {}
    for name in settings.names:
        given, call = calls[name]
        for title, row in call().items():
            print_table(session.console, title, row)
            keep(session.file, {"protocol": title, **about, "settings": given, "skipped": session.bad.reasons}, row)
            figures[title] = {kind: judged.figures for kind, judged in row.items()}
    _explain(session.console, settings.names, images, about.get("shots"))
    if subject is not None and (warning := in_training(subject)):
        session.console.print(warning, highlight=False, markup=False)
    total = 0 if subject is None else len(subject.bank) + len(subject.queries)
    _farewell(session, total, time.monotonic() - began)
    return figures


def _farewell(session: Session, total: int, seconds: float) -> None:
    """What could not be read, where the figures are, and what to do with them."""
    console = session.console
    if len(session.bad):
        console.print(session.bad.summary(total), highlight=False, markup=False)
    console.print(f"{seconds:.1f} s; written to {session.file}", highlight=False, markup=False)
    if session.folder is not None:
        run = shlex.quote(str(session.folder))
        say(console, f"next: crosslevel compare {run} OTHER-RUN, or crosslevel export {run}")


def _calls(session: Session, data: Data, settings: Settings, subject: Subject | None) -> Calls:
    """Each protocol's settings, for the record, and what runs it."""
    how, place = settings.detection, session.runtime
    calls: Calls = {
        "detection": (
            asdict(how),
            lambda: _detection(
                session.encoder, data.images, data.test, how, place.hardware, session.seed, place.workers, session.kept,
                session.bad, session.console,
            ),
        )
    }  # fmt: skip
    if subject is None:
        return calls
    k = settings.k or neighbours(len(subject.bank))
    temperature, clusters = settings.temperature, settings.clusters
    linear, semi, transfer = settings.linear, settings.semi, settings.transfer
    both = {"fine_tuned": asdict(transfer), "linear": asdict(linear)}
    return calls | {
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
            raise UserError(f"protocol={name!r} is unknown: {hint}")
    return sorted(set(names), key=names.index)
