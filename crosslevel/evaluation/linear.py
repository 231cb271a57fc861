"""Linear classifiers on frozen features, the field's first measure of a representation (Zhang et al., ECCV 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslevel.data.subsets.select import of_each_class
from crosslevel.models.schedules import SCHEDULES, half_cosine
from crosslevel.utils.errors import UserError

MOMENTUM = 0.9


@dataclass(frozen=True)
class Linear:
    """How linear classifiers are trained.

    Args:
        epochs: passes over the features, or with ``augmented`` over the images.
        batch_size: features a step.
        lrs: learning rates to choose from, for features of unit variance.
        weight_decays: strengths of the penalty to choose from.
        held_out: share of each class's training images that is held out to choose the settings.
        augmented: the classic protocol, without a choice of settings: one classifier on the encoder's features of
            random crops and flips, trained by SGD as in MoCo (He et al. 2020, sec. 4.1).
        lr: its learning rate; 30 suits features like MoCo's.
        weight_decay: its penalty.
        schedule: its rate falls along a cosine, or tenfold after 60 % and 80 % of the epochs.

    Raises:
        ValueError: a number out of its range.

    """

    epochs: int = 100
    batch_size: int = 256
    lrs: tuple[float, ...] = (0.003, 0.03, 0.3)
    weight_decays: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    held_out: float = 0.1
    augmented: bool = False
    lr: float = 30.0
    weight_decay: float = 0.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.held_out < 1:
            raise UserError(
                f"linear.epochs={self.epochs}, batch_size={self.batch_size}, held_out={self.held_out}: "
                "at least 1 each, and a share between 0 and 1"
            )
        if not self.lrs or not self.weight_decays or min(self.lrs) <= 0 or min(self.weight_decays) < 0:
            raise UserError(
                f"linear.lrs={self.lrs}, weight_decays={self.weight_decays}: give one positive rate at least"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"linear.schedule={self.schedule!r}: take one of {', '.join(SCHEDULES)}")


class Sweep(NamedTuple):
    """Linear classifiers, one a setting, and the mean and deviation that features are standardized by."""

    weight: Float[Tensor, "D S C"]
    bias: Float[Tensor, "S C"]
    mean: Float[Tensor, " D"]
    deviation: Float[Tensor, " D"]

    def scores(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N S C"]:
        """Logits of every classifier."""
        x = (features.to(self.weight) - self.mean) / self.deviation
        return (x @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias


class BestClassifier(NamedTuple):
    """The classifier with the setting that was best on a held-out part, trained on the whole training set."""

    classifier: Sweep
    lr: float
    weight_decay: float
    held_out_accuracy: float


def train_sweep(
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"],
    classes: int,
    settings: list[tuple[float, float]],
    *,
    epochs: int = 100,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Train softmax regression with several settings at once, on the features' device.

    All settings see the same batches: their classifiers are the columns of one matrix, so that a step is two matrix
    products however many there are. SGD with Nesterov momentum 0.9 from zero weights, the rate along a cosine to 0.

    Args:
        features: standardized here, so that one range of rates fits all encoders.
        labels: in [0, classes).
        classes: C.
        settings: rate and weight decay (of the weights, not the bias) of each classifier.
        epochs: passes over the features.
        batch_size: features a step.
        generator: a CPU generator that shuffles them.
        progress: called with the epochs done and their total.

    """
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    x = (features - mean) / deviation
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    weight = torch.zeros(x.shape[1], len(settings) * classes, **options)
    bias = torch.zeros(len(settings) * classes, **options)
    # One entry a column, so that a step needs no loop over settings.
    rate, decay = (torch.tensor(v, **options).repeat_interleave(classes) for v in zip(*settings, strict=True))
    speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, len(x))
    steps, step = epochs * (len(x) // batch_size), 0
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for index in order.split(batch_size)[: len(x) // batch_size]:
            part = x[index]
            error = torch.addmm(bias, part, weight).view(batch_size, len(settings), classes).softmax(2)
            error.scatter_add_(2, labels[index].view(-1, 1, 1).expand(-1, len(settings), 1), -torch.ones_like(error))
            error = error.view(batch_size, -1)
            now = rate * half_cosine(step / steps)
            _descend(weight, torch.addmm(decay * weight, part.T, error, alpha=1 / batch_size), speed, now)
            _descend(bias, error.mean(0), bias_speed, now)
            step += 1
        if progress is not None:
            progress(epoch + 1, epochs)
    return Sweep(weight.view(-1, len(settings), classes), bias.view(-1, classes), mean, deviation)


def _descend(value: Tensor, gradient: Tensor, speed: Tensor, rate: Tensor) -> None:
    """One step of SGD with Nesterov momentum, as PyTorch's."""
    speed.mul_(MOMENTUM).add_(gradient)
    value.addcmul_(rate.expand_as(value), gradient.add_(speed, alpha=MOMENTUM), value=-1)


def choose(
    features: Float[Tensor, "N D"],
    labels: Int64[Tensor, " N"],
    classes: int,
    config: Linear,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
    tracks: Int64[Tensor, " N"] | None = None,
) -> BestClassifier:
    """Find the best pair of rate and weight decay on a held-out part, then train with it on all images.

    Among equally accurate settings, the one with the lower loss is taken. Test images are not used. Whole ``tracks``
    are held out where they are given, or single images where there are too few tracks for that.

    Raises:
        ValueError: so few images that none can be held out.

    """
    settings = [(lr, decay) for lr in config.lrs for decay in config.weight_decays]
    validation = held_out(labels, config.held_out, generator, tracks)
    if tracks is not None and not validation.any():
        validation = held_out(labels, config.held_out, generator)
    if validation.all() or not validation.any():
        raise UserError(f"{len(labels)} labelled images are too few to hold out {config.held_out:.0%} of each class")
    shared: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size, "generator": generator}
    sweep = train_sweep(features[~validation], labels[~validation], classes, settings, progress=progress, **shared)
    truth = labels[validation].to(features.device)
    accuracy, loss = [], []
    for part in sweep.scores(features[validation]).unbind(1):
        accuracy.append(float((part.argmax(1) == truth).double().mean()))
        loss.append(float(F.cross_entropy(part, truth)))
    best = max(range(len(settings)), key=lambda s: (accuracy[s], -loss[s]))
    fitted = train_sweep(features, labels, classes, [settings[best]], **shared)
    return BestClassifier(fitted, *settings[best], accuracy[best])


def held_out(
    labels: Int64[Tensor, " N"],
    share: float,
    generator: torch.Generator,
    tracks: Int64[Tensor, " N"] | None = None,
) -> Bool[Tensor, " N"]:
    """A mask of ``share`` of each class, drawn at random: at least one image of a class of two or more.

    With ``tracks`` (the same number for images of one film, one object or one set of near-duplicates) whole tracks are
    held out: at least one, and never all, of a class of two tracks or more; a class of one track is not held out.
    """
    counts = labels.bincount()
    if tracks is not None:
        owner = tracks.unique(return_inverse=True)[1]
        return _whole_tracks(labels.cpu(), owner.cpu(), (share * counts).round().clamp(min=1).tolist(), generator)[
            owner
        ]
    held_out_counts = [0 if n < 2 else max(1, round(share * n)) for n in counts.tolist()]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[of_each_class(labels.cpu(), torch.tensor(held_out_counts), generator)] = True
    return mask


def _whole_tracks(
    labels: Int64[Tensor, " N"], owner: Int64[Tensor, " N"], goals: list[float], generator: torch.Generator
) -> Bool[Tensor, " T"]:
    """Which of T tracks are held out: in random order those that fit into the ``goals`` of their classes.

    Of a class in which none fits, the smallest is.
    """
    cells, counts = torch.stack([owner, labels]).unique(dim=1, return_counts=True)
    images_of: list[dict[int, int]] = [{} for _ in range(int(owner.max()) + 1)]  # of each track, by class
    for (track, c), count in zip(cells.T.tolist(), counts.tolist(), strict=True):
        images_of[track][c] = count
    training = cells[1].bincount(minlength=len(goals)).tolist()  # tracks of each class that train
    free, mask = list(goals), torch.zeros(len(images_of), dtype=torch.bool)

    def hold(track: int) -> None:
        mask[track] = True
        for c, count in images_of[track].items():
            training[c] -= 1
            free[c] -= count

    order = torch.randperm(len(images_of), generator=generator).tolist()
    for track in order:
        if all(training[c] > 1 and count <= free[c] for c, count in images_of[track].items()):
            hold(track)
    for c, goal in enumerate(goals):
        if free[c] == goal:
            able = [t for t in order if c in images_of[t] and all(training[other] > 1 for other in images_of[t])]
            if able:
                hold(min(able, key=lambda track: sum(images_of[track].values())))
    return mask
