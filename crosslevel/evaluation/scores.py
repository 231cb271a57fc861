"""The result of a protocol for one kind of features: figures, and how much each would vary with other test images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.metrics.bootstrap import accuracy_intervals
from crosslevel.metrics.shots import Shots, accuracies, split_by_frequency
from crosslevel.utils.rng import seeded

Intervals = dict[str, tuple[float, float]]


class Scores(NamedTuple):
    """Figures in percent by name, their 95 % intervals if they have one, and the chosen hyperparameters."""

    figures: dict[str, float]
    intervals: Intervals | None = None
    hyperparameters: dict[str, float] | None = None


class Truth(NamedTuple):
    """Test labels in the training set's numbering, training frequencies, and the shot split."""

    test: Int64[Tensor, " Q"]
    counts: Int64[Tensor, " C"]
    shots: Shots | None

    def judge(
        self, scores: Float[Tensor, "Q C"], hyperparameters: dict[str, float] | None = None, seed: int = 0
    ) -> Scores:
        """Accuracies of a classifier's scores, and their intervals by bootstrap over the test images."""
        scores = scores.cpu()
        generator = seeded(seed)
        figures = accuracies(scores, self.test, self.counts, self.shots)
        return Scores(figures, accuracy_intervals(scores, self.test, self.shots, generator=generator), hyperparameters)


def truth(
    train: Int64[Tensor, " N"],
    classes: list[str],
    test: Int64[Tensor, " Q"],
    test_classes: list[str],
    shots: tuple[int, int] | None = None,
) -> Truth:
    """The truth about two labelled sets whose classes have the same names, but may be numbered differently.

    Args:
        train: labels of the training images.
        classes: their names.
        test: labels of the test images.
        test_classes: their names, each one of ``classes``.
        shots: limits of few- and many-shot classes.

    """
    index_of = {name: i for i, name in enumerate(classes)}
    renumbered = torch.tensor([index_of[name] for name in test_classes])
    counts = torch.bincount(train, minlength=len(classes))
    return Truth(renumbered[test], counts, split_by_frequency(counts, shots))
