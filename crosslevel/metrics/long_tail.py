"""How unequal groups are, and how often a random batch holds two images of one track."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.metrics.clustering import clusters


def imbalance_factor(sizes: Int64[Tensor, " k"] | Float[Tensor, " k"]) -> float:
    """The largest group's size over the smallest's (Cui et al., CVPR 2019); empty groups do not count.

    Raises:
        ValueError: there is no group.

    """
    there = _there(sizes)
    return float(there.max() / there.min())


def gini(sizes: Int64[Tensor, " k"] | Float[Tensor, " k"]) -> float:
    """The Gini index: 0 for groups of equal size, near 1 when one group has nearly everything.

    Half of the mean difference between two groups' sizes, over their mean size. Empty groups do not count.

    Raises:
        ValueError: there is no group.

    """
    there = _there(sizes).sort().values
    rank = torch.arange(1, len(there) + 1, dtype=torch.float64)
    return float((2 * rank - len(there) - 1) @ there / (len(there) * there.sum()))


def duplicate_share(track_sizes: Int64[Tensor, " T"], batch_size: int) -> float:
    """The expected share of a random batch that has another image of its own track in the batch.

    A batch is drawn without repetition from all N images. An image of a track of m is alone with the probability that
    the other B - 1 come from the N - m images of other tracks: C(N - m, B - 1) / C(N - 1, B - 1) (hypergeometric). No
    simulation.

    Args:
        track_sizes: images in each track.
        batch_size: B; all images where there are fewer.

    Raises:
        ValueError: no images, or a batch of none.

    """
    sizes, times = track_sizes[track_sizes > 0].unique(return_counts=True)
    total = int((sizes * times).sum())
    if not total or batch_size < 1:
        raise ValueError(f"{total} images in batches of {batch_size}: give at least one of each")
    others = min(batch_size, total) - 1
    m = sizes.double()
    alone = torch.exp(_log_choose(total - m, others) - _log_choose(torch.tensor(total - 1.0).double(), others))
    return float((m * times * (1 - alone)).sum() / total)


def distinct_tracks(track_sizes: Int64[Tensor, " T"], batch_size: int) -> float:
    """How many different tracks a random batch is expected to hold.

    A track of m images is missed with the probability C(N - m, B) / C(N, B).

    Raises:
        ValueError: no images, or a batch of none.

    """
    sizes, times = track_sizes[track_sizes > 0].unique(return_counts=True)
    total = int((sizes * times).sum())
    if not total or batch_size < 1:
        raise ValueError(f"{total} images in batches of {batch_size}: give at least one of each")
    drawn = min(batch_size, total)
    whole = _log_choose(torch.tensor(float(total)).double(), drawn)
    missed = torch.exp(_log_choose(total - sizes.double(), drawn) - whole)
    return float((times * (1 - missed)).sum())


def groups(
    features: Float[Tensor, "N d"], tracks: Int64[Tensor, " N"], count: int | None = None, seed: int = 0
) -> Int64[Tensor, " N"]:
    """Groups of similar images without labels, numbered by size: k-means on one mean feature a track.

    A track counts once, so that a film of a thousand frames does not get a group of its own; its images share a group.
    Features are centred: where all of them point the same way, their directions would not tell them apart.

    Args:
        features: of any length.
        tracks: the track of each image.
        count: how many groups; half of the tracks' square root, at least 10, unless given. Never more than tracks.
        seed: of the starts.

    """
    owner = tracks.unique(return_inverse=True)[1]
    total = int(owner.max()) + 1
    unit = F.normalize(features.float(), dim=1)
    sums = torch.zeros(total, features.shape[1]).index_add_(0, owner, unit)
    means = sums / torch.bincount(owner).unsqueeze(1)
    points = F.normalize(means - means.mean(0), dim=1)
    count = min(total, max(10, round(math.sqrt(total) / 2)) if count is None else count)
    found = clusters(points, count, seed)
    rank = torch.bincount(found, minlength=count).argsort(descending=True, stable=True).argsort()
    return rank[found][owner]


def _log_choose(n: Float[Tensor, " T"], k: int) -> Float[Tensor, " T"]:
    """Log C(n, k); minus infinity where k exceeds n."""
    enough = n >= k
    rest = torch.where(enough, n - k, 0.0)
    value = torch.lgamma(n + 1) - torch.lgamma(rest + 1) - torch.lgamma(torch.tensor(k + 1.0).double())
    return torch.where(enough, value, -torch.inf)


def _there(sizes: Tensor) -> Float[Tensor, " k"]:
    there = sizes[sizes > 0].double()
    if not len(there):
        raise ValueError("no group has an image")
    return there
