"""In which order a source's images are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

WINDOW = 8
"""Blocks that are shuffled together: this many are open at a time, and a batch has images of this many."""


def natural(count: int, generator: torch.Generator) -> Int64[Tensor, " N"]:
    """All images in the order of the source, from a random one on, wrapping around at the end."""
    return torch.arange(count).roll(-int(torch.randint(count, (), generator=generator)))


def permuted(blocks: Sequence[range], generator: torch.Generator) -> Int64[Tensor, " N"]:
    """All images in random order, those of `WINDOW` randomly chosen blocks at a time.

    Images of one window are in random order. Images of different windows are never in one batch, except in the batch at
    the border of two windows. If blocks hold random images, this is as good as a random order of all images.
    """
    order = torch.randperm(len(blocks), generator=generator).tolist()
    windows = []
    for first in range(0, len(order), WINDOW):
        selected = (blocks[b] for b in order[first : first + WINDOW])
        window = torch.cat([torch.arange(block.start, block.stop) for block in selected])
        windows.append(window[torch.randperm(len(window), generator=generator)])
    return torch.cat(windows)


def share(order: Int64[Tensor, " N"], rank: int, world: int) -> Int64[Tensor, " M"]:
    """The ``rank``-th of ``world`` equally long runs: each rank reads its own blocks. The remainder is left out."""
    size = len(order) // world
    return order[rank * size : (rank + 1) * size]
