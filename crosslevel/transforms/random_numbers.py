"""The source of the random numbers of views: a generator, or words of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from crosslevel.transforms import philox
from crosslevel.transforms.randaugment import draw_operations, operations_of

if TYPE_CHECKING:
    from crosslevel.transforms.parameters import Augment

TRIES = 10  # torchvision's number of attempts to fit a box into the image


class Numbers(Protocol):
    """The source of the random numbers of one view of B images."""

    def uniform(self, offset: int, columns: int) -> Float[Tensor, "B columns"]:
        """Numbers in [0, 1) from the words at ``offset`` (see `WORDS`)."""

    def box(self, offset: int) -> Float64[Tensor, "B 2*tries+2"]:
        """The random numbers of one box an image: areas, aspect ratios, and the place in the room that is left."""

    def operations(self, layers: int, magnitude: float) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
        """RandAugment's operations and levels, as `draw_operations` has them."""


CHANCE, FACTORS, ORDER, SIGMA, BOX, ERASE, OPERATIONS = 0, 6, 10, 14, 16, 40, 64
"""The offset of each parameter's words among the words of a view."""


class InTurn(NamedTuple):
    """Numbers from a generator on the CPU, in the order of the calls."""

    images: int
    generator: torch.Generator | None

    def uniform(self, offset: int, columns: int) -> Float[Tensor, "B columns"]:
        """The next ones."""
        return torch.rand(self.images, columns, generator=self.generator)

    def box(self, offset: int) -> Float64[Tensor, "B 2*tries+2"]:
        """The next ones."""
        return torch.rand(self.images, 2 * TRIES + 2, generator=self.generator, dtype=torch.float64)

    def operations(self, layers: int, magnitude: float) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
        """The next ones."""
        return draw_operations(self.images, layers, magnitude, self.generator)


class Words(NamedTuple):
    """Numbers made of an image's own words of 32 bits, on the words' device; see `transforms.philox`."""

    words: Int64[Tensor, "B n"]

    @staticmethod
    def needed(augment: Augment) -> int:
        """The number of words for each image."""
        if augment.randaugment:
            return OPERATIONS + 4 * augment.randaugment
        return OPERATIONS if augment.erase > 0 else ERASE

    def uniform(self, offset: int, columns: int) -> Float[Tensor, "B columns"]:
        """Numbers from the words at ``offset``."""
        return philox.unit(self.words[:, offset : offset + columns])

    def box(self, offset: int) -> Float64[Tensor, "B 2*tries+2"]:
        """Numbers from the words at ``offset``."""
        return philox.fine_unit(self.words[:, offset : offset + 2 * TRIES + 2])

    def operations(self, layers: int, magnitude: float) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
        """Numbers from the last words."""
        words = self.words[:, OPERATIONS : OPERATIONS + 4 * layers].unflatten(1, (4, layers))
        kind, skipped, negative, noise = words.unbind(1)
        return operations_of(kind, skipped, negative, noise, magnitude)
