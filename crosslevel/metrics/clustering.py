"""Clusterings: agreement of two partitions, and of k-means on features with labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from crosslevel.utils.errors import UserError


def clusters(features: Float[Tensor, "N d"], count: int, seed: int = 0, starts: int = 5) -> Int64[Tensor, " N"]:
    """The best of several runs of k-means (scikit-learn's) on features of unit length.

    Args:
        features: of any length; their direction counts.
        count: k.
        seed: of the starts.
        starts: runs from k-means++; the one with the smallest distances counts.

    Raises:
        ValueError: more clusters than features.

    """
    if not 1 <= count <= len(features):
        raise UserError(f"clusters={count} must be between 1 and the {len(features)} images")
    unit = F.normalize(features.float(), dim=1).cpu().numpy()
    assignment = KMeans(count, n_init=starts, random_state=seed).fit_predict(unit)
    return torch.from_numpy(assignment).long()


def agreement(predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"]) -> dict[str, float]:
    """How well two partitions of the same images agree, in percent.

    ``nmi``: normalized mutual information, 2 I / (H + H); ``ari``: the adjusted Rand index (Hubert and Arabie 1985),
    0 by chance and possibly below; ``accuracy``: with each cluster assigned to a label such that the most images are
    right (Kuhn 1955).
    """
    if len(predicted) != len(labels) or not len(labels):
        raise UserError(f"{len(predicted)} clusters, {len(labels)} labels: give as many of both, and at least one")
    a, b = predicted.cpu().numpy(), labels.cpu().numpy()
    return {
        "nmi": 100 * float(normalized_mutual_info_score(b, a)),
        "ari": 100 * float(adjusted_rand_score(b, a)),
        "accuracy": 100 * matched_accuracy(predicted, labels),
    }


def matched_accuracy(predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"]) -> float:
    """The share of images whose cluster is matched to their label, under the best one-to-one matching."""
    return float((matching(predicted, labels)[predicted] == labels).double().mean())


def matching(predicted: Int64[Tensor, " N"], labels: Int64[Tensor, " N"]) -> Int64[Tensor, " k"]:
    """The label of each cluster, -1 for none, that makes the most images right if no two clusters share one."""
    rows, columns = int(predicted.max()) + 1, int(labels.max()) + 1
    table = torch.bincount(predicted * columns + labels, minlength=rows * columns).view(rows, columns).cpu().numpy()
    matched = linear_sum_assignment(table, maximize=True)
    label = torch.full((rows,), -1)
    label[torch.from_numpy(matched[0])] = torch.from_numpy(matched[1])
    return label
