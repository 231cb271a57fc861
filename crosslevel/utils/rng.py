"""Seeds made of several numbers, with independent random numbers for each combination."""

from __future__ import annotations

import numpy as np
import torch

from crosslevel.utils.errors import UserError


def mixed(*seeds: int) -> int:
    """A seed of 64 bits for these numbers, each 0 or more.

    Raises:
        UserError: one is negative.

    """
    if min(seeds) < 0:
        raise UserError(f"seed={min(seeds)}: give 0 or more")
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])


def seeded(seed: int) -> torch.Generator:
    """A generator with this seed, used directly by PyTorch."""
    return torch.Generator().manual_seed(seed)


def generator(*seeds: int) -> torch.Generator:
    """A generator for these numbers, independent of those for any others."""
    return seeded(mixed(*seeds))


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of 63 bits for one step of one rank; neighbouring arguments give unrelated seeds.

    It uses SplitMix64's finalizer instead of `mixed`: ``rank`` may be -1, and a run that began with a former version
    continues with the same random numbers.
    """
    bits = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return (bits ^ (bits >> 31)) & 0x7FFFFFFFFFFFFFFF


def trial_seed(*numbers: int) -> int:
    """A seed of 32 bits, as many as NumPy's RandomState takes, that differs between neighbours.

    It does not use `mixed`, so that a study that began with a former version continues with the same trials.
    """
    bits = 0x9E3779B9
    for number in numbers:
        bits = (bits ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        bits ^= bits >> 31
    return bits & 0xFFFFFFFF
