"""Sinkhorn and Knopp's scaling: soft assignments of samples to prototypes whose shares are given (Cuturi 2013)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*V B K"],
    epsilon: float,
    iterations: int,
    prior: Float[Tensor, " K"],
    mass: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "*V B K"]:
    """The assignment Q that is close to ``scores`` and gives prototype k the share ``prior`` k of all samples.

    Among all Q with these shares, the one with the largest sum(Q * scores) + epsilon H(Q) is diag(v) exp(scores /
    epsilon) diag(u); u and v are computed alternately, prototypes first (Caron et al. 2020, eq. 3 to 5). No gradient
    passes.

    Args:
        scores: similarities of samples and prototypes; given (V, B, K), each view is assigned separately.
        epsilon: how soft the assignment is.
        iterations: how often u and v are computed; the samples' sums are exact, the prototypes' only after many.
        prior: shares of the prototypes, their sum 1.
        mass: the weight of each sample; equal unless given. A sample of weight 0 is assigned, but does not affect
            others.

    Returns:
        each sample's assignment, of sum 1.

    """
    # The largest is subtracted first: with a small temperature, exp would overflow float32.
    kernel = ((scores - scores.amax((-2, -1), keepdim=True)) / epsilon).exp()
    count = scores.shape[-2]
    weight = scores.new_full((count,), 1.0) if mass is None else mass.to(scores.dtype)
    weight = weight / weight.sum()
    v = weight.expand(scores.shape[:-1])
    u = prior.to(scores.dtype).expand(*scores.shape[:-2], -1)
    for _ in range(iterations):
        u = prior.to(scores.dtype) / (v.unsqueeze(-2) @ kernel).squeeze(-2)
        v = weight / (kernel @ u.unsqueeze(-1)).squeeze(-1)
    scaled = kernel * u.unsqueeze(-2)
    return scaled / scaled.sum(-1, keepdim=True)
