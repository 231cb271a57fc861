"""Ways to group, and a generator."""

import pytest
import torch

from crosslevel.cld.grouping import normalized_cut, spherical_kmeans

INITS = ["first", "random", "kmeans++"]
BOTH = pytest.mark.parametrize("group", [spherical_kmeans, normalized_cut])
EVERY_INIT = pytest.mark.parametrize("init", INITS)


def generator(seed):
    return torch.Generator().manual_seed(seed)
