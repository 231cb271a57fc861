"""Percentile intervals by bootstrap (Efron 1979): how much a figure would vary with other test images.

Ours, since `scipy.stats.bootstrap` takes one statistic a call: here all figures of a table have the same resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from crosslevel.metrics.shots import Shots
from crosslevel.utils.errors import UserError

_DRAWS = 2**23  # images drawn at a time


def intervals(
    correct: Bool[Tensor, " N"] | Float[Tensor, " N"],
    groups: Int64[Tensor, " N"] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
    at_once: int = _DRAWS,
) -> tuple[float, float]:
    """The interval of a mean, in percent.

    Args:
        correct: for each test image, whether (or to which degree, in [0, 1]) it is right.
        groups: if given, the mean is that of the groups' means: balanced accuracy, if the groups are the classes. A
            group that a resample misses is left out of that resample.
        level: the share of resamples inside the interval.
        resamples: the number of sets of N images drawn with replacement.
        generator: draws the resamples.
        at_once: images drawn at a time.

    Raises:
        ValueError: no images, or a level outside (0, 1).

    """
    owner = torch.zeros(len(correct), dtype=torch.long) if groups is None else groups.unique(return_inverse=True)[1]
    resampled = _resampled([correct], owner, level, resamples, generator, at_once)
    means = [_mean(sums[0], counts) for counts, sums in resampled]
    return _percentiles(torch.cat(means), level)


def accuracy_intervals(
    scores: Float[Tensor, "N C"],
    labels: Int64[Tensor, " N"],
    shots: Shots | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[float, float]]:
    """The intervals of `accuracies`, in percent, all from the same resamples.

    Args:
        scores: the higher, the likelier.
        labels: the truth, in [0, C).
        shots: the split of the classes; a part without test images has no interval.
        level: the share of resamples inside the interval.
        resamples: the number of sets of N images drawn with replacement.
        generator: draws the resamples.

    Raises:
        ValueError: no images, or a level outside (0, 1).

    """
    first = scores.argmax(1) == labels
    several = scores.shape[1] > 5
    fifth = (scores.topk(5, dim=1).indices == labels.unsqueeze(1)).any(1) if several else first
    tested, owner = labels.unique(return_inverse=True)
    splits = {name: torch.isin(tested, getattr(shots, name)) for name in ("many", "medium", "few") if shots}
    means: dict[str, list[Tensor]] = {}
    for counts, (hits, hits5) in _resampled([first, fifth], owner, level, resamples, generator):
        figures = {"top1": hits.sum(1) / len(labels), "balanced": _mean(hits, counts)}
        if several:
            figures["top5"] = hits5.sum(1) / len(labels)
        for name, mask in splits.items():
            if mask.any():
                figures[name] = _mean(hits[:, mask], counts[:, mask])
        for name, mean in figures.items():
            means.setdefault(name, []).append(mean)
    return {name: _percentiles(torch.cat(chunks), level) for name, chunks in means.items()}


def _resampled(
    values: list[Tensor],
    owner: Int64[Tensor, " N"],
    level: float,
    resamples: int,
    generator: torch.Generator | None,
    at_once: int = _DRAWS,
) -> Iterator[tuple[Float[Tensor, "R G"], list[Float[Tensor, "R G"]]]]:
    """Yield resamples in chunks: the number of images of each group, and the groups' sums of each of ``values``."""
    count = len(owner)
    if not count or not 0 < level < 1:
        raise UserError(f"{count} images, level={level}: give at least one image, and a level in (0, 1)")
    groups = int(owner.max()) + 1
    for part in torch.arange(resamples).split(max(1, at_once // count)):
        indices = torch.randint(count, (len(part), count), generator=generator)
        cell = (owner[indices] + groups * torch.arange(len(part)).unsqueeze(1)).view(-1)
        tables = [
            torch.bincount(cell, weights, minlength=len(part) * groups).view(len(part), groups).double()
            for weights in (None, *(v.double()[indices].view(-1) for v in values))
        ]
        yield tables[0], tables[1:]


def _mean(sums: Float[Tensor, "R G"], counts: Float[Tensor, "R G"]) -> Float[Tensor, " R"]:
    """The mean of the means of all present groups; NaN if there is none."""
    present = counts > 0
    return (sums / counts.clamp(min=1)).sum(1) / present.sum(1)


def _percentiles(means: Float[Tensor, " R"], level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = means.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return 100 * low, 100 * high
