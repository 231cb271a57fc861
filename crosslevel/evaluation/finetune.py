"""Classifiers trained on images: on the frozen encoder's views, or with the whole network fine-tuned."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from rich.console import Console
from torch import Tensor, nn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.subsets.select import of_each_class, take
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.supervised import Progress, Training, diverged, train_classifier, training_folder
from crosslevel.features.extract import Runtime, extract
from crosslevel.models.encoder import Encoder
from crosslevel.models.numerics import avoid_faults, glance, say_once
from crosslevel.models.schedules import SCHEDULES
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded


@dataclass(frozen=True)
class FineTune:
    """How a whole network is fine-tuned.

    Args:
        epochs: passes over the labelled images.
        batch_size: images a step.
        lr: learning rate of the encoder, whatever the batch size.
        lr_classifier: rate of the new linear classifier.
        weight_decay: of both.
        schedule: both rates fall along a cosine, or tenfold after 60 % and 80 % of the epochs.

    Raises:
        ValueError: a number out of its range.

    """

    epochs: int = 20
    batch_size: int = 256
    lr: float = 0.01
    lr_classifier: float = 0.2
    weight_decay: float = 0.0
    schedule: str = "step"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.schedule not in SCHEDULES:
            raise UserError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, schedule={self.schedule!r}: give 1 epoch "
                f"of 2 images at least, and one of {', '.join(SCHEDULES)}"
            )


@dataclass(frozen=True)
class Semi(FineTune):
    """Semi-supervised: fine-tuning with few labels (Wang et al. 2021, sec. 4; He et al. 2020, as the field does it).

    The rates are SwAV's for 10 % of ImageNet's labels (Caron et al. 2020); for 1 % it takes 0.02 and 5.

    Args:
        fractions: shares of the labels; each share is a separate training.
        list_file: text file that names the labelled images, such as ImageNet's lists of 1 % and 10 %, instead.
        epochs: passes over the labelled images.
        batch_size: images a step.
        lr: rate of the encoder.
        lr_classifier: rate of the new linear classifier.
        weight_decay: of both.
        schedule: both rates fall along a cosine, or tenfold after 60 % and 80 % of the epochs.

    Raises:
        ValueError: a number out of its range.

    """

    fractions: tuple[float, ...] = (0.01, 0.1)
    list_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fractions or not all(0 < share <= 1 for share in self.fractions):
            raise UserError(f"semi.fractions={self.fractions}: give shares above 0 and up to 1")


def fine_tuned(
    encoder: Encoder,
    images: Images,
    classes: int,
    queries: Images,
    config: FineTune,
    runtime: Runtime,
    bad_files: BadFiles,
    *,
    seed: int = 0,
    run_dir: Path | None = None,
    key: dict[str, Any] | None = None,
    progress: Progress | None = None,
    console: Console | None = None,
) -> tuple[Float[Tensor, "Q C"], Int64[Tensor, " Q"]]:
    """Logits of the queries after fine-tuning a copy of the encoder on labelled images, and their labels.

    Args:
        encoder: left as it is.
        images: labelled in [0, classes).
        classes: C.
        queries: to classify.
        config: epochs and rates.
        runtime: where it runs.
        bad_files: collects unreadable images.
        seed: of batches, views and the classifier.
        run_dir: the run's folder: a killed training continues there.
        key: all that the training depends on besides ``config`` and ``seed``: the encoder's and the images' identity.
        progress: called with the epochs done and their total.
        console: prints which layers are computed in float32, because this machine computes them wrong in lower
            precision.

    """
    device = runtime.hardware.device
    network = copy.deepcopy(encoder).to(device).to(memory_format=torch.channels_last).train().requires_grad_(True)
    wrong = avoid_faults(
        network, lambda: glance(network, encoder.view.size, channels=encoder.view.channels), runtime.hardware
    )
    say_once(console, wrong)
    classifier = new_classifier(encoder.num_features, classes, seed).to(device)
    # The images' identity says which of them are labelled, whatever the way they were chosen.
    hyperparameters = {name: value for name, value in asdict(config).items() if name in FineTune.__dataclass_fields__}
    folder = training_folder(run_dir, name="fine-tuned", how=hyperparameters, seed=seed, **(key or {}))
    training = Training(config.epochs, config.batch_size, config.schedule, config.weight_decay, seed, folder)
    groups = [
        {"params": list(network.parameters()), "lr": config.lr},
        {"params": list(classifier.parameters()), "lr": config.lr_classifier},
    ]
    modules = nn.ModuleList([network, classifier])
    train_classifier(
        lambda views: classifier(network(views).float()), groups, modules, images, encoder, training, runtime,
        bad_files, progress,
    )  # fmt: skip
    extracted = extract(
        network, queries, batch_size=runtime.batch_size, workers=runtime.workers, hardware=runtime.hardware,
        bad_files=bad_files,
    )  # fmt: skip
    with torch.no_grad():
        scores: Tensor = classifier.cpu()(extracted.features)
    if not bool(scores.isfinite().all()):
        # The last step's loss is that of the weights before it.
        raise diverged(config.epochs, [config.lr, config.lr_classifier])
    return scores, extracted.labels


def on_views(
    encoder: Encoder,
    images: Images,
    classes: int,
    config: Linear,
    runtime: Runtime,
    bad_files: BadFiles,
    *,
    seed: int = 0,
    run_dir: Path | None = None,
    key: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> nn.Linear:
    """A linear classifier trained on the frozen encoder's features of random crops and flips.

    The arguments are those of `fine_tuned`; the encoder stays in evaluation mode, so its batch statistics do not move.
    """
    device = runtime.hardware.device
    network = copy.deepcopy(encoder).to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    classifier = new_classifier(encoder.num_features, classes, seed).to(device)
    settings = replace(config, lrs=(1.0,), weight_decays=(0.0,))  # not used here
    folder = training_folder(run_dir, name="linear", how=asdict(settings), seed=seed, **(key or {}))
    training = Training(config.epochs, config.batch_size, config.schedule, config.weight_decay, seed, folder)

    def logits(views: Tensor) -> Tensor:
        with torch.no_grad():
            features = network(views)
        scores: Tensor = classifier(features.float())
        return scores

    groups = [{"params": list(classifier.parameters()), "lr": config.lr}]
    train_classifier(
        logits, groups, nn.ModuleList([classifier]), images, encoder, training, runtime, bad_files, progress
    )
    return classifier.cpu()


def new_classifier(features: int, classes: int, seed: int) -> nn.Linear:
    """MoCo's start: weights of deviation 0.01, bias 0 (He et al. 2020, the authors' code)."""
    classifier = nn.Linear(features, classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=seeded(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def labelled_share(labels: Int64[Tensor, " N"], fraction: float, generator: torch.Generator) -> Int64[Tensor, " M"]:
    """Indices of ``fraction`` of each class, drawn at random; at least one image of a class.

    Args:
        labels: of all images.
        fraction: share of each class, in (0, 1].
        generator: draws the images.

    """
    counts = [max(1, round(fraction * n)) for n in labels.bincount().tolist()]
    return of_each_class(labels, torch.tensor(counts), generator)


def listed(images: Images, file: str) -> Int64[Tensor, " M"]:
    """Indices of the images that a text file names, one a line: by their path, or their file name alone.

    Raises:
        ValueError: the file cannot be read, names an image that is not there, or one that several have.

    """
    try:
        text = Path(file).read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"semi.list_file={file}: {error.strerror or error}") from error
    index_of: dict[str, int] = {}
    for i, path in enumerate(images.paths):
        name = path.rpartition("/")[2]
        index_of[name] = -1 if name in index_of else i
    index_of |= {path: i for i, path in enumerate(images.paths)}
    # A label may follow the path, as in some lists; a path may have spaces.
    entries = [line.strip() for line in text.split("\n") if line.strip()]
    lines = [line if line in index_of else line.split()[0] for line in entries]
    missing = [line for line in lines if index_of.get(line, -1) < 0]
    if missing or not lines:
        problem = f"{len(missing)} of its {len(lines)} lines, {missing[0]} first, name" if missing else "it names"
        raise UserError(f"semi.list_file={file}: {problem} no image of {images.name} (or several)")
    return torch.tensor(sorted({index_of[line] for line in lines}))


def few_labels(images: Images, config: Semi, seed: int) -> dict[str, Images]:
    """The labelled part of ``images``, or one part for each fraction, by its name in the table.

    Raises:
        ValueError: fewer labels than classes.

    """
    assert images.labels is not None
    classes = len(images.classes or [])
    if config.list_file is not None:
        subsets = {f"labels of {Path(config.list_file).name}": listed(images, config.list_file)}
    else:
        subsets = {
            f"{100 * fraction:.10g} % of labels": labelled_share(images.labels, fraction, seeded(seed))
            for fraction in config.fractions
        }
    for name, index in subsets.items():
        if len(index) < classes:
            raise UserError(f"{name}: {len(index)} labelled images for {classes} classes: give more labels")
    return {name: take(images, index) for name, index in subsets.items()}
