"""Scores of features without labels, from two views of the same held-out images.

Good features distinguish instances (local: `retrieval`) and form groups that do not depend on the view (global:
`partitions`). Wang, Liu, Yu (CVPR 2021) tune by this idea, with retrieval and normalized mutual information, and give
no formula. The score to choose by (`combine`) is ours: retrieval, and the number of directions in which the features
differ. The agreement of clusterings is computed beside it; with it in place of the directions, the score followed
accuracy as well on photographs and less well on turntables (`benchmarks/without_labels/label_free.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.cld.grouping import spherical_kmeans
from crosslevel.metrics.spectrum import alpha_req, effective_rank, lidar, rankme
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded

CLUSTERS = (8, 16, 32, 64, 128)
NAMES = (
    "combined", "top1", "mrr", "nmi", "ami", "ari", "nmi_levels", "ami_levels", "ari_levels", "alignment", "uniformity",
    "rankme", "effective_rank", "alpha_req", "lidar",
)  # fmt: skip
"""The names of all `scores`; those of levels need a group branch."""


def scores(
    features_a: Float[Tensor, "N d"],
    features_b: Float[Tensor, "N d"],
    group_a: Float[Tensor, "N e"] | None = None,
    group_b: Float[Tensor, "N e"] | None = None,
    tracks: Int64[Tensor, " N"] | None = None,
    generator: torch.Generator | None = None,
    clusters: Sequence[int] = CLUSTERS,
    instance_a: Float[Tensor, "N f"] | None = None,
    instance_b: Float[Tensor, "N f"] | None = None,
) -> dict[str, float]:
    """Every score of two views' features, by name; ``combined`` is ours, and the one to choose by.

    Higher is better, but for ``alignment``, ``uniformity`` (lower) and ``alpha_req`` (near 1).

    Args:
        features_a: of one view of N images, of any length; their direction counts.
        features_b: of another view of the same images, in the same order.
        group_a: of the group branch, of the same views.
        group_b: likewise.
        tracks: which images are near-duplicates of each other (`retrieval`).
        generator: draws the first centroids; from seed 0 unless given.
        clusters: the cluster counts of `partitions`.
        instance_a: of the instance branch, which ``*_levels`` compare with the group branch; the features themselves
            stand for it unless given.
        instance_b: likewise.

    Raises:
        ValueError: fewer than 4 images, views, branches or tracks that do not match, only one track, or a feature that
            is not finite.

    """
    a, b = _pair(features_a, features_b)
    for name, features in (("group_a", group_a), ("instance_a", instance_a)):
        if features is not None and len(features) != len(a):
            raise UserError(f"{name}: {len(features)} features of {len(a)} images: give one of each")
    generator = generator or seeded(0)
    figures = retrieval(a, b, tracks)
    sets = clusterings(a, clusters, generator), clusterings(b, clusters, generator)
    figures |= partitions(*sets)
    if group_a is not None and group_b is not None:
        groups = [clusterings(g, clusters, generator) for g in _pair(group_a, group_b)]
        if instance_a is not None and instance_b is not None:
            instance_sets = [clusterings(z, clusters, generator) for z in _pair(instance_a, instance_b)]
        else:
            instance_sets = list(sets)
        crossed = [partitions(instance_sets[0], groups[1]), partitions(instance_sets[1], groups[0])]
        figures |= {f"{name}_levels": (crossed[0][name] + crossed[1][name]) / 2 for name in crossed[0]}
    figures |= {
        "alignment": alignment(a, b),
        "uniformity": uniformity(a),
        "rankme": rankme(features_a),
        "effective_rank": effective_rank(a),
        "alpha_req": alpha_req(features_a),
        "lidar": lidar(features_a, features_b),
    }
    return figures | {"combined": combine(figures["mrr"], figures["effective_rank"], a.shape[1])}


SPREAD = 0.4
"""The exponent of `combine`, chosen in `benchmarks/without_labels/label_free.py`."""


def combine(mrr: float, rank: float, features: int) -> float:
    """Our score: mrr · ((rank - 1) / (features - 1))^0.4, in [0, 1]; 0 if no view is found, or all features are alike.

    Retrieval alone does not distinguish features of few directions from those of many, which separate more classes;
    the number of directions alone is highest for noise. Groups do not enter the score. Features that distinguish
    instances but form no groups would score higher than features with clear groups.

    Args:
        mrr: mean reciprocal rank (`retrieval`), in [0, 1].
        rank: effective rank (`spectrum.effective_rank`), in [1, features].
        features: d, the features' length.

    """
    return float(mrr * (max(0.0, rank - 1) / max(1, features - 1)) ** SPREAD)


def retrieval(
    a: Float[Tensor, "N d"], b: Float[Tensor, "N d"], tracks: Int64[Tensor, " N"] | None = None, chunk: int = 1024
) -> dict[str, float]:
    """How well an image's other view is retrieved among those of all images: top-1 and mean reciprocal rank, in [0, 1].

    An image's rank is 1 + the number of other images' views that are at least as similar, so that equal features score
    worst. With ``tracks`` the other images of its own track are left out of the ranking: they count neither as wrong
    nor as found. Both directions are averaged. Wang, Liu, Yu (CVPR 2021) tune by retrieval; the mean reciprocal rank is
    Voorhees's (TREC-8, 1999).

    Raises:
        ValueError: tracks of other images, or a single track: no other image would be left in the ranking.

    """
    ranks = torch.cat([retrieval_ranks(a, b, tracks, chunk), retrieval_ranks(b, a, tracks, chunk)]).double()
    return {"top1": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}


def retrieval_ranks(
    a: Float[Tensor, "N d"], b: Float[Tensor, "N d"], tracks: Int64[Tensor, " N"] | None = None, chunk: int = 1024
) -> Int64[Tensor, " N"]:
    """The rank of each image's view ``b`` among all images' by similarity to its view ``a``, as `retrieval` has it.

    Raises:
        ValueError: as from `retrieval`.

    """
    a, b = _pair(a, b)
    if tracks is not None and len(tracks) != len(a):
        raise UserError(f"{len(tracks)} tracks for {len(a)} images: give one an image")
    if tracks is not None and bool((tracks == tracks[0]).all()):
        raise UserError("all images are of one track: nothing is left to tell an image from")
    return _ranks(a, b, tracks, chunk)


def _ranks(queries: Tensor, keys: Tensor, tracks: Tensor | None, chunk: int) -> Tensor:
    owner = torch.arange(len(keys)) if tracks is None else tracks.cpu()
    ranks = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ keys.T
        rows = torch.arange(len(similarity))
        positive = similarity[rows, rows + start]
        ahead = similarity >= positive[:, None] - 1e-6
        ahead &= owner[start : start + chunk, None] != owner
        ranks.append(1 + ahead.sum(1))
    return torch.cat(ranks)


def clusterings(
    features: Float[Tensor, "N d"], counts: Sequence[int], generator: torch.Generator, iterations: int = 20
) -> list[Int64[Tensor, " N"]]:
    """Cosine k-means for each count up to a quarter of the images (2 clusters if no count is that small)."""
    possible = [k for k in counts if k <= len(features) // 4] or [2]
    return [spherical_kmeans(features, k, iterations, "kmeans++", generator).assignment for k in possible]


def partitions(a: Sequence[Int64[Tensor, " N"]], b: Sequence[Int64[Tensor, " N"]]) -> dict[str, float]:
    """Agreement of clusterings of the same images, count by count, averaged.

    ``nmi``: normalized mutual information (Strehl and Ghosh, JMLR 2002), which grows with the count for any features;
    ``ami`` (Vinh, Epps, Bailey, JMLR 2010) and ``ari`` (Hubert and Arabie, J. Classification 1985), adjusted for
    chance: 0 for unrelated clusterings. A clustering that put all images into one cluster agrees with nothing: 0.
    """
    from sklearn import metrics  # noqa: PLC0415 - takes seconds to import, and few scores need it

    measures = {
        "nmi": metrics.normalized_mutual_info_score,
        "ami": metrics.adjusted_mutual_info_score,
        "ari": metrics.adjusted_rand_score,
    }
    pairs = [(x.cpu().numpy(), y.cpu().numpy()) for x, y in zip(a, b, strict=True)]
    return {
        name: sum(0.0 if (x == x[0]).all() or (y == y[0]).all() else float(measure(x, y)) for x, y in pairs)
        / len(pairs)
        for name, measure in measures.items()
    }


def alignment(a: Float[Tensor, "N d"], b: Float[Tensor, "N d"]) -> float:
    """The mean squared distance of two views' unit features, in [0, 4] (Wang and Isola, ICML 2020, eq. 4, α = 2)."""
    a, b = _pair(a, b)
    return float((a - b).double().square().sum(1).mean())


def uniformity(features: Float[Tensor, "N d"], t: float = 2.0, most: int = 4096) -> float:
    """The log of the mean Gaussian potential of all pairs of unit features, in [-4 t, 0] (Wang and Isola 2020, eq. 5).

    If there are more than ``most`` images, only that many, evenly spaced, are used.
    """
    unit = F.normalize(features.detach().cpu().double(), dim=1)
    if len(unit) > most:
        unit = unit[torch.linspace(0, len(unit) - 1, most).round().long()]
    return float(torch.pdist(unit).square().mul(-t).exp().mean().log())


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both views as unit features in float32 on the CPU."""
    if a.ndim != 2 or a.shape != b.shape or len(a) < 4:
        raise UserError(f"the views are {tuple(a.shape)} and {tuple(b.shape)}: give two alike, of 4 images or more")
    for name, x in (("a", a), ("b", b)):
        bad = int((~x.isfinite().all(1)).sum())
        if bad:
            raise UserError(f"view {name}: {bad} of {len(x)} features are not finite: the training diverged")
    return F.normalize(a.detach().cpu().float(), dim=1), F.normalize(b.detach().cpu().float(), dim=1)
