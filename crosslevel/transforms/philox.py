"""Counter-based random numbers on any device: Philox4x32-10 in tensor operations.

A counter-based generator (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) has no
state: the numbers of image i in step n are a function of (seed, n, i), for any number of images, on any device. Nothing
waits for the host, so that it can be a part of a captured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 bits for each counter of four words, by a key of two; all in int64, and of one shape.

    Products wrap around at 64 bits: an int64 then has the same bits as an unsigned one.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        # Bits that a negative number shifts in from the left are masked away.
        a, c = (
            (high >> 32).bitwise_and_(MASK).bitwise_xor_(b).bitwise_xor_(first),
            ((low >> 32).bitwise_and_(MASK).bitwise_xor_(d).bitwise_xor_(second)),
        )
        b, d = high.bitwise_and_(MASK), low.bitwise_and_(MASK)
        first, second = (first + WEYL[0]) & MASK, (second + WEYL[1]) & MASK
    return a, b, c, d


@dataclass(frozen=True)
class Counted:
    """The random numbers of the images ``index`` in one step of a run with this ``seed``.

    Attributes:
        seed: of the run, 64 bits.
        step: number of the step, below 2^32; a tensor on the images' device if the step is captured.
        index: the images' indices in the source, (B,); the numbers do not depend on positions in the batch.

    """

    seed: int
    step: int | Tensor
    index: Int64[Tensor, " B"]

    def words(self, streams: Sequence[int], count: int, device: torch.device) -> Int64[Tensor, "S B count"]:
        """``count`` words of 32 bits for each image; each stream, a number below 2^16, has others.

        All are drawn in one call: the operations cost more than the numbers, also on a CPU.
        """
        index = self.index.to(device).view(1, -1, 1)
        block = torch.arange(-(-count // 4), device=device)
        blocks = torch.stack([block + (stream << 16) for stream in streams]).unsqueeze(1)
        shape = (len(streams), index.shape[1], len(block))
        step = self.step if isinstance(self.step, Tensor) else torch.full((), self.step, device=device)
        counter = (index & MASK, blocks, step & MASK, index >> 32)
        a, b, c, d = (word.expand(shape) for word in counter)
        words = philox((a, b, c, d), (self.seed & MASK, (self.seed >> 32) & MASK))
        return torch.stack(words, dim=3).flatten(2)[..., :count]


def unit(words: Int64[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Float32 in [0, 1) with 24 bits, as torch.rand has them."""
    return (words >> 8).to(torch.float32).mul_(2.0**-24)


def fine_unit(words: Int64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """Float64 in [0, 1) with 32 bits."""
    return words.to(torch.float64).mul_(2.0**-32)
