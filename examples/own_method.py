"""A method of one's own, trained like the others: Barlow Twins (Zbontar et al. 2021, equation 1).

python examples/own_method.py [IMAGES], or: crosslevel train IMAGES --method examples.own_method.BarlowTwins
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import crosslevel
from crosslevel.methods import Method

OBJECTS = "turntable,classes=4,objects=32,frames=4,size=16"  # generated images: nothing is downloaded


class BarlowTwins(Method):
    """Features that do not change between two views, and do not repeat each other.

    L = sum_i (1 - C_ii)^2 + weight * sum_{i != j} C_ij^2, C the correlation of both views' features in the batch.
    """

    def __init__(
        self, encoder: nn.Module, images: int | None = None, *, weight: float = 0.005, out_features: int = 128
    ) -> None:
        """Build the instance branch.

        Args:
            encoder: the network that is trained.
            images: how many there are: not used.
            weight: of what features have in common.
            out_features: d.

        """
        super().__init__(encoder, "mlp", out_features, hidden=None, batch_norm=True)
        self.weight, self.online = weight, 2

    def forward(self, views, features, index):
        """The loss of the first two views; nothing is kept until the optimizer's step."""
        z_a, z_b = (nn.functional.batch_norm(self.branch(h.float()), None, None, training=True) for h in features)
        correlation = z_a.T @ z_b / len(index)
        off_diagonal = correlation - correlation.diag().diag()
        loss = (1 - correlation.diag()).square().sum() + self.weight * off_diagonal.square().sum()
        return loss, None


def main(images: str = OBJECTS, run: str | None = None, **settings) -> Path:
    """The run's folder."""
    torch.manual_seed(0)
    small = {"epochs": 4, "batch_size": 16, "encoder": {"width": 0.125}} if images == OBJECTS else {}
    return crosslevel.train(images, method=partial(BarlowTwins, weight=0.01), run=run, **{**small, **settings})


if __name__ == "__main__":
    main(*sys.argv[1:])
