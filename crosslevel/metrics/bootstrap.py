"""How far a figure would move with other test images."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def intervals(
    correct: Bool[Tensor, " N"] | Float[Tensor, " N"],
    groups: Int64[Tensor, " N"] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """A percentile interval, by bootstrap over the test images (Efron 1979), of a mean, in percent.

    Args:
        correct: of each test image, whether (or how far, in [0, 1]) it is right.
        groups: with them the mean is that of the groups' means: balanced accuracy, where they are the classes.
            A group that a resample misses takes no part in that resample.
        level: the share of resamples inside the interval.
        resamples: how many sets of N images are drawn with repetition.
        generator: draws them.

    Raises:
        ValueError: no images, or a level outside (0, 1).

    """
    if not len(correct) or not 0 < level < 1:
        raise ValueError(f"{len(correct)} images, level={level}: give at least one image, and a level in (0, 1)")
    value = correct.double()
    owner = torch.zeros(len(value), dtype=torch.long) if groups is None else groups.unique(return_inverse=True)[1]
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(value), (len(value),), generator=generator)
        count = torch.bincount(owner[drawn]).double()
        total = torch.bincount(owner[drawn], weights=value[drawn])
        means.append((total[count > 0] / count[count > 0]).mean())
    tail = (1 - level) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return 100 * low, 100 * high
