"""Accuracies of a classifier, as long-tailed recognition reports them (Liu et al., CVPR 2019)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.utils.errors import UserError

CONVENTION = (20, 100)
"""A class with fewer training images than the first is few-shot; one with more than the second is many-shot."""


class Shots(NamedTuple):
    """Classes by how often they occur in training: ``few`` < ``low`` <= ``medium`` <= ``high`` < ``many``."""

    many: Int64[Tensor, " a"]
    medium: Int64[Tensor, " b"]
    few: Int64[Tensor, " c"]
    low: int
    high: int

    def describe(self) -> str:
        """The limits, for the user."""
        return describe_limits(self.low, self.high)


def describe_limits(low: int, high: int) -> str:
    """A description of the limits of few- and many-shot classes, for the user."""
    return f"many: over {high} training images, few: under {low}"


def split_by_frequency(counts: Int64[Tensor, " C"], limits: tuple[int, int] | None = None) -> Shots | None:
    """Classes as many-, medium- and few-shot.

    Without ``limits``, the convention's 20 and 100 are used if they make some classes few- and some many-shot;
    otherwise the limits are the thirds of the ranked classes. None if all classes are equally frequent, or if there are
    fewer than three.

    Args:
        counts: training images of each class.
        limits: few-shot below the first, many-shot above the second.

    Raises:
        ValueError: limits in the wrong order.

    """
    positive = counts[counts > 0]
    if limits is not None and limits[0] > limits[1]:
        raise UserError(f"shots={limits}: the first limit must not exceed the second")
    if limits is None:
        if len(positive) < 3 or int(positive.min()) == int(positive.max()):
            return None
        limits = CONVENTION
        if not (bool((positive < limits[0]).any()) and bool((positive > limits[1]).any())):
            ranked = positive.sort().values
            third = len(ranked) // 3
            limits = int(ranked[third]), int(ranked[-third - 1])
    low, high = limits
    present = counts > 0
    many, few = present & (counts > high), present & (counts < low)
    indices = [mask.nonzero()[:, 0] for mask in (many, present & ~many & ~few, few)]
    return Shots(indices[0], indices[1], indices[2], low, high)


def accuracies(
    scores: Float[Tensor, "Q C"],
    labels: Int64[Tensor, " Q"],
    counts: Int64[Tensor, " C"],
    shots: Shots | None,
) -> dict[str, float]:
    """Top-1, top-5, balanced, and many / medium / few-shot accuracy, all in percent.

    Balanced accuracy is the mean over the classes in the test set of each one's accuracy; a shot split's is the
    same mean over its classes. A split without test images is left out.

    Args:
        scores: the higher, the likelier.
        labels: the truth.
        counts: training images of each class.
        shots: `split_by_frequency`'s result.

    """
    classes = len(counts)
    scores, labels = scores.cpu(), labels.cpu()
    right = (scores.argmax(1) == labels).double()
    out = {"top1": right.mean()}
    if classes > 5:
        out["top5"] = (scores.topk(5, 1).indices == labels[:, None]).any(1).double().mean()
    images = labels.bincount(minlength=classes)
    tested, by_class = images > 0, labels.bincount(right, classes) / images
    out["balanced"] = by_class[tested].mean()
    if shots is not None:
        for name in ("many", "medium", "few"):
            indices = getattr(shots, name)
            indices = indices[tested[indices]]
            if len(indices):
                out[name] = by_class[indices].mean()
    return {name: 100 * float(value) for name, value in out.items()}
