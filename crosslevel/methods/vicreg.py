"""VICReg: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
ICLR 2022.

Two views' features Z and Z' (n rows of d) agree, no dimension loses its variance, and no two are correlated (eq. 6)::

    L = λ s(Z, Z') + μ [v(Z) + v(Z')] + ν [c(Z) + c(Z')]
    v(Z) = 1/d sum_j max(0, 1 - sqrt(Var(z^j) + 1e-4))             (eq. 1)
    c(Z) = 1/d sum_{i != j} C(Z)_ij^2,  C the covariance, by n - 1  (eq. 3, 4)
    s(Z, Z') = the mean squared difference

There are no negatives and no moving average. Two details follow the authors' code, for which the published weights of
25, 25 and 1 are meant: s is a mean over the dimensions as well (eq. 5 sums over them), and the two v count half each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, in_float32
from crosslevel.models.heads import Head
from crosslevel.utils.distributed import gather

EPSILON = 1e-4  # added under the root of a variance


class VICReg(Method):
    """Two views' features agree; their variances and covariances are regularized, over the batches of all ranks."""

    online = 2
    usual_optimizer: ClassVar[str] = "lars"  # as published (section 4.2): with SGD, c, of fourth powers, diverges

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        head: Head = "mlp",
        out_features: int = 2048,
        hidden: int | None = None,
    ) -> None:
        """Build the expander.

        Args:
            invariance: λ, of the two views' difference; 25 in the paper.
            variance: μ, of each dimension's deviation, whose target is 1; 25 in the paper.
            covariance: ν, of the correlation between dimensions; 1 in the paper.
            head: the expander: linear, mlp, norm-linear or norm-mlp; MLPs have two hidden layers with batch
                normalization.
            out_features: d; 8,192 in the paper, with ResNet-50's 2,048 features.
            hidden: units of each hidden layer; out_features, as in the paper, unless given.

        """
        super().__init__(
            encoder, head, out_features, hidden, batch_norm=True, hidden_layers=2, usual_hidden=out_features
        )
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], None]:
        """The three terms of the first two views."""
        with torch.autocast(index.device.type, enabled=False):
            a, b = (in_float32(self.branch, h) for h in features[:2])
            invariance = F.mse_loss(a, b)
            (variance_a, covariance_a), (variance_b, covariance_b) = (spread(gather(z)) for z in (a, b))
        loss = (
            self.invariance * invariance
            + self.variance * (variance_a + variance_b) / 2
            + self.covariance * (covariance_a + covariance_b)
        )
        return loss, None


def spread(z: Float[Tensor, "n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The terms v and c of one view's features: how far deviations are below 1, and the squared covariances."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    variances = covariance.diagonal()
    variance = F.relu(1 - (variances + EPSILON).sqrt()).mean()
    return variance, (covariance - variances.diag_embed()).square().sum() / z.shape[1]
