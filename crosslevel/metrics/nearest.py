"""Exact nearest neighbours among many features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

TILE = 4096  # keys a matrix product: its result is still in the cache when its maxima are taken
MEMORY = 6 * 2**30  # bytes of similarities at a time
FEW = 4096  # keys: among fewer, selecting costs little


def nearest(
    queries: Float[Tensor, "Q d"], keys: Float[Tensor, "N d"], k: int, chunk: int = 1024
) -> tuple[Float[Tensor, "Q k"], Int64[Tensor, "Q k"]]:
    """The k largest cosine similarities of each query, in descending order, and the rows of ``keys`` they are with.

    Selecting k of N numbers takes longer than computing them. So the keys are dealt into blocks of b = sqrt(N / k): the
    k largest similarities lie in the k blocks with the largest maxima, as every block that is ahead of one of theirs
    holds a similarity that is ahead of it. Only the k b similarities in these blocks are sorted.

    Args:
        queries: features of any length.
        keys: features of any length. Half precision takes half the memory; it is multiplied in float32 on a CPU, where
            few processors have faster instructions for it, and as it is elsewhere.
        k: neighbours; all keys where there are fewer.
        chunk: queries at a time, fewer where their similarities would take more than `MEMORY`.

    """
    k = min(k, len(keys))
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    if keys.device.type == "cpu" and dtype.itemsize < torch.float32.itemsize:
        dtype = torch.float32
    width = math.ceil(len(keys) / TILE) * TILE
    # Among few, selecting costs little: every key is a block of its own.
    blocks = 1 if len(keys) <= FEW else min(TILE, 2 ** round(math.log2(math.sqrt(len(keys) / k))))
    rows = max(1, min(chunk, len(queries), MEMORY // (width * dtype.itemsize)))
    table = torch.empty(rows, width, dtype=dtype, device=keys.device)
    values, index = [queries.new_empty(0, k, dtype=dtype)], [torch.empty(0, k, dtype=torch.long, device=keys.device)]
    lengths = torch.cat([tile.to(dtype).norm(dim=1) for tile in keys.split(TILE)]).clamp(min=1e-12)
    for part in F.normalize(queries.to(dtype), dim=1).split(rows):
        similarities = table[: len(part)]
        maxima = _fill(similarities, part, keys, lengths, blocks)
        best, place = _select(similarities, maxima, k)
        values.append(best)
        index.append(place)
    return torch.cat(values), torch.cat(index)


def _fill(
    table: Float[Tensor, "B width"],
    queries: Float[Tensor, "B d"],
    keys: Float[Tensor, "N d"],
    lengths: Float[Tensor, " N"],
    blocks: int,
) -> Float[Tensor, "B m"]:
    """Similarities into ``table``, and the maximum of every block.

    Of a tile's keys, block j has those at j, j + TILE / blocks, ...: maxima over rows of a matrix are the fastest.
    """
    maxima = []
    room = queries.new_empty(TILE, queries.shape[1])  # new memory for every tile costs more than filling it
    for first, tile in zip(range(0, table.shape[1], TILE), keys.split(TILE), strict=True):
        part = table[:, first : first + TILE]
        unit = room[: len(tile)].copy_(tile).div_(lengths[first : first + TILE].unsqueeze(1))
        torch.mm(queries, unit.T, out=part[:, : len(tile)])
        part[:, len(tile) :] = -torch.inf
        maxima.append(part.view(len(queries), blocks, TILE // blocks).amax(1))
    return torch.cat(maxima, dim=1)


def _select(
    table: Float[Tensor, "B width"], maxima: Float[Tensor, "B m"], k: int
) -> tuple[Float[Tensor, "B k"], Int64[Tensor, "B k"]]:
    """The k largest of the table, from the blocks with the k largest maxima."""
    blocks = table.shape[1] // maxima.shape[1]
    across = TILE // blocks
    ahead = maxima.topk(k, dim=1, sorted=False).indices
    firsts = ahead // across * TILE + ahead % across
    candidates = (firsts.unsqueeze(2) + torch.arange(0, TILE, across, device=table.device)).flatten(1)
    values, place = table.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, place)
