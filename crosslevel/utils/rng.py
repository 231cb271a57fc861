"""Seeds made of several numbers: each set of numbers has random numbers of its own."""

from __future__ import annotations

import numpy as np
import torch


def mixed(*seeds: int) -> int:
    """One seed for these numbers, 0 or more each, of 64 bits."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])


def generator(*seeds: int) -> torch.Generator:
    """A generator for these numbers, independent of those for any others."""
    return torch.Generator().manual_seed(mixed(*seeds))
