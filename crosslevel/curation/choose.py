"""Choose n of N features: balanced over regions, typical of them, diverse, or so that every feature has one near it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor

from crosslevel.metrics.nearest import nearest
from crosslevel.utils.rng import seeded

Strategy = Literal["balanced", "typical", "diverse", "covering", "random"]

FEW = 20_000  # up to this many features, each step of k-means uses all of them
CLUSTERS, A_LEVEL, TOP = 4096, 8, 8  # most at the lowest level; per cluster of the next; fewest at the top
RESAMPLED = 2  # times that k-means is repeated on the same number from each cluster (Vo et al. 2024, sec. 3.3)
REGIONS, CLOSE, SCATTERED = 500, 20, 5  # of `typical`: most clusters, neighbours, sizes left out (Hacohen et al. 2022)
COVERED = 4096  # features that are to have a chosen one near


def choose(features: Float[Tensor, "N D"], n: int, how: Strategy = "balanced", seed: int = 0) -> Int64[Tensor, " n"]:
    """``n`` of the features, in the order that they were chosen.

    - balanced: hierarchical k-means, and the same share from each branch (Vo et al. 2024, arXiv 2405.15613).
    - typical: from each of n clusters, largest first, the image in its densest part (TypiClust, Hacohen et al. 2022,
      arXiv 2202.02794): made for a few labels a class.
    - diverse: farthest-first, each time the image that is least like those chosen before (Gonzalez 1985).
    - covering: facility location, such that every feature has a chosen one near (greedy on random candidates,
      Mirzasoleiman et al. 2015).
    - random.

    Args:
        features: of any length; their directions count, once the mean of all directions is taken away.
        n: how many; all where there are no more.
        how: one of these strategies.
        seed: of the random numbers.

    """
    generator, unit = seeded(seed), F.normalize(features, dim=1)
    if n >= len(unit):
        return torch.arange(len(unit))
    middle = int((unit @ unit.mean(0)).argmax())
    # What all features have in common says nothing, and behind a ReLU it is most of each: it is taken away.
    unit = F.normalize(unit - unit.mean(0), dim=1)
    strategies: dict[str, Callable[[], Tensor]] = {
        "balanced": lambda: balanced(unit, n, generator),
        "typical": lambda: typical(unit, n, generator),
        "diverse": lambda: farthest_first(unit, n, middle),
        "covering": lambda: facility_location(unit, n, generator),
        "random": lambda: torch.randperm(len(unit), generator=generator)[:n],
    }
    return strategies[how]()


def farthest_first(unit: Float[Tensor, "N D"], n: int, first: int | None = None) -> Int64[Tensor, " n"]:
    """Start with ``first``, or the feature nearest the mean, then add the one farthest from all those chosen."""
    indices = [int((unit @ unit.mean(0)).argmax()) if first is None else first]
    nearest = unit @ unit[indices[0]]
    while len(indices) < n:
        nearest[indices[-1]] = math.inf
        indices.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[indices[-1]])
        nearest[indices] = math.inf
    return torch.tensor(indices)


def facility_location(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Choose n features that maximize the sum, over all features, of the cosine to the nearest chosen one.

    Stochastic greedy: each step adds the best of N / n * ln(100) random candidates. Where there are more than
    `COVERED` features, the sum is over that many random ones.
    """
    covered = unit[torch.randperm(len(unit), generator=generator)[:COVERED]]
    best, available = torch.full((len(covered),), -1.0), torch.ones(len(unit), dtype=torch.bool)
    candidate_count, indices = math.ceil(len(unit) / n * math.log(100)), []
    for _ in range(n):
        candidates = available.nonzero().flatten()
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[:candidate_count]]
        gain = [((part @ covered.T) - best).clamp(min=0).sum(1) for part in unit[candidates].split(1024)]
        row = int(candidates[torch.cat(gain).argmax()])
        best, available[row] = torch.maximum(best, covered @ unit[row]), False
        indices.append(row)
    return torch.tensor(indices)


def typical(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator, most: int = REGIONS) -> Int64[Tensor, " n"]:
    """The most typical feature of each of n clusters, at most ``most``; then their next typical ones, in turns.

    Typicality is one over the mean distance to the 20 nearest features of the cluster (Hacohen et al. 2022, eq. 1).
    The largest clusters come first; those of fewer than 5 features come after all others.
    """
    owner = torch.from_numpy(_kmeans(unit, min(n, most), generator).predict(unit.numpy())).long()
    sizes = owner.bincount()
    clusters = [c for c in sizes.argsort(descending=True, stable=True).tolist() if sizes[c]]
    ordered = {}
    for cluster in clusters:
        rows = (owner == cluster).nonzero().flatten()
        near = nearest(unit[rows], unit[rows], min(CLOSE + 1, len(rows))).values[:, 1:]
        distance = (2 - 2 * near).clamp(min=0).sqrt().mean(1) if len(rows) > 1 else torch.zeros(1)
        ordered[cluster] = rows[distance.argsort(stable=True)].tolist()
    large = [c for c in clusters if sizes[c] >= SCATTERED]
    small = [c for c in clusters if sizes[c] < SCATTERED]
    rows = [row for group in (large, small) for turn in zip_longest(*(ordered[c] for c in group)) for row in turn]
    return torch.tensor([row for row in rows if row is not None][:n])


def balanced(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Sample evenly from each branch of a hierarchy of clusters, from its top down to single features."""
    levels = hierarchy(unit, n, generator)
    owner = levels[0]
    for above in levels[1:]:
        owner = above[owner]
    shares = even_shares(owner.bincount(minlength=int(owner.max()) + 1), n)
    return _sampled(unit, levels, torch.arange(len(unit)), owner, shares, len(levels) - 1, generator)


def hierarchy(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> list[Int64[Tensor, " k"]]:
    """Cluster the features, then the clusters' centres, and so on; return the cluster of each point for each level.

    The lowest level has at least twice as many clusters as features to choose, if there are enough features.
    """
    lowest = min(CLUSTERS, max(len(unit) // A_LEVEL, min(2 * n, len(unit) // 2)), len(unit))
    points, levels, count = unit, [], max(1, lowest)
    while True:
        owner, centres = _clustered(points, count, generator)
        levels.append(owner)
        points, count = centres, len(centres) // A_LEVEL
        if count < TOP:
            return levels


def even_shares(sizes: Int64[Tensor, " k"], n: int) -> Int64[Tensor, " k"]:
    """``n`` divided as evenly as the sizes allow: no share exceeds its size; the larger ones get the remainder."""
    shares = torch.zeros_like(sizes)
    n = min(n, int(sizes.sum()))
    while n:
        open_ = (shares < sizes).nonzero().flatten()
        each = n // len(open_)
        if not each:
            largest = (sizes - shares)[open_].argsort(descending=True, stable=True)[:n]
            shares[open_[largest]] += 1
            break
        granted = torch.minimum(sizes[open_] - shares[open_], torch.tensor(each))
        shares[open_] += granted
        n -= int(granted.sum())
    return shares


def _sampled(
    unit: Float[Tensor, "N D"],
    levels: list[Int64[Tensor, " k"]],
    rows: Int64[Tensor, " M"],
    owner: Int64[Tensor, " M"],
    shares: Int64[Tensor, " k"],
    level: int,
    generator: torch.Generator,
) -> Int64[Tensor, " n"]:
    """Draw ``shares[c]`` of the rows of each cluster c of ``level``; ``owner[i]`` is the cluster of ``rows[i]``."""
    samples = []
    for cluster in shares.nonzero().flatten().tolist():
        cluster_rows = rows[owner == cluster]
        if level == 0:
            samples.append(_of_leaf(unit, cluster_rows, int(shares[cluster]), generator))
            continue
        children = levels[0][cluster_rows]
        for deeper in levels[1:level]:
            children = deeper[children]
        child_shares = even_shares(children.bincount(minlength=int(children.max()) + 1), int(shares[cluster]))
        samples.append(_sampled(unit, levels, cluster_rows, children, child_shares, level - 1, generator))
    return torch.cat(samples)


def _of_leaf(
    unit: Float[Tensor, "N D"], cluster_rows: Int64[Tensor, " M"], n: int, generator: torch.Generator
) -> Int64[Tensor, " n"]:
    """The feature in the middle of a lowest cluster, and random others of it."""
    middle = int((unit[cluster_rows] @ unit[cluster_rows].mean(0)).argmax())
    remaining = torch.cat([cluster_rows[:middle], cluster_rows[middle + 1 :]])
    sampled = remaining[torch.randperm(len(remaining), generator=generator)[: n - 1]]
    return torch.cat([cluster_rows[middle : middle + 1], sampled])


def _clustered(
    points: Float[Tensor, "N D"], count: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " N"], Float[Tensor, "k D"]]:
    """K-means, repeated on as many points from each cluster: clusters follow the support, and not the density."""
    sample, x = points, points.numpy()
    kmeans = _kmeans(sample, count, generator)
    for _ in range(RESAMPLED):
        owner = torch.from_numpy(kmeans.predict(x)).long()
        each = max(1, len(points) // (2 * count))
        sample = torch.cat(
            [
                _closest(points, torch.from_numpy(kmeans.cluster_centers_), owner, c, each)
                for c in owner.unique().tolist()
            ]
        )
        if len(sample) <= count:
            break
        kmeans = _kmeans(sample, count, generator)
    owner = torch.from_numpy(kmeans.predict(x)).long()
    used, owner = owner.unique(return_inverse=True)
    return owner, F.normalize(torch.from_numpy(kmeans.cluster_centers_)[used].float(), dim=1)


def _closest(
    points: Float[Tensor, "N D"], centres: Float[Tensor, "k D"], owner: Int64[Tensor, " N"], cluster: int, each: int
) -> Float[Tensor, "m D"]:
    cluster_points = points[owner == cluster]
    return cluster_points[(cluster_points - centres[cluster].float()).square().sum(1).argsort(stable=True)[:each]]


def _kmeans(points: Float[Tensor, "N D"], count: int, generator: torch.Generator) -> KMeans | MiniBatchKMeans:
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    count = min(count, len(np.unique(points.numpy(), axis=0))) if len(points) <= FEW else count
    if len(points) <= FEW:
        return KMeans(count, n_init=1, max_iter=20, random_state=seed).fit(points.numpy())
    return MiniBatchKMeans(count, n_init=1, batch_size=max(4096, 3 * count), random_state=seed).fit(points.numpy())
