"""How much memory grouping takes."""

import numpy as np
import torch
from grouping_samples import BOTH, EVERY_INIT, generator
from reference import normal
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosslevel.cld.grouping import spherical_kmeans


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@EVERY_INIT
def test_kmeans_stays_under_64_megabytes(init):
    """B = 4096, k = 512, d = 128, forward and backward, by the allocator's own events."""
    z = normal(0, 4096, 128, dtype=torch.float32).requires_grad_()
    with profile(profile_memory=True, use_kineto=True) as profiled:
        spherical_kmeans(z, 512, init=init, generator=generator(0)).centroids.square().sum().backward()
    events = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert 4096 * 512 * 4 < held.max() < 64 * 2**20


@BOTH
def test_no_tensor_has_points_by_groups_by_features(group):
    z = normal(0, 96, 64, dtype=torch.float32).requires_grad_()
    with Largest() as largest:
        group(z, 48, init="kmeans++", generator=generator(0)).centroids.square().sum().backward()
    assert 0 < largest.elements <= 96 * 96
