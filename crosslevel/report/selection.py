"""The content of pictures: features laid out in the plane, the images of groups, the neighbours of queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from crosslevel.report.pictures import ImageRow, finite
from crosslevel.utils.errors import UserError


def project(
    features: Float[Tensor, "N D"], method: Literal["tsne", "pca"] = "tsne", seed: int = 0
) -> Float[Tensor, "N 2"]:
    """Features laid out in the plane: t-SNE of their cosine distances, starting from PCA, or PCA alone.

    t-SNE suits up to a few thousand images. With fewer than five different ones it has no neighbourhoods to
    keep, and PCA answers.

    Raises:
        ValueError: an unknown method, or a feature that is not finite.

    """
    if method not in ("tsne", "pca"):
        raise UserError(f"method={method!r} is not known: use 'tsne' or 'pca'")
    x = finite(features).double()
    flat = torch.zeros(len(x), 2, dtype=torch.float64)
    if len(x):
        left, scale, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        # The sign of a singular vector is arbitrary: fixed here, so that every machine draws the same map.
        sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign().squeeze(1)
        rank = min(2, len(scale))
        flat[:, :rank] = (left * scale * sign)[:, :rank]
    if method == "pca" or len(x.unique(dim=0)) < 5:
        return flat.float()
    from sklearn.manifold import TSNE  # noqa: PLC0415 - takes seconds to import

    start = (flat / flat[:, 0].std() * 1e-4).float().numpy()
    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(metric="cosine", init=start, perplexity=perplexity, random_state=seed)
    # One thread: on a busy machine, several threads wait for each other and take many times as long.
    with threadpool_limits(1):
        return torch.from_numpy(tsne.fit_transform(x.float().numpy()))


def group_rows(
    images: UInt8[Tensor, "N 3 h w"],
    assignment: Int[Tensor, " N"],
    similarity: Float[Tensor, " N"] | None = None,
    most: int = 12,
    per_row: int = 10,
    files: Sequence[tuple[str, str | None]] | None = None,
) -> list[ImageRow]:
    """Rows for ``image_rows``: up to ``most`` groups, two thirds the largest and the rest of middle size.

    ``similarity`` of each image to its group's centroid orders a row, the most similar first.
    """
    groups, sizes = torch.unique(assignment.cpu(), return_counts=True)
    order = sizes.argsort(descending=True, stable=True)
    if len(order) > most:
        largest, others = order.split([math.ceil(most * 2 / 3), len(order) - math.ceil(most * 2 / 3)])
        ranks = torch.linspace(0, len(others) - 1, most - len(largest) + 2)[1:-1].long()
        order = torch.cat([largest, others[ranks]])
    rows = []
    for group, size in zip(groups[order].tolist(), sizes[order].tolist(), strict=True):
        indices = (assignment.cpu() == group).nonzero().squeeze(1)
        caption = f"Group {group}: {size:,} image{'s' if size > 1 else ''}"
        if similarity is not None:
            near = similarity.cpu()[indices]
            indices = indices[near.argsort(descending=True, stable=True)]
            caption += f", mean similarity to the centroid {near.mean():.2f}"
        selected = indices[:per_row]
        row_files = None if files is None else [files[i] for i in selected.tolist()]
        rows.append(ImageRow(caption, list(images[selected]), files=row_files))
    return rows


def neighbour_rows(
    images: UInt8[Tensor, "N 3 h w"],
    features: Float[Tensor, "N D"],
    queries: Sequence[int],
    k: int = 8,
    *,
    labels: Int[Tensor, " N"] | None = None,
    classes: Sequence[str] | None = None,
    exclude: Int[Tensor, " N"] | None = None,
    files: Sequence[tuple[str, str | None]] | None = None,
) -> list[ImageRow]:
    """Rows for ``image_rows``: each query, then its ``k`` nearest other images by cosine similarity.

    ``exclude`` numbers the track of each image: a query's own track is left out, as otherwise only near-duplicates
    would be found. ``files``: each image's name, and its file, if it is one.
    """
    z = normalize(finite(features).float(), dim=1)
    index = torch.as_tensor(queries, dtype=torch.int64)
    similarity = z[index] @ z.T
    track = torch.arange(len(z)) if exclude is None else exclude.cpu()
    similarity[track[index][:, None] == track] = -math.inf
    nearest = similarity.sort(dim=1, descending=True, stable=True)
    rows = []
    for row, query in enumerate(index.tolist()):
        values = nearest.values[row, :k]
        values = values[values > -math.inf]
        neighbours = nearest.indices[row, : len(values)]
        caption, outlines = f"Image {query}" if files is None else files[query][0], ["query"] + [""] * len(neighbours)
        if labels is not None:
            same = (labels[neighbours] == labels[query]).tolist()
            outlines[1:] = ["same" if s else "other" for s in same]
            name = classes[int(labels[query])] if classes else f"label {int(labels[query])}"
            of = "" if files is None else f" {files[query][0]}"
            caption = f"{name}{of}: {sum(same)} of {len(same)} neighbours have the same label"
        marks = ["query", *(f"{value:.2f}" for value in values.tolist())]
        row_files = None if files is None else [files[i] for i in (query, *neighbours.tolist())]
        rows.append(ImageRow(caption, [images[query], *images[neighbours]], marks, outlines, row_files))
    return rows
