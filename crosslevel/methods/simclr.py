"""SimCLR: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020.

NT-Xent over the 2B views z_1 .. z_2B of a batch, where i' is the other view of i's image (eq. 1)::

    L = mean_i -log( exp(z_i . z_i' / T) / sum_{j != i} exp(z_i . z_j / T) )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, feature_size
from crosslevel.models.heads import Head
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.utils.distributed import gather, rank

WIDTH = 512  # least units of the hidden layer, for encoders with fewer features


class SimCLR(Method):
    """Two views of an image attract each other; all other views in the batch, of all ranks, repel."""

    sgd_rate: ClassVar[float] = 0.5
    schedule: Temperature

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.1,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        head: Head = "mlp",
        out_features: int = 128,
        hidden: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        """Build the instance branch.

        Args:
            temperature: T; the paper has 0.1 on ImageNet and 0.5 on CIFAR-10.
            hidden: units of an MLP head's hidden layer; the encoder's feature size, but at least 512, unless given.
            batch_norm: normalize the hidden layer's batch, as the paper's code does.

        """
        default_hidden = max(WIDTH, feature_size(encoder))
        super().__init__(encoder, head, out_features, hidden, batch_norm, usual_hidden=default_hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        self.batch_norm, self.online = batch_norm, 2

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], None]:
        """NT-Xent of the first two views."""
        return nt_xent(self.project(features[0]), self.project(features[1]), self.schedule.value), None


def nt_xent(z_a: Float[Tensor, "B d"], z_b: Float[Tensor, "B d"], temperature: float | Tensor) -> Float[Tensor, ""]:
    """NT-Xent of unit vectors; in a distributed run against the views of all ranks."""
    batch, offset = len(z_a), rank() * len(z_a)
    gathered = torch.cat([gather(z_a), gather(z_b)])
    rows = torch.arange(batch, device=z_a.device) + offset
    own_rows = torch.cat([rows, rows + len(gathered) // 2])
    with torch.autocast(z_a.device.type, enabled=False):
        logits = torch.cat([z_a, z_b]) @ gathered.T / temperature
    logits = logits.scatter(1, own_rows[:, None], -torch.inf)
    return F.cross_entropy(logits, own_rows.roll(batch))
