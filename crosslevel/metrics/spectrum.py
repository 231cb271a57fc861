"""The number of directions that features use: published scores that need no labels, for comparison with our own.

All scores take features of any length in any order, and are computed in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslevel.utils.errors import UserError


def rankme(features: Float[Tensor, "N d"], epsilon: float = 1e-7) -> float:
    """RankMe: exp of the entropy of the singular values as shares of their sum, in [1, min(N, d)].

    Garrido, Balestriero, Najman, LeCun, "RankMe", ICML 2023, eq. 1: the effective rank of Roy and Vetterli (2007), of
    features that are not centred. Equal features give 1.
    """
    energy = torch.linalg.eigvalsh(_gram(_checked(features))).clamp(min=0)
    return _exp_entropy(energy.sqrt(), epsilon)


def effective_rank(features: Float[Tensor, "N d"], spread: float = 0.01) -> float:
    """The effective number of directions in which unit features differ: exp of the entropy of their covariance.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, of the eigenvalues of the covariance. If less than the share
    ``spread`` of the energy lies off the features' mean, they count as one point and give 1: the remainder is rounding.
    """
    unit = torch.nn.functional.normalize(_checked(features), dim=1)
    centred = unit - unit.mean(0)
    if float(centred.square().sum(1).mean()) < spread:
        return 1.0
    return _exp_entropy(torch.linalg.eigvalsh(_gram(centred)).clamp(min=0), 0.0)


def alpha_req(features: Float[Tensor, "N d"], floor: float = 1e-6) -> float:
    """alpha-ReQ: α of the power law i^-α that the eigenvalues of the covariance follow; good features have α near 1.

    Agrawal, Mondal, Ghosh, Richards, "α-ReQ", NeurIPS 2022, eq. 1: least squares in logarithms, over the eigenvalues
    above ``floor`` times the largest. Infinite where fewer than two are: all variance is in one direction, or there is
    none.
    """
    x = _checked(features)
    values = torch.linalg.eigvalsh(_gram(x - x.mean(0))).flip(0)
    leading = values[values > floor * values[0].clamp(min=1e-12 * float(x.square().sum()) + 1e-300)]
    if len(leading) < 2:
        return float("inf")
    log_rank = torch.arange(1, len(leading) + 1, dtype=torch.float64).log()
    log_rank = log_rank - log_rank.mean()
    return -float((log_rank * leading.log()).sum() / log_rank.square().sum())


def lidar(a: Float[Tensor, "N d"], b: Float[Tensor, "N d"], delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """LiDAR: the effective rank of linear discriminant analysis with an image's views as its class, in [1, d].

    Thilak et al., "LiDAR", ICLR 2024, eq. 4 to 6, with two views an image: the eigenvalues of
    Σ_w^-1/2 Σ_b Σ_w^-1/2, Σ_b the covariance of the images' means, Σ_w that of views around them plus δ. Equal features
    give 1.
    """
    a, b = _checked(a), _checked(b)
    mean, half = (a + b) / 2, (a - b) / 2
    centred = mean - mean.mean(0)
    within = half.T @ half / len(a) + delta * torch.eye(a.shape[1], dtype=a.dtype)
    values, vectors = torch.linalg.eigh(within)
    whitened = centred @ (vectors * values.rsqrt())
    between = torch.linalg.eigvalsh(_gram(whitened) / len(a)).clamp(min=0)
    if float(between.sum()) < 1e-12:
        return 1.0
    return _exp_entropy(between, epsilon)


def _gram(x: Tensor) -> Tensor:
    return x.T @ x if x.shape[1] <= len(x) else x @ x.T


def _exp_entropy(values: Tensor, epsilon: float) -> float:
    total = float(values.sum())
    if total == 0:
        return 1.0
    shares = values / total + epsilon
    return float(torch.special.entr(shares).sum().exp())


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or not len(features):
        raise UserError(f"features are {tuple(features.shape)}: give (images, dimensions), at least one image")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise UserError(f"{bad} of {len(features)} features are not finite: the training diverged; lower the rate")
    return features.detach().cpu().double()
