"""Exact nearest neighbours among many features.

Ours: kNN of 10,000 queries among 1.3 million features took 0.84 of the time of faiss's exact index, on two threads of
a processor with bfloat16 (benchmarks/results/evaluate.txt), and the features may stay in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.data.duplicates.neighbours import USUAL, Cells, neighbours
from crosslevel.utils.device import multiplies_bfloat16

CROWD = 32  # neighbours that say how alike the images around one are
IN_A_CROWD = 0.5  # largest distance of a pair, as a share of the distance to those neighbours
_QUERIES = 1024  # features compared with all others at a time: 400 MB among 100,000
MANY = 50_000  # features up to which pairs are searched among all
SPARE = 3  # candidates as a multiple of k, after rounded similarities; usually fewer than two are needed


@dataclass(frozen=True)
class Blocking:
    """How a search divides its work; results do not depend on it, except for the rounding of float32.

    Args:
        tile: keys of a matrix product, few enough that its result is still in the cache when its maxima are taken.
        few: up to this many keys, selection is cheap, and every key is a block of its own.
        memory: bytes of similarities at a time.
        bfloat16: multiply in bfloat16 first; unless given, if the processor has instructions for it.

    """

    tile: int = 4096
    few: int = 4096
    memory: int = 6 * 2**30
    bfloat16: bool | None = None


class Neighbours(NamedTuple):
    """The k largest cosine similarities of each query, in descending order, and the indices of their keys."""

    values: Float[Tensor, "Q k"]
    indices: Int64[Tensor, "Q k"]


def nearest(
    queries: Float[Tensor, "Q d"],
    keys: Float[Tensor, "N d"],
    k: int,
    chunk: int = 4096,
    blocking: Blocking = Blocking(),
) -> Neighbours:
    """The k largest cosine similarities of each query, in descending order, and the rows of ``keys`` they are with.

    Selecting k of N numbers takes longer than computing them. So the keys are divided into blocks of b = sqrt(N / k).
    The k largest similarities lie in the k blocks with the largest maxima: each block ranked higher holds a similarity
    that is larger. Only the k b similarities in these blocks are sorted.

    Processors with bfloat16 instructions multiply in it first, at more than twice the speed of float32. The error is
    bounded for each query and key, so that the keys that could be among the k nearest are known; these, hardly more
    than k, are compared in float32. If they are too many, as with features that hardly differ, all keys are. So the
    result is that of float32, up to its own rounding.

    Args:
        queries: features of any length.
        keys: features of any length. Half precision takes half the memory; on a CPU it is compared in float32,
            elsewhere as it is.
        k: neighbours; all keys where there are fewer.
        chunk: queries at a time, fewer where their similarities would take more than ``blocking.memory``.
        blocking: how the work is divided.

    """
    k = min(k, len(keys))
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    on_cpu = keys.device.type == "cpu"
    if on_cpu and dtype.itemsize < torch.float32.itemsize:
        dtype = torch.float32
    lengths = torch.cat([tile.to(dtype).norm(dim=1) for tile in keys.split(blocking.tile)]).clamp(min=1e-12)
    if not len(queries):
        return _none(k, dtype, keys.device)
    unit = F.normalize(queries.to(dtype), dim=1)
    fast = multiplies_bfloat16() if blocking.bfloat16 is None else blocking.bfloat16
    if fast and on_cpu and dtype == torch.float32 and len(keys) > blocking.few:
        return _rounded_first(unit, keys, lengths, k, chunk, blocking)
    return _searched(unit, keys, lengths, k, chunk, blocking)


def mutual_pairs(
    features: Float[Tensor, "N d"],
    threshold: float,
    k: int = 8,
    known: Neighbours | None = None,
    many: int = MANY,
    cells: Cells = USUAL,
) -> Int64[Tensor, "P 2"]:
    """Pairs (i, j), i < j, of features that are much nearer to each other than to the rest.

    A pair has a cosine of at least ``threshold``; each is among the other's ``k`` nearest; and their distance is at
    most half of that to the neighbours of rank 17 to 32 of either. So one image does not link a dense crowd of
    different ones. With fewer than 8 features the last condition is dropped.

    Args:
        features: of the images.
        threshold: the least cosine of a pair.
        k: neighbours that are considered.
        known: each feature's nearest ones with their similarities, `CROWD` + 1 or all, if they were computed before.
        many: features above which neighbours are searched in ``cells`` alone (`neighbours`), which takes far less than
            quadratic time.
        cells: how features are divided for that search.

    """
    count = len(features)
    rank = min(CROWD, (count - 1) // 3) if count >= 8 else 0
    depth = max(k, rank) + 1
    if known is not None:
        values, index = known.values[:, :depth], known.indices[:, :depth]
    elif count > many:
        unit = F.normalize(features.float(), dim=1).cpu()
        values, index = neighbours(unit, unit, depth, cells)
    else:
        values, index = nearest(features, features, depth, _QUERIES)
    row = torch.arange(count).unsqueeze(1).expand_as(index)
    distances = (2 - 2 * values.float().cpu()).clamp(min=0).sqrt()
    limit = (
        IN_A_CROWD * distances[:, rank // 2 + 1 : rank + 1].median(1).values
        if rank
        else torch.full((count,), torch.inf)
    )
    index, values = index[:, : k + 1].cpu(), values[:, : k + 1].cpu()
    row, distances = row[:, : k + 1], distances[:, : k + 1]
    candidates = (values >= threshold) & (index != row) & (distances <= torch.minimum(limit[row], limit[index]))
    i, j = row[candidates], index[candidates]
    directed, times = torch.cat([i * count + j, j * count + i]).unique(return_counts=True)
    directed = directed[times == 2]
    pairs = torch.stack([directed // count, directed % count], dim=1)
    return pairs[pairs[:, 0] < pairs[:, 1]]


def _searched(
    queries: Float[Tensor, "Q d"],
    keys: Float[Tensor, "N d"],
    lengths: Float[Tensor, " N"],
    k: int,
    chunk: int,
    blocking: Blocking,
) -> Neighbours:
    """Search by similarities in the queries' own type."""
    blocks = _blocks(len(keys), k, blocking)
    rows = _rows(len(queries), len(keys), queries.dtype, chunk, blocking)
    table = _table(rows, len(keys), queries.dtype, keys.device, blocking.tile)
    room = queries.new_empty(blocking.tile, queries.shape[1])  # allocating it for every tile would be slower
    results = []
    for part in queries.split(rows):
        tiles = (
            torch.div(tile, length.unsqueeze(1), out=room[: len(tile)])
            for tile, length in zip(keys.split(blocking.tile), lengths.split(blocking.tile), strict=True)
        )
        results.append(_select(table[:, : len(part)], _fill(table[:, : len(part)], part, tiles, blocks), k))
    return _joined(results)


def _rounded_first(
    queries: Float[Tensor, "Q d"],
    keys: Float[Tensor, "N d"],
    lengths: Float[Tensor, " N"],
    k: int,
    chunk: int,
    blocking: Blocking,
) -> Neighbours:
    """Search by similarities in bfloat16 where these are decisive, and in float32 elsewhere."""
    candidate_count, rough = min(SPARE * k, len(keys)), torch.bfloat16
    blocks, rows = _blocks(len(keys), candidate_count, blocking), _rows(len(queries), len(keys), rough, chunk, blocking)
    table = _table(rows, len(keys), rough, keys.device, blocking.tile)
    bank, error = rounded_bank(keys, lengths, blocking.tile)
    results, decided = [], []
    for part in queries.split(rows):
        rounded = part.to(rough)
        similarities = table[:, : len(part)]
        candidates = _select(
            similarities, _fill(similarities, rounded, bank.split(blocking.tile), blocks), candidate_count
        )
        limit = least_rounded(candidates.values[:, k - 1].float(), part, rounded, error)
        possible = (candidates.values >= limit.unsqueeze(1)).sum(dim=1)
        results.append(_compared(part, keys, lengths, candidates.indices, possible, k))
        decided.append((possible < candidate_count) | (candidate_count == len(keys)))
    best = _joined(results)
    undecided = ~torch.cat(decided)
    if undecided.any():
        best.values[undecided], best.indices[undecided] = _searched(
            queries[undecided], keys, lengths, k, chunk, blocking
        )
    return best


def rounded_bank(keys: Float[Tensor, "N d"], lengths: Float[Tensor, " N"], tile_size: int) -> tuple[Tensor, float]:
    """The keys at length 1 in bfloat16, and the largest rounding error of a key."""
    bank, error = torch.empty(keys.shape, dtype=torch.bfloat16), 0.0
    for tile, length, out in zip(*(part.split(tile_size) for part in (keys, lengths, bank)), strict=True):
        unit = tile / length.unsqueeze(1)
        out.copy_(unit)
        error = max(error, float(unit.sub_(out).norm(dim=1).max()))
    return bank, error


def least_rounded(
    kth: Float[Tensor, " B"], queries: Float[Tensor, "B d"], rounded: Float[Tensor, "B d"], error: float
) -> Float[Tensor, " B"]:
    """A lower bound of the rounded similarity of every true one of the k nearest keys; ``kth`` is the k-th largest.

    For rounded q' and m', |q m - q' m'| <= |q - q'| |m| + |q'| |m - m'| (Cauchy-Schwarz); summing d products in float32
    and rounding the result add their own errors. The bound counts this twice: the k-th largest may be too high by
    it, and a true neighbour too low.
    """
    away = (queries - rounded.float()).norm(dim=1)
    product = away + (1 + away) * error + queries.shape[1] * 2**-23
    limit: Tensor = kth - 2 * product - 2**-7 * kth.abs().clamp(min=2**-7)
    return limit


def _compared(
    queries: Float[Tensor, "B d"],
    keys: Float[Tensor, "N d"],
    lengths: Float[Tensor, " N"],
    candidates: Int64[Tensor, "B m"],
    possible: Int64[Tensor, " B"],
    k: int,
) -> Neighbours:
    """The k nearest of each query's own candidates; only the first ``possible`` ones are valid."""
    results = []
    for query, sorted_candidates, many in zip(queries.split(64), candidates.split(64), possible.split(64), strict=True):
        indices = sorted_candidates[:, : max(k, int(many.max()))]
        vectors = torch.index_select(keys, 0, indices.flatten()).to(queries.dtype).view(*indices.shape, -1)
        similarities = torch.bmm(vectors, query.unsqueeze(2)).squeeze(2) / lengths[indices]
        values, order = similarities.topk(k, dim=1)
        results.append(Neighbours(values, indices.gather(1, order)))
    return _joined(results)


def _fill(
    table: Float[Tensor, "T B tile"],
    queries: Float[Tensor, "B d"],
    tiles: Iterable[Float[Tensor, "n d"]],
    blocks: int,
) -> Float[Tensor, "B m"]:
    """Compute similarities with each tile of keys into ``table``, and the maximum of every block.

    Block j has the keys of a tile at j, j + tile / blocks, ...: maxima over rows of a matrix are the fastest.
    """
    maxima = []
    for part, tile in zip(table, tiles, strict=True):
        if len(tile) == table.shape[2]:
            torch.mm(queries, tile.T, out=part)
        else:
            part[:, : len(tile)] = queries @ tile.T
            part[:, len(tile) :] = -torch.inf
        maxima.append(_maxima(part, blocks))
    return torch.cat(maxima, dim=1)


def _maxima(part: Float[Tensor, "B tile"], blocks: int) -> Float[Tensor, "B m"]:
    """The maxima of a tile's blocks, halving it again and again: far faster than a reduction along a dimension."""
    while blocks > 1:
        half = part.shape[1] // 2
        part, blocks = torch.maximum(part[:, :half], part[:, half:]), blocks // 2
    return part


def _select(table: Float[Tensor, "T B tile"], maxima: Float[Tensor, "B m"], k: int) -> Neighbours:
    """The k largest of the table, from the blocks with the k largest maxima."""
    across, (high, wide, _), size = maxima.shape[1] // len(table), table.stride(), table.shape[2]
    # A single index into the table's whole memory is the fastest way to read scattered numbers.
    memory = table.as_strided((table.stride(0) * len(table),), (1,))
    within = torch.arange(0, size, across, device=table.device)
    results = []
    for first, part in zip(range(0, len(maxima), 256), maxima.split(256), strict=True):
        ahead = part.topk(k, dim=1, sorted=False).indices
        query = torch.arange(first, first + len(part), device=table.device).unsqueeze(1)
        starts = ahead // across * high + query * wide + ahead % across
        candidates = (starts.unsqueeze(2) + within).flatten(1)
        values, order = memory.take(candidates).topk(k, dim=1)
        best = candidates.gather(1, order)
        results.append(Neighbours(values, best // high * size + best % wide))
    return _joined(results)


def _blocks(keys: int, k: int, blocking: Blocking) -> int:
    """The number of keys in a block; 1 among few keys, where selection is cheap."""
    return 1 if keys <= blocking.few else min(blocking.tile, 2 ** round(math.log2(math.sqrt(keys / k))))


def _rows(queries: int, keys: int, dtype: torch.dtype, chunk: int, blocking: Blocking) -> int:
    width = math.ceil(keys / blocking.tile) * blocking.tile
    return max(1, min(chunk, queries, blocking.memory // (width * dtype.itemsize)))


def _table(rows: int, keys: int, dtype: torch.dtype, device: torch.device, tile: int) -> Float[Tensor, "T rows tile"]:
    return torch.empty(math.ceil(keys / tile), rows, tile, dtype=dtype, device=device)


def _none(k: int, dtype: torch.dtype, device: torch.device) -> Neighbours:
    return Neighbours(torch.empty(0, k, dtype=dtype, device=device), torch.empty(0, k, dtype=torch.long, device=device))


def _joined(results: list[Neighbours]) -> Neighbours:
    return Neighbours(*(torch.cat(column) for column in zip(*results, strict=True)))
