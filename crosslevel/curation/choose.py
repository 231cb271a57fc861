"""Choose n of N features: balanced over regions, as diverse as possible, or so that every feature has one near it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor

from crosslevel.utils.rng import seeded

How = Literal["balanced", "diverse", "covering", "random"]

FEW = 20_000  # features whose k-means takes all of them in every step
CLUSTERS, A_LEVEL, TOP = 4096, 8, 8  # the most; how many of one level to one of the next; the fewest at the top
RESAMPLED = 2  # times that k-means is repeated on the same number from each cluster (Vo et al. 2024, sec. 3.3)
COVERED = 4096  # features that are to have a chosen one near


def choose(features: Float[Tensor, "N D"], n: int, how: How = "balanced", seed: int = 0) -> Int64[Tensor, " n"]:
    """``n`` of the features, in the order that they were chosen.

    - balanced: hierarchical k-means, and the same share from each branch (Vo et al. 2024, arXiv 2405.15613).
    - diverse: farthest-first, each the one least like all before (Gonzalez 1985).
    - covering: facility location, such that every feature has a chosen one near (greedy on random candidates,
      Mirzasoleiman et al. 2015).
    - random.

    Args:
        features: of any length; their directions count.
        n: how many; all where there are no more.
        how: which of these.
        seed: of all draws.

    """
    unit, generator = F.normalize(features, dim=1), seeded(seed)
    if n >= len(unit):
        return torch.arange(len(unit))
    made: dict[str, Callable[[], Tensor]] = {
        "balanced": lambda: balanced(unit, n, generator),
        "diverse": lambda: farthest_first(unit, n),
        "covering": lambda: facility_location(unit, n, generator),
        "random": lambda: torch.randperm(len(unit), generator=generator)[:n],
    }
    return made[how]()


def farthest_first(unit: Float[Tensor, "N D"], n: int) -> Int64[Tensor, " n"]:
    """Begin in the middle, and take again and again what is farthest from all that was taken."""
    chosen = [int((unit @ unit.mean(0)).argmax())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < n:
        nearest[chosen[-1]] = math.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
        nearest[chosen] = math.inf
    return torch.tensor(chosen)


def facility_location(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """Choose n features that maximize the sum, over all features, of the cosine to the nearest chosen one.

    Stochastic greedy: each step adds the best of N / n * ln(100) random candidates. Where there are more than
    `COVERED` features, the sum is over that many random ones.
    """
    asked = unit[torch.randperm(len(unit), generator=generator)[:COVERED]]
    best, left = torch.full((len(asked),), -1.0), torch.ones(len(unit), dtype=torch.bool)
    candidates, chosen = math.ceil(len(unit) / n * math.log(100)), []
    for _ in range(n):
        some = left.nonzero().flatten()
        some = some[torch.randperm(len(some), generator=generator)[:candidates]]
        gain = [((part @ asked.T) - best).clamp(min=0).sum(1) for part in unit[some].split(1024)]
        row = int(some[torch.cat(gain).argmax()])
        best, left[row] = torch.maximum(best, asked @ unit[row]), False
        chosen.append(row)
    return torch.tensor(chosen)


def balanced(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """The same share of each branch of a hierarchy of clusters, from its top down to single features."""
    levels = hierarchy(unit, n, generator)
    owner = levels[0]
    for above in levels[1:]:
        owner = above[owner]
    shares = even_shares(owner.bincount(minlength=int(owner.max()) + 1), n)
    return _drawn(unit, levels, torch.arange(len(unit)), owner, shares, len(levels) - 1, generator)


def hierarchy(unit: Float[Tensor, "N D"], n: int, generator: torch.Generator) -> list[Int64[Tensor, " k"]]:
    """Clusters of features, clusters of these clusters' centres, and so on: of each level the cluster of each point.

    The lowest has at least twice as many clusters as are chosen, where there are so many features.
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
    """``n`` divided as evenly as the sizes allow: nobody gets more than it has; the larger ones get what is left."""
    shares = torch.zeros_like(sizes)
    n = min(n, int(sizes.sum()))
    while n:
        open_ = (shares < sizes).nonzero().flatten()
        each = n // len(open_)
        if not each:
            most = (sizes - shares)[open_].argsort(descending=True, stable=True)[:n]
            shares[open_[most]] += 1
            break
        given = torch.minimum(sizes[open_] - shares[open_], torch.tensor(each))
        shares[open_] += given
        n -= int(given.sum())
    return shares


def _drawn(
    unit: Float[Tensor, "N D"],
    levels: list[Int64[Tensor, " k"]],
    rows: Int64[Tensor, " M"],
    owner: Int64[Tensor, " M"],
    shares: Int64[Tensor, " k"],
    level: int,
    generator: torch.Generator,
) -> Int64[Tensor, " n"]:
    """Draw ``shares[c]`` of the rows of each cluster c of ``level``; ``owner[i]`` is the cluster of ``rows[i]``."""
    chosen = []
    for cluster in shares.nonzero().flatten().tolist():
        members = rows[owner == cluster]
        if level == 0:
            chosen.append(_of_leaf(unit, members, int(shares[cluster]), generator))
            continue
        below = levels[0][members]
        for deeper in levels[1:level]:
            below = deeper[below]
        parts = even_shares(below.bincount(minlength=int(below.max()) + 1), int(shares[cluster]))
        chosen.append(_drawn(unit, levels, members, below, parts, level - 1, generator))
    return torch.cat(chosen)


def _of_leaf(
    unit: Float[Tensor, "N D"], members: Int64[Tensor, " M"], n: int, generator: torch.Generator
) -> Int64[Tensor, " n"]:
    """The one in the middle, and random ones."""
    middle = int((unit[members] @ unit[members].mean(0)).argmax())
    others = torch.cat([members[:middle], members[middle + 1 :]])
    drawn = others[torch.randperm(len(others), generator=generator)[: n - 1]]
    return torch.cat([members[middle : middle + 1], drawn])


def _clustered(
    points: Float[Tensor, "N D"], count: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " N"], Float[Tensor, "k D"]]:
    """K-means, repeated on as many points from each cluster: clusters follow the support, and not the density."""
    sample, x = points, points.numpy()
    made = _kmeans(sample, count, generator)
    for _ in range(RESAMPLED):
        owner = torch.from_numpy(made.predict(x)).long()
        each = max(1, len(points) // (2 * count))
        sample = torch.cat(
            [_closest(points, torch.from_numpy(made.cluster_centers_), owner, c, each) for c in owner.unique().tolist()]
        )
        if len(sample) <= count:
            break
        made = _kmeans(sample, count, generator)
    owner = torch.from_numpy(made.predict(x)).long()
    used, owner = owner.unique(return_inverse=True)
    return owner, F.normalize(torch.from_numpy(made.cluster_centers_)[used].float(), dim=1)


def _closest(
    points: Float[Tensor, "N D"], centres: Float[Tensor, "k D"], owner: Int64[Tensor, " N"], cluster: int, each: int
) -> Float[Tensor, "m D"]:
    own = points[owner == cluster]
    return own[(own - centres[cluster].float()).square().sum(1).argsort(stable=True)[:each]]


def _kmeans(points: Float[Tensor, "N D"], count: int, generator: torch.Generator) -> KMeans | MiniBatchKMeans:
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    count = min(count, len(np.unique(points.numpy(), axis=0))) if len(points) <= FEW else count
    if len(points) <= FEW:
        return KMeans(count, n_init=1, max_iter=20, random_state=seed).fit(points.numpy())
    return MiniBatchKMeans(count, n_init=1, batch_size=max(4096, 3 * count), random_state=seed).fit(points.numpy())
