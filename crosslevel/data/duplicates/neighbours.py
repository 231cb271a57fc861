"""Nearest neighbours among many outlines, in time that grows far slower than the square of their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_PROBED = 8  # cells that a query is compared with: those nearest to the query; those nearest to its cell lose a quarter
_ROUNDS = 4  # of k-means
_QUERIES = 2048  # at a time: 160 MB of similarities at most
_BLOCK = 2**15  # queries at a time, whose best keys of each cell are in memory: 150 MB


@dataclass(frozen=True)
class Cells:
    """When points are searched in cells, and how large the cells are.

    Args:
        all: points up to which all are compared with all.
        points: of a cell, on average.

    """

    all: int = 20_000
    points: int = 512


USUAL = Cells()


class Neighbours(NamedTuple):
    """The k largest products of each query, in descending order, and the keys that they belong to (-1: none)."""

    values: Float[Tensor, "Q k"]
    indices: Int64[Tensor, "Q k"]


def neighbours(queries: Float[Tensor, "Q d"], keys: Float[Tensor, "N d"], k: int, cells: Cells = USUAL) -> Neighbours:
    """The k keys nearest to each query, both of length 1 or 0.

    Among more than ``cells.all`` keys, only those in the cells nearest to the query are compared (an inverted file:
    Jegou, Douze and Schmid, PAMI 2011, section IV; cells by spherical k-means on a sample). Near-duplicates lie in one
    of them; farther neighbours are not always found.

    Args:
        queries: what to look up.
        keys: the points to search.
        k: neighbours; -1 fills the list if a query meets fewer.
        cells: when they are used, and how large they are.

    """
    k = min(k, len(keys))
    if len(keys) <= cells.all:
        chunks = [(part @ keys.T).topk(k) for part in queries.split(_QUERIES)]
        return Neighbours(torch.cat([p.values for p in chunks]), torch.cat([p.indices for p in chunks]))
    centres = _centres(keys, cells.points)
    cell_rows = _rows_by_cell(_nearest_cells(keys, centres, 1)[:, 0], len(centres))
    chunks = [_through_cells(part, keys, centres, cell_rows, k) for part in queries.split(_BLOCK)]
    return Neighbours(torch.cat([p.values for p in chunks]), torch.cat([p.indices for p in chunks]))


def _through_cells(
    queries: Float[Tensor, "Q d"],
    keys: Float[Tensor, "N d"],
    centres: Float[Tensor, "C d"],
    cell_rows: tuple[Int64[Tensor, " n"], ...],
    k: int,
) -> Neighbours:
    """The best keys of each cell that a query probes, and the best of all these."""
    probed = _nearest_cells(queries, centres, _PROBED)
    values = torch.full((len(queries) * probed.shape[1], k), -1.0)
    indices = torch.full(values.shape, -1)
    for near, asking in zip(cell_rows, _rows_by_cell(probed.flatten(), len(centres)), strict=True):
        depth = min(k, len(near))
        if not depth:
            continue
        cell_keys = keys[near].T
        for slots in asking.split(_QUERIES):
            best = (queries[slots // probed.shape[1]] @ cell_keys).topk(depth, sorted=False)
            values[slots, :depth], indices[slots, :depth] = best.values, near[best.indices]
    closest = values.view(len(queries), -1).topk(k)
    return Neighbours(closest.values, indices.view(len(queries), -1).gather(1, closest.indices))


def _centres(keys: Float[Tensor, "N d"], points: int) -> Float[Tensor, "C d"]:
    """Directions of cells of about equal size, computed from every n-th key: the same keys give the same cells."""
    count = len(keys) // points
    sample = keys[:: max(1, len(keys) // (32 * count))]
    centres = sample[:: max(1, len(sample) // count)][:count].clone()
    for _ in range(_ROUNDS):
        owner = _nearest_cells(sample, centres, 1)[:, 0]
        sums = torch.zeros_like(centres).index_add_(0, owner, sample)
        # A cell that lost all its points stays where it was.
        centres = torch.where(
            sums.norm(dim=1, keepdim=True) > 1e-6, torch.nn.functional.normalize(sums, dim=1), centres
        )
    return centres


def _nearest_cells(points: Float[Tensor, "N d"], centres: Float[Tensor, "C d"], count: int) -> Int64[Tensor, "N count"]:
    count = min(count, len(centres))
    return torch.cat([(part @ centres.T).topk(count).indices for part in points.split(_QUERIES)])


def _rows_by_cell(owner: Int64[Tensor, " N"], cells: int) -> tuple[Int64[Tensor, " n"], ...]:
    """The points of each cell."""
    return torch.split(owner.argsort(stable=True), owner.bincount(minlength=cells).tolist())
