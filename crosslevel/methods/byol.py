"""BYOL: Grill, Strub, Altché et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
NeurIPS 2020.

From one view, the trained network predicts its moving average's feature of the other view (eq. 2)::

    L = (2 - 2 cos(q(z_a), z'_b)) + (2 - 2 cos(q(z_b), z'_a))

There are no negatives. The average's momentum grows to 1 over the training (app. A).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, feature_size, in_float32
from crosslevel.methods.memory import MomentumCopy, rising
from crosslevel.models.heads import Head, projection_head

MOMENTUM = 0.996


class BYOL(Method):
    """Each of two views predicts the other's target feature."""

    online = 2
    later = ("momentum",)

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        momentum: float | None = None,
        head: Head = "mlp",
        out_features: int = 256,
        hidden: int | None = None,
    ) -> None:
        """Build the projector, the predictor and the target network.

        Args:
            momentum: of the target network's moving average at the start; it rises to 1. 0.996 unless given; `train`
                chooses it by the number of steps.
            head: projector and predictor: linear, mlp, norm-linear or norm-mlp; MLPs with batch normalization.
            hidden: units of an MLP's hidden layer; twice the encoder's feature size unless given (4096 for ResNet-50,
                as in the paper).

        """
        default_hidden = 2 * feature_size(encoder)
        super().__init__(encoder, head, out_features, hidden, batch_norm=True, usual_hidden=default_hidden)
        self.momentum = momentum
        self.predictor = projection_head(head, out_features, out_features, hidden or default_hidden, batch_norm=True)
        self.target = MomentumCopy(nn.Sequential(encoder, self.branch), MOMENTUM if momentum is None else momentum)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], None]:
        """The symmetric loss, in [0, 8]."""
        targets = [self.encode_target(view) for view in views[:2]]
        with torch.autocast(views[0].device.type, enabled=False):
            a, b = (self.predict(h) for h in features[:2])
            return distance(a, targets[1]) + distance(b, targets[0]), None

    def predict(self, h: Float[Tensor, "B D"]) -> Float[Tensor, "B d"]:
        """q(g(h)): the trained network's prediction of the target's feature."""
        z: Tensor = self.predictor(in_float32(self.branch, h))
        return z

    @torch.no_grad()
    def encode_target(self, view: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B d"]:
        """The target network's features; its head in float32 like the trained one's."""
        encoder, branch = self.target.ema.children()
        h = encoder(view)
        with torch.autocast(view.device.type, enabled=False):
            return in_float32(branch, h)

    def after_step(self, progress: float | Tensor = 0.0, *updates: None) -> None:
        """Move the target network; its momentum is 1 - (1 - m) (cos(pi progress) + 1) / 2."""
        self.target.momentum = rising(MOMENTUM if self.momentum is None else self.momentum, progress)
        self.target.update(nn.ModuleList([self.encoder, self.branch]))


def distance(predicted: Float[Tensor, "B d"], target: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """Eq. 2: the mean squared distance of the features at unit length, 2 - 2 cos."""
    return 2 - 2 * F.cosine_similarity(predicted, target, dim=1).mean()
