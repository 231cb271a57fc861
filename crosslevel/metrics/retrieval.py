"""Retrieval: whether the images nearest to a query share its label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.utils.errors import UserError


def retrieval(
    features: Float[Tensor, "N d"],
    labels: Int64[Tensor, " N"],
    tracks: Int64[Tensor, " N"] | None = None,
    queries: Int64[Tensor, " Q"] | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """The means over the queries of `ranked`, in percent; ``queries`` is the number of queries with relevant images."""
    return mean_figures(ranked(features, labels, tracks, queries, ranks, chunk))


def ranked(
    features: Float[Tensor, "N d"],
    labels: Int64[Tensor, " N"],
    tracks: Int64[Tensor, " N"] | None = None,
    queries: Int64[Tensor, " Q"] | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, Float[Tensor, " M"]]:
    """Each query's ranking of all other images by cosine similarity, judged by their labels.

    ``recall@k`` is 1 for a query that has an image of its own label among the k nearest (Jégou et al.,
    TPAMI 2011, with recall@k as in deep metric learning); ``map`` is the query's average precision, the mean of the
    precision at the rank of each image of its label. Among equally similar images, the one that comes first in the
    source ranks first.

    Args:
        features: of any length; their direction counts.
        labels: what makes an image relevant: its class, or its track.
        tracks: images of the query's own track are left out: frames of one object are found too easily.
        queries: indices of the query images; all unless given.
        ranks: the k of recall@k.
        chunk: queries at a time; memory stays at a few times chunk * N.

    Returns:
        for each figure, its values in [0, 1] for the M queries with relevant images.

    Raises:
        ValueError: lengths that differ, or no query with a relevant image.

    """
    if len(labels) != len(features) or (tracks is not None and len(tracks) != len(features)):
        raise UserError(f"{len(features)} features, {len(labels)} labels: the lengths must agree")
    unit = F.normalize(features, dim=1)
    query_rows = torch.arange(len(features), device=features.device) if queries is None else queries
    chunks: list[Tensor] = []
    for part in query_rows.split(chunk):
        similarity = unit[part] @ unit.T
        barred = torch.zeros_like(similarity, dtype=torch.bool)
        barred[torch.arange(len(part)), part] = True
        if tracks is not None:
            barred |= tracks[part].unsqueeze(1) == tracks
        order = similarity.masked_fill_(barred, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        hit = (labels[order] == labels[part].unsqueeze(1)) & ~barred.gather(1, order)
        chunks.append(_scored(hit, ranks))
    table = torch.cat(chunks)
    table = table[table[:, -1] > 0]
    if not len(table):
        raise UserError("no query has another image of its label to find")
    return dict(zip([*(f"recall@{k}" for k in ranks), "map"], table.unbind(1), strict=False))


def mean_figures(table: dict[str, Float[Tensor, " M"]]) -> dict[str, float]:
    """Means in percent, and the number of queries."""
    count = len(next(iter(table.values())))
    return {**{name: 100 * float(column.mean()) for name, column in table.items()}, "queries": float(count)}


def _scored(hit: Tensor, ranks: Sequence[int]) -> Float[Tensor, "B columns"]:
    """Recall at each rank, average precision, and the number of relevant images; hits are ordered by rank."""
    hits = hit.double()
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    total = hits.sum(1)
    precision = (hits.cumsum(1) / rank * hits).sum(1) / total.clamp(min=1)
    recall = [hit[:, :k].any(1).double() for k in ranks]
    return torch.stack([*recall, precision, total], dim=1)
