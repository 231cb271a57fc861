"""How unequal groups are, and how often a random batch holds two images of one track."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import HDBSCAN
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from sklearn.mixture import BayesianGaussianMixture
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded

DIMENSIONS = 16
FITTED = 10_000  # tracks
COMPARED = 2000  # tracks
SMALLEST, NEIGHBOURS = 5, 3  # tracks of a dense region, and that make a place dense
OUTSIDE = 1 / 3  # share of all tracks
MOST_IMBALANCED = 1e6


def imbalance_factor(sizes: Int64[Tensor, " k"] | Float[Tensor, " k"]) -> float:
    """The largest group's size over the smallest's (Cui et al., CVPR 2019); empty groups do not count.

    Raises:
        ValueError: there is no group.

    """
    positive = _positive(sizes)
    return float(positive.max() / positive.min())


def gini(sizes: Int64[Tensor, " k"] | Float[Tensor, " k"]) -> float:
    """The Gini index: 0 for groups of equal size, near 1 when one group has nearly everything.

    Half of the mean difference between two groups' sizes, over their mean size. Empty groups do not count.

    Raises:
        ValueError: there is no group.

    """
    ascending = _positive(sizes).sort().values
    rank = torch.arange(1, len(ascending) + 1, dtype=torch.float64)
    return float((2 * rank - len(ascending) - 1) @ ascending / (len(ascending) * ascending.sum()))


def exponential_imbalance(sizes: Int64[Tensor, " k"] | Float[Tensor, " k"]) -> float:
    """The imbalance factor of k groups that decay exponentially (Cui et al. 2019) and have the Gini index of these.

    Unlike `imbalance_factor`, it does not depend on the smallest group alone, which is estimated worst. 1 for equal
    groups; at most `MOST_IMBALANCED`.

    Raises:
        ValueError: there is no group.

    """
    positive = _positive(sizes)
    if len(positive) == 1:
        return 1.0
    target, rank = gini(positive), torch.arange(len(positive), dtype=torch.float64) / (len(positive) - 1)
    low, high = 0.0, math.log(MOST_IMBALANCED)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gini(torch.exp(-middle * rank)) < target else (low, middle)
    return math.exp((low + high) / 2)


def duplicate_share(track_sizes: Int64[Tensor, " T"], batch_size: int) -> float:
    """The expected share of a random batch that has another image of its own track in the batch.

    A batch is drawn without repetition from all N images. An image of a track of m is alone with the probability that
    the other B - 1 come from the N - m images of other tracks: C(N - m, B - 1) / C(N - 1, B - 1) (hypergeometric). This
    is exact, without simulation.

    Args:
        track_sizes: images in each track.
        batch_size: B; all images where there are fewer.

    Raises:
        ValueError: no images, or a batch of none.

    """
    sizes, times, total = _counted(track_sizes, batch_size)
    companions = min(batch_size, total) - 1
    m = sizes.double()
    alone = torch.exp(_log_choose(total - m, companions) - _log_choose(torch.tensor(total - 1.0).double(), companions))
    return float((m * times * (1 - alone)).sum() / total)


def distinct_tracks(track_sizes: Int64[Tensor, " T"], batch_size: int) -> float:
    """How many different tracks a random batch is expected to hold.

    A track of m images is missed with the probability C(N - m, B) / C(N, B).

    Raises:
        ValueError: no images, or a batch of none.

    """
    sizes, times, total = _counted(track_sizes, batch_size)
    batch = min(batch_size, total)
    log_batches = _log_choose(torch.tensor(float(total)).double(), batch)
    missed = torch.exp(_log_choose(total - sizes.double(), batch) - log_batches)
    return float((times * (1 - missed)).sum())


def _counted(track_sizes: Int64[Tensor, " T"], batch_size: int) -> tuple[Tensor, Tensor, int]:
    """The distinct sizes, the number of tracks of each, and the total number of images."""
    sizes, times = track_sizes[track_sizes > 0].unique(return_counts=True)
    total = int((sizes * times).sum())
    if not total or batch_size < 1:
        raise UserError(f"{total} images in batches of {batch_size}: give at least one of each")
    return sizes, times, total


class Grouped(NamedTuple):
    """A group for each image, 0 the one with the most tracks, and how far apart the groups are.

    ``separation`` is the tracks' mean silhouette (Rousseeuw 1987): near 1 for groups with empty space between them,
    near 0 or below for pieces of one cloud, whose sizes say nothing; 0 for a single group.
    """

    groups: Int64[Tensor, " N"]
    separation: float


def grouped(
    features: Float[Tensor, "N d"], tracks: Int64[Tensor, " N"], most: int | None = None, seed: int = 0
) -> Grouped:
    """Groups of similar images without labels, by one mean feature a track.

    If the features lie in dense regions with space between them, these regions are the groups (HDBSCAN: Campello,
    Moulavi and Sander 2013, by scikit-learn), of any number and size; a track outside joins its nearest neighbour's
    group. If more than the share `OUTSIDE` of the tracks lies outside, a Dirichlet process mixture is fitted (Blei and
    Jordan 2006, by scikit-learn), which leaves surplus components empty. K-means would cut large groups to make sizes
    even.

    A track counts once, so that a video of a thousand frames does not get a group of its own; its images share a group.
    Features are centred: if all of them point the same way, their directions would not distinguish them. Groups are
    found in the `DIMENSIONS` leading principal components.

    Args:
        features: of any length.
        tracks: the track of each image.
        most: the most groups, never more than tracks; for a mixture 20 unless given.
        seed: of the start.

    """
    owner = tracks.unique(return_inverse=True)[1]
    points = _leading(_one_a_track(features, owner))
    assignment = _dense(points, len(points) if most is None else most, seed)
    if assignment is None:
        assignment = _mixture(points, min(len(points), 20 if most is None else most), seed)
    rank = torch.bincount(assignment).argsort(descending=True, stable=True).argsort()
    return Grouped(rank[assignment][owner], _silhouette(points, assignment, seed))


def _one_a_track(features: Float[Tensor, "N d"], owner: Int64[Tensor, " N"]) -> Float[Tensor, "T d"]:
    total = int(owner.max()) + 1
    unit = F.normalize(features.float(), dim=1)
    sums = torch.zeros(total, features.shape[1]).index_add_(0, owner, unit)
    means = sums / torch.bincount(owner).unsqueeze(1)
    return F.normalize(means - means.mean(0), dim=1)


def _leading(points: Float[Tensor, "T d"]) -> Float[Tensor, "T p"]:
    """The leading principal components, of variance 1 on average; all zero if all points are alike."""
    centred = points.double() - points.double().mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -DIMENSIONS:]
    components = centred @ axes
    scale = components.square().mean().sqrt().clamp(min=1e-12)
    return torch.div(components, scale)


def _dense(points: Float[Tensor, "T p"], most: int, seed: int) -> Int64[Tensor, " T"] | None:
    """The dense region of each point, or of its nearest neighbour in one; None if too few points lie in one."""
    sample = torch.randperm(len(points), generator=seeded(seed))[:FITTED]
    if len(sample) < 2 * SMALLEST:
        return None
    sampled = points[sample].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assignment = HDBSCAN(min_cluster_size=SMALLEST, min_samples=NEIGHBOURS).fit_predict(sampled)
    inside = assignment >= 0
    groups = int(assignment.max()) + 1
    if not 2 <= groups <= most or 1 - inside.mean() > OUTSIDE:
        return None
    nearest = KNeighborsClassifier(1).fit(sampled[inside], assignment[inside])
    return torch.from_numpy(nearest.predict(points.numpy())).long()


def _mixture(points: Float[Tensor, "T p"], most: int, seed: int) -> Int64[Tensor, " T"]:
    """The component of each point; a sample of many points is fitted."""
    if len(points) == 1:
        return torch.zeros(1, dtype=torch.long)  # scikit-learn refuses it
    sample = torch.randperm(len(points), generator=seeded(seed))[:FITTED]
    mixture = BayesianGaussianMixture(
        n_components=most, covariance_type="spherical", weight_concentration_prior=0.1, max_iter=100, random_state=seed
    )
    with warnings.catch_warnings():
        # Neither a fit that has not fully converged nor fewer distinct points than components is an error here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(points[sample].numpy())
    return torch.from_numpy(mixture.predict(points.numpy())).long()


def _silhouette(points: Float[Tensor, "T p"], assignment: Int64[Tensor, " T"], seed: int) -> float:
    sample = torch.randperm(len(points), generator=seeded(seed))[:COMPARED]
    groups = len(assignment[sample].unique())
    if not 2 <= groups < len(sample):
        return 0.0
    return float(silhouette_score(points[sample].numpy(), assignment[sample].numpy()))


def _log_choose(n: Float[Tensor, " T"], k: int) -> Float[Tensor, " T"]:
    """Log C(n, k); minus infinity where k exceeds n."""
    enough = n >= k
    remaining = torch.where(enough, n - k, 0.0)
    value = torch.lgamma(n + 1) - torch.lgamma(remaining + 1) - torch.lgamma(torch.tensor(k + 1.0).double())
    return torch.where(enough, value, -torch.inf)


def _positive(sizes: Tensor) -> Float[Tensor, " k"]:
    positive = sizes[sizes > 0].double()
    if not len(positive):
        raise UserError("no group has an image")
    return positive
