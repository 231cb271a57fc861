"""Seeds made of several numbers: each set of numbers has random numbers of its own."""

from __future__ import annotations

import numpy as np
import torch

from crosslevel.utils.errors import UserError


def mixed(*seeds: int) -> int:
    """One seed for these numbers, 0 or more each, of 64 bits.

    Raises:
        UserError: one is negative.

    """
    if min(seeds) < 0:
        raise UserError(f"seed={min(seeds)}: give 0 or more")
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])


def seeded(seed: int) -> torch.Generator:
    """A generator that begins with this seed, as PyTorch itself takes it."""
    return torch.Generator().manual_seed(seed)


def generator(*seeds: int) -> torch.Generator:
    """A generator for these numbers, independent of those for any others."""
    return seeded(mixed(*seeds))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of 63 bits for one step of one rank; neighbouring arguments give unrelated seeds.

    SplitMix64's finish in place of `mixed`: ``rank`` may be -1, and a run that began with a former version goes on with
    the random numbers that it would have had.
    """
    bits = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (bits ^ (bits >> 31)) & 0x7FFFFFFFFFFFFFFF


def trial_seed(*numbers: int) -> int:
    """A seed of 32 bits, as many as NumPy's RandomState takes, that differs between neighbours.

    Not `mixed`: a study that began with a former version goes on with the trials that it would have had.
    """
    bits = 0x9E3779B9
    for number in numbers:
        bits = (bits ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        bits ^= bits >> 31
    return bits & 0xFFFFFFFF
