"""``crosslevel evaluate``: evaluate a run's features, beside an untrained encoder and raw pixels."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation import protocols
from crosslevel.evaluation.detection import benchmark
from crosslevel.evaluation.detection.model import Sizes
from crosslevel.evaluation.finetune import FineTune, Semi
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.overlap import warn, warn_of_annotated
from crosslevel.evaluation.protocols import Row, Subject
from crosslevel.evaluation.results import keep, print_table
from crosslevel.evaluation.scores import Scores
from crosslevel.evaluation.session import Data, Session, session_of, subject_of
from crosslevel.features.extract import Runtime
from crosslevel.metrics.knn import neighbours
from crosslevel.metrics.shots import describe_limits
from crosslevel.utils.console import say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import UserError, did_you_mean
from crosslevel.utils.marks import verb

Calls = dict[str, tuple[dict[str, Any], Callable[[], dict[str, Row]]]]

PROTOCOLS = ("knn", "linear", "semi", "transfer", "detection", "retrieval", "clustering")


@dataclass(frozen=True)
class Detection:
    """How object detectors are fine-tuned (He et al. 2020, sec. 4.2).

    Args:
        images: annotated images to train on, in the layout of Pascal VOC or COCO; the command's own images unless
            given.
        test: annotated images to test on; likewise.
        kind: Faster R-CNN with the last stage as its box head (c4), or with a feature pyramid (fpn).
        iterations: steps, to which the paper's schedule for the data set's layout is scaled; its own length unless
            given.
        batch_size: images a step.
        rate: learning rate for 16 images a step; it is scaled in proportion for other batch sizes.
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
    """The protocols, and the settings of each."""

    names: list[str]
    k: int | None
    temperature: float
    shots: tuple[int, int] | None
    clusters: int | None
    linear: Linear
    semi: Semi
    transfer: FineTune
    detection: Detection

    def check(self, data: Data) -> None:
        """Refuse protocols that need more data than ``data`` has.

        Raises:
            UserError: there are no images to classify.

        """
        if data.test is None and not (self.names == ["detection"] and self.detection.test):
            raise UserError("--test is missing: name the labelled images to classify")


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
    """Evaluate the features of a run by one protocol or several, beside an untrained encoder and raw pixels.

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
        protocol: one of the protocols, or several joined by commas.
        k: knn: how many neighbours vote; 200 unless given, but at most a tenth of the images to learn from.
        temperature: knn: T; a neighbour's vote is exp(cosine / T).
        shots: few-shot classes have fewer training images than the first, many-shot ones more than the second; 20 and
            100 where that leaves none empty, thirds of the classes elsewhere.
        clusters: clustering: the number of clusters; as many as classes unless given.
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
        seed: of the untrained encoder's weights, and of all random numbers.
        cache: keep features and unfinished trainings in the run's folder, so that no later call computes them again.
        branches: evaluate the features of the instance and the group branch as well; published figures on CIFAR are
            those of the instance branch.
        output: the figures' JSON file; evaluation.json in the run's folder unless given.
        quiet: print nothing.
        beside: another run, or weights by name, such as timm:vit_small_patch14_dinov2.lvd142m, for a further row; may
            be given several times. A run that began with weights always has a row of the unchanged weights.

    Returns:
        for each protocol, the figures of each kind of features.

    Examples:
        >>> figures = crosslevel.evaluate("runs/photos", "labelled/train", test="labelled/test", protocol="knn")
        >>> accuracies = [row["trained encoder"]["top1"] for row in figures.values()]  # in percent

    """
    start_time = time.monotonic()
    data = Data(parse(images), None if test is None else parse(test), data_root, crops)
    settings = Settings(_names(protocol), k, temperature, shots, clusters, linear, semi, transfer, detection)
    settings.check(data)
    runtime = Runtime(choose(device, precision), workers, batch_size)
    session = session_of(run, beside or [], output, cache, runtime, seed, quiet)
    subject = subject_of(session, data, settings.names, branches, shots)
    say(session.console, f"device: {runtime.hardware.reason}")
    figures = _figures(session, data, settings, subject)
    _explain(session, data, settings, subject)
    _farewell(session, subject, time.monotonic() - start_time)
    return figures


def _figures(
    session: Session, data: Data, settings: Settings, subject: Subject | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Run one protocol after the other; each result is printed and saved as soon as it is ready."""
    metadata, calls = data.metadata(session.seed), _calls(session, data, settings, subject)
    if subject is not None:
        metadata["shots"] = None if subject.split is None else [subject.split.low, subject.split.high]
    figures = {}
    for name in settings.names:
        given_settings, call = calls[name]
        for title, row in call().items():
            print_table(session.console, title, row)
            keep(
                session.file,
                {"protocol": title, **metadata, "settings": given_settings, "skipped": session.bad_files.reasons},
                row,
            )
            figures[title] = {kind: scores.figures for kind, scores in row.items()}
    return figures


def _explain(session: Session, data: Data, settings: Settings, subject: Subject | None) -> None:
    """Print the notes that explain the tables."""
    console = session.console
    if subject is not None and subject.split is not None:
        console.print(describe_limits(subject.split.low, subject.split.high), highlight=False)
    if "transfer" in settings.names and protocols.convention(data.images.text) == "balanced":
        console.print("papers report this data set's mean per-class accuracy: the balanced column", highlight=False)
    if subject is not None:
        warn(console, subject)


def _farewell(session: Session, subject: Subject | None, seconds: float) -> None:
    """Print the unreadable files, where the figures are, and next steps."""
    console = session.console
    total = 0 if subject is None else len(subject.bank) + len(subject.queries)
    if len(session.bad_files):
        console.print(session.bad_files.summary(total), highlight=False, markup=False)
    console.print(f"{seconds:.1f} s; written to {session.file}", highlight=False, markup=False)
    if session.folder is not None:
        run = shlex.quote(str(session.folder))
        say(console, f"next: crosslevel compare {run} OTHER-RUN, or crosslevel export {run}")


def _calls(session: Session, data: Data, settings: Settings, subject: Subject | None) -> Calls:
    """Each protocol's settings, which are recorded, and the function that runs it."""
    calls: Calls = {"detection": (asdict(settings.detection), lambda: _detection(session, data, settings.detection))}
    if subject is None:
        return calls
    k = settings.k or neighbours(len(subject.bank))
    temperature, clusters = settings.temperature, settings.clusters
    linear, semi, transfer = settings.linear, settings.semi, settings.transfer
    configs = {"fine_tuned": asdict(transfer), "linear": asdict(linear)}
    return calls | {
        "knn": ({"k": k, "temperature": temperature}, lambda: protocols.knn(subject, k, temperature)),
        "linear": (asdict(linear), lambda: protocols.linear(subject, linear)),
        "semi": (asdict(semi), lambda: protocols.semi(subject, semi)),
        "transfer": (configs, lambda: protocols.transfer(subject, transfer, linear)),
        "retrieval": ({}, lambda: protocols.retrieval(subject)),
        "clustering": ({"clusters": clusters}, lambda: protocols.clustering(subject, clusters)),
    }


def _detection(session: Session, data: Data, config: Detection) -> dict[str, Row]:
    """Detectors from random and from trained weights, trained alike."""
    train_source, test_source = parse(config.images or data.images), parse(config.test or data.test or "")
    train, queries = annotated(train_source), annotated(test_source)
    plan = benchmark.published(train)
    schedule = plan.schedule._replace(batch_size=config.batch_size, rate=config.rate)
    if config.iterations is not None:
        schedule = schedule._replace(iterations=config.iterations)
    plan = plan._replace(schedule=schedule, kind=config.kind, batchnorm=config.batchnorm)
    if config.short_side is not None:
        plan = plan._replace(sizes=Sizes((config.short_side,), config.short_side, 2 * config.short_side))
    workers, folder = (
        session.runtime.workers,
        None if session.cache_dir is None else session.cache_dir / "probe" / "detection",
    )
    figures = benchmark.detection(
        session.encoder, train, queries, settings=plan, hardware=session.runtime.hardware, seed=session.seed,
        workers=4 if workers is None else workers, folder=folder, bad_files=session.bad_files, console=session.console,
    )  # fmt: skip
    warn_of_annotated(session.console, train, queries, workers)
    title = f"detection, {config.kind}, {plan.schedule.iterations:,} iterations"
    return {title: {name: Scores(row) for name, row in figures.items()}}


def _names(protocol: str) -> list[str]:
    names = [name.strip() for name in protocol.split(",")]
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"protocol={name!r} is unknown: {did_you_mean(name, PROTOCOLS)}")
    return sorted(set(names), key=names.index)
