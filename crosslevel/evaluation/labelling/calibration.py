"""Calibrated probabilities, and thresholds beyond which an image belongs to no known class."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BINS = 15  # of the calibration error (Guo et al. 2017)


def temperature(logits: Float[Tensor, "N C"], labels: Int64[Tensor, " N"]) -> float:
    """T of softmax(logits / T) with the least loss on images not used for training (Guo et al. 2017, sec. 4.2).

    The loss has one minimum in log T: golden-section search between 1/100 and 100.
    """

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits.double() / 10**log_t, labels))

    low, high, golden = -2.0, 2.0, (5**0.5 - 1) / 2
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(10 ** ((low + high) / 2))


def calibration_error(probabilities: Float[Tensor, "N C"], labels: Int64[Tensor, " N"]) -> float:
    """The expected calibration error: the mean difference between the highest probability and the accuracy."""
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return float(gaps.abs().sum() / len(labels))


class Limits(NamedTuple):
    """Limits for images of known classes: the largest ``distance`` and the lowest ``probability``."""

    distance: float
    probability: float

    def unknown(self, distance: Float[Tensor, " N"], probability: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Which images belong to no known class."""
        return (distance > self.distance) | (probability < self.probability)


def limits(distance: Float[Tensor, " N"], probability: Float[Tensor, " N"], rejected: float) -> Limits:
    """Limits that exclude the share ``rejected`` of held-out images, half of it by each of the two limits.

    Args:
        distance: of each to the nearest labelled images.
        probability: the highest probability of each.
        rejected: the share that the limits exclude; 0 excludes nothing.

    """
    if rejected <= 0:
        return Limits(float("inf"), 0.0)
    far, low = distance.double().sort().values, probability.double().sort().values
    beyond = min(len(far) - 1, int(rejected / 2 * len(far)))  # number of images beyond the limit
    return Limits(float(far[len(far) - 1 - beyond]), float(low[beyond]))
