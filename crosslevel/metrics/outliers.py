"""Features that are far from all others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslevel.metrics.nearest import Neighbours, nearest

NEIGHBOURS = 10
FENCE = 3.0  # interquartile ranges beyond the third quartile: Tukey's "far out" (1977)


class Outliers(NamedTuple):
    """The distance of each feature from its nearest ones, and the features that are unusually far.

    ``distance`` is the mean over the `NEIGHBOURS` nearest of 1 minus the cosine; ``far`` marks those beyond the fence.
    """

    distance: Float[Tensor, " N"]
    far: Bool[Tensor, " N"]


def outliers(features: Float[Tensor, "N D"], neighbours: int = NEIGHBOURS, known: Neighbours | None = None) -> Outliers:
    """Features far from all others: beyond Tukey's outer fence, in the logarithm of the distance.

    The logarithm is used because distances to neighbours spread over orders of magnitude, and only long ones count.
    Equal features have no such distance, and are left out of the quartiles.

    Args:
        features: of any length; their directions count.
        neighbours: the number of nearest features; all others if there are fewer.
        known: each feature's nearest ones, itself first, if they were computed before.

    """
    if len(features) < 3:
        return Outliers(torch.zeros(len(features)), torch.zeros(len(features), dtype=torch.bool))
    k = min(neighbours, len(features) - 1)
    nearest_ones = known if known is not None else nearest(features, features, k + 1)
    values = nearest_ones.values[:, 1 : k + 1].float()  # without itself
    distance = (1 - values).clamp(min=0).mean(1)
    logarithm = distance.clamp(min=1e-7).log()
    varied = logarithm[distance > 1e-6]
    if len(varied) < 4:
        return Outliers(distance, torch.zeros(len(distance), dtype=torch.bool))
    low, high = _quartiles(varied)
    return Outliers(distance, logarithm > high + FENCE * (high - low))


def _quartiles(values: Float[Tensor, " N"]) -> tuple[float, float]:
    """The first and the third quartile; torch.quantile takes no more than 16 million numbers."""
    ordered = values.sort().values
    return float(ordered[len(ordered) // 4]), float(ordered[(3 * len(ordered)) // 4])
