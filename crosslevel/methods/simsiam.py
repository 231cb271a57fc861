"""SimSiam: Chen, He, "Exploring Simple Siamese Representation Learning", CVPR 2021.

Each view predicts the other's feature, through which no gradient passes (eq. 1 to 4)::

    L = - 1/2 cos(q(z_a), stop(z_b)) - 1/2 cos(q(z_b), stop(z_a))

There are neither negatives nor a moving average. Batch normalization of the projector's output, and a predictor with a
bottleneck, prevent a collapse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, in_float32
from crosslevel.models.heads import Head, projection_head


class SimSiam(Method):
    """Two views predict each other's feature."""

    online = 2
    sgd_rate: ClassVar[float] = 0.05

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        head: Head = "mlp",
        out_features: int = 2048,
        hidden: int | None = None,
        bottleneck: int | None = None,
    ) -> None:
        """Build projector and predictor.

        Args:
            head: the projector: linear, mlp, norm-linear or norm-mlp; MLPs have two hidden layers with batch
                normalization, and all have it at their output.
            out_features: d; 2,048 in the paper.
            hidden: units of each of the projector's hidden layers; out_features, as in the paper, unless given.
            bottleneck: units of the predictor's hidden layer; a quarter of out_features, as the paper's 512, unless
                given.

        """
        super().__init__(
            encoder, head, out_features, hidden, batch_norm=True, hidden_layers=2, norm_output=True,
            usual_hidden=out_features,
        )  # fmt: skip
        self.bottleneck = bottleneck
        narrow = bottleneck or max(1, out_features // 4)
        self.predictor = projection_head("mlp", out_features, out_features, narrow, batch_norm=True)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], None]:
        """The symmetric loss, in [-1, 1]."""
        with torch.autocast(index.device.type, enabled=False):
            a, b = (in_float32(self.branch, h) for h in features[:2])
            return (distance(self.predictor(a), b) + distance(self.predictor(b), a)) / 2, None


def distance(predicted: Float[Tensor, "B d"], target: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """Eq. 1: the mean of minus the cosine; the target has no gradient."""
    return -F.cosine_similarity(predicted, target.detach(), dim=1).mean()
