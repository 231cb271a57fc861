"""The weighted k-nearest-neighbour classifier (Wu et al., CVPR 2018, section 3.4)."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.metrics.nearest import nearest
from crosslevel.utils.errors import UserError


def neighbours(images: int) -> int:
    """The number of neighbours that vote: the usual 200, but at most a tenth of ``images``, for small banks."""
    return max(1, min(200, images // 10))


def weighted_knn(
    bank: Float[Tensor, "N d"],
    labels: Int64[Tensor, " N"],
    queries: Float[Tensor, "Q d"],
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> Float[Tensor, "Q classes"]:
    """Each query's votes: exp(cosine / T) of its k nearest rows of the bank, summed by their label.

    Features of any length count by their direction; memory stays at chunk * N similarities, and at most 6 GB.

    Args:
        bank: labelled features; half precision takes half the memory.
        labels: their labels, in [0, classes).
        queries: features to classify.
        classes: the number of classes.
        k: neighbours; the whole bank where it is smaller.
        temperature: T of the vote.
        chunk: queries at a time.

    Raises:
        ValueError: no neighbours, a temperature that is not positive, an empty bank, features that do not match, or a
            label out of range.

    """
    if k < 1 or temperature <= 0:
        raise UserError(f"k={k}, temperature={temperature}: both must be positive")
    if len(bank) == 0 or bank.shape[1] != queries.shape[1]:
        raise UserError(f"the bank is {tuple(bank.shape)}, the queries are {tuple(queries.shape)}: they do not match")
    if len(labels) != len(bank) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(f"labels must be {len(bank)} integers in [0, {classes})")
    similarity, neighbours = nearest(queries, bank, k, chunk)
    # Relative to the nearest: the ranking is the same, and exp cannot overflow at small T.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return weight.new_zeros(len(queries), classes).scatter_add(1, labels[neighbours], weight)
