"""Positives from one track: for some images, the second view is drawn from another image of the track.

Pantazis, Brostow, Jones, Mac Aodha, "Focus on the Positives: Self-Supervised Learning for Biodiversity Monitoring",
ICCV 2021 (arXiv 2108.06435): frames of one sequence show the same thing, in ways that no augmentation makes.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import generator

_STREAM = 2  # random stream of (seed, epoch); the order of the images uses another one


class Partners:
    """With ``probability`` another image of an image's track, drawn uniformly; else the image itself.

    The partner of image i in an epoch is drawn from (``seed``, epoch, i) alone, for any batch size and number of ranks.
    An image that is alone in its track has only itself.

    Raises:
        UserError: the probability is outside [0, 1].

    """

    def __init__(self, tracks: Int64[Tensor, " N"], probability: float, seed: int) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"track_positives={probability} must be from 0 to 1")
        self.probability, self.seed, self._epoch = probability, seed, -1
        _, owner, counts = tracks.unique(return_inverse=True, return_counts=True)
        self._order = owner.argsort(stable=True)
        self._length = counts[owner]
        self._first = (counts.cumsum(0) - counts)[owner]
        self._position = torch.empty_like(owner)
        self._position[self._order] = torch.arange(len(owner)) - self._first[self._order]
        self._uniform = torch.empty(0)

    def __call__(self, epoch: int, index: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
        """The partner of each image of ``index`` in ``epoch``."""
        if epoch != self._epoch:
            self._uniform = torch.rand(2, len(self._order), generator=generator(self.seed, epoch, _STREAM))
            self._epoch = epoch
        draw, which = self._uniform[:, index]
        companions = self._length[index] - 1
        step = 1 + torch.minimum((which * companions).long(), (companions - 1).clamp(min=0))
        offset = (self._position[index] + step) % self._length[index]
        return torch.where(
            (draw < self.probability) & (companions > 0), self._order[self._first[index] + offset], index
        )
