"""A few numbers for each picture, which rule out most pairs at a tenth of the cost of a whole comparison."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from crosslevel.data.duplicates.alignment import edges_of
from crosslevel.data.duplicates.descriptor import SIDE

REACH = 2  # pixels that two pictures may be shifted
_SHIFTS = range(-REACH, REACH + 1)
_BLOCK = 4  # pixels of a block's side
_COUNT = (SIDE - REACH) // _BLOCK  # blocks of a side, wherever the first one starts
_ROUNDING = 1e-3  # rounding error of a difference of two block means in half precision
_SIMILAR = 0.2  # correlation of edges at half the size from which on a pair is aligned
_PIECE = 1024  # pairs at a time: in the cache

Blocks = Float[Tensor, "B 3 3 49"]
Halves = Float[Tensor, "B 16 16"]


def blocks(images: UInt8[Tensor, "B 3 32 32"]) -> Blocks:
    """Means of 4 x 4 pixels over all colours, of 7 x 7 blocks, 0 to 1, in half precision.

    ``[:, y, x]`` has the blocks whose first one starts ``y`` pixels from the top and ``x`` from the left.
    """
    gray = images.sum(1, dtype=torch.float32) / (3 * 255)
    starts = range(REACH + 1)
    stop = _COUNT * _BLOCK
    shifted = [
        gray[:, y : y + stop, x : x + stop].unflatten(2, (_COUNT, _BLOCK)).sum(3).unflatten(1, (_COUNT, _BLOCK)).sum(2)
        for y, x in itertools.product(starts, starts)
    ]
    means: Tensor = torch.stack(shifted, 1).unflatten(1, (len(starts), len(starts))).flatten(3) / _BLOCK**2
    return means.half()


def maybe_alike(blocks: Blocks, pairs: Int64[Tensor, "P 2"], limit: float) -> Bool[Tensor, " P"]:
    """False where the `descriptor.difference` at every shift of up to 2 pixels is certainly above ``limit``.

    Means over blocks differ at most as much as their pixels do (Jensen's inequality), so that their mean square
    difference bounds that of the pixels from below.
    """
    results = []
    for i, j in (part.T for part in pairs.split(_PIECE)):
        a, b = blocks[i].float(), blocks[j].float()
        least = torch.full((len(a),), torch.inf)
        for down, across in itertools.product(_SHIFTS, _SHIFTS):
            gap = a[:, max(0, down), max(0, across)] - b[:, max(0, -down), max(0, -across)]
            # The number of compared pixels, and of those that lie in blocks.
            compared = (SIDE - abs(down)) // 2 * 2 * ((SIDE - abs(across)) // 2 * 2)
            share = (_COUNT * _BLOCK) ** 2 / compared
            least = torch.minimum(least, gap.square_().mean(1) * share)
        results.append(least.sqrt() <= limit + _ROUNDING)
    return torch.cat(results) if results else torch.zeros(0, dtype=torch.bool)


def halves(images: UInt8[Tensor, "B 3 32 32"]) -> Halves:
    """The edges (`alignment.edges_of`) at half the size, of length 1, in half precision; zero if there are none."""
    edges: Tensor = torch.nn.functional.avg_pool2d(edges_of(images), 2)[:, 0]
    length: Tensor = edges.flatten(1).norm(dim=1).clamp(min=1e-3).view(-1, 1, 1)
    return (edges / length).half()


def maybe_edited(halves: Halves, pairs: Int64[Tensor, "P 2"], mirror: bool = False) -> Bool[Tensor, " P"]:
    """False where edges at half the size agree too little, at each shift of a pixel there, to be worth aligning.

    This is not a bound: copies that `alignment.agreement` finds have a correlation of 0.3 or more here, and 99 of 100
    other pairs have one below 0.2 (100,000 pictures of `benchmarks/large/scale_duplicates.py`).
    """
    results = []
    last = SIDE // 2 - 1
    for i, j in (part.T for part in pairs.split(_PIECE)):
        a, b = halves[i].float(), halves[j].float()
        b = b.flip(2) if mirror else b
        inner, best = a[:, 1:last, 1:last], torch.full((len(a),), -1.0)
        for down, across in itertools.product(range(3), range(3)):
            window = b[:, down : down + last - 1, across : across + last - 1]
            best = torch.maximum(best, (inner * window).flatten(1).sum(1))
        results.append(best >= _SIMILAR)
    return torch.cat(results) if results else torch.zeros(0, dtype=torch.bool)
