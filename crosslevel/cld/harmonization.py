"""Geometric harmonization (GH), an add-on for long-tailed collections, beside a method and beside CLD.

Zhou, Yao, Hong, Zhang, Han, Wang, "Combating Representation Learning Disparity with Geometric Harmonization",
NeurIPS 2023.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslevel.models.schedules.temperature import check_temperature
from crosslevel.models.sinkhorn import sinkhorn
from crosslevel.utils.distributed import gather, rank
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded

if TYPE_CHECKING:  # shapes are for readers: the add-on needs torch alone
    from jaxtyping import Float


@final
class Harmonization(nn.Module):
    """Give each of K surrogate categories the same room, however many images it has.

    The categories are K directions M as far apart as they can be, a simplex. An image's similarities to them are t =
    l2_normalize(M z), z being the instance features, and its prediction is softmax(t / T). Its surrogate label q is
    Sinkhorn's, exp(λ t) scaled to the shares pi that the categories have in the collection, and each view predicts the
    other's::

        L_GH = CE(softmax(t_a / T), q_b) + CE(softmax(t_b / T), q_a)

    The shares are counted: how often each category is the most similar one. The authors keep every image's
    similarities for that, and count every 20 epochs; here the images of each such span are counted as they come, which
    takes no memory for each image and works with streams. Until ``warmup_epochs`` are over it only counts; then the
    loss comes in over ``ramp_epochs``.

    The module returns L_GH times that ramp; the training loop adds it: L = L_I + λ L_G + weight * L_GH. The loop calls
    `begin_step` with the epoch before each step.
    """

    directions: Tensor
    shares: Tensor
    counted: Tensor
    span: Tensor

    def __init__(
        self,
        in_features: int,
        weight: float = 0.0,
        categories: int | None = None,
        temperature: float = 0.1,
        sharpness: float = 20.0,
        iterations: int = 300,
        update_epochs: float | None = None,
        warmup_epochs: float | None = None,
        ramp_epochs: float | None = None,
    ) -> None:
        """Build the categories' directions; nothing here is trained.

        Args:
            in_features: d, the size of the instance features z.
            weight: what the loop multiplies the loss by; 1 in the paper. 0 turns it off.
            categories: K, at most d + 1; 100, as in the paper, or d + 1 where that is less, unless given.
            temperature: T of the predictions; 0.1 in the paper.
            sharpness: λ of the surrogate labels; 20 in the paper.
            iterations: of Sinkhorn's scaling; 300 in the paper.
            update_epochs: epochs between two updates of the categories' shares, which are those of the images seen in
                between; 20 of 1,000 in the paper, a fiftieth of the run, but at least 1, unless given.
            warmup_epochs: epochs without the loss; 500 of 1,000 in the authors' code for CIFAR-100, half of the run
                unless given.
            ramp_epochs: epochs in which the loss comes in after that; 10 of 1,000 in the authors' code, a hundredth of
                the run unless given.

        """
        super().__init__()
        check_temperature(temperature)
        count = min(100, in_features + 1) if categories is None else categories
        if not 2 <= count <= in_features + 1:
            raise UserError(
                f"gh.categories={count} must be from 2 to {in_features + 1}: so many directions of "
                f"{in_features} features are equally far apart: lower it or raise method.out_features"
            )
        times = (update_epochs or 0.0, warmup_epochs or 0.0, ramp_epochs or 0.0)
        if sharpness <= 0 or iterations < 1 or update_epochs == 0 or min(times) < 0:
            raise UserError(
                f"gh.sharpness={sharpness}, gh.iterations={iterations}, gh.update_epochs={update_epochs}, "
                f"gh.warmup_epochs={warmup_epochs}, gh.ramp_epochs={ramp_epochs}: above 0, at least 1, above 0, at "
                "least 0, at least 0"
            )
        self.in_features, self.weight, self.categories, self.temperature = in_features, weight, count, temperature
        self.sharpness, self.iterations, self.update_epochs = sharpness, iterations, update_epochs
        self.warmup_epochs, self.ramp_epochs = warmup_epochs, ramp_epochs
        self.register_buffer("directions", simplex(count, in_features))
        self.register_buffer("shares", torch.full((count,), 1 / count))
        self.register_buffer("counted", torch.zeros(count))
        self.register_buffer("span", torch.zeros(()))
        self.ramp: float | Tensor = 1.0

    @torch.no_grad()
    def begin_step(self, epoch: float | Tensor) -> None:
        """Set the factor of the loss, and update the shares when a span of counting is over."""
        ramp = RAMP if self.ramp_epochs is None else self.ramp_epochs
        done = (epoch - (self.warmup_epochs or 0.0)) / max(ramp, 1e-9)
        self.ramp = done.clamp(0.0, 1.0) if isinstance(done, Tensor) else min(1.0, max(0.0, done))
        spans = epoch / (self.update_epochs or UPDATE)
        span = spans.floor() if isinstance(spans, Tensor) else float(math.floor(spans))
        # On the device: no step reads whether a span ended.
        over = (self.span < span) & (self.counted.sum() > 0)
        self.shares.copy_(torch.where(over, self.counted / self.counted.sum().clamp(min=1), self.shares))
        self.counted.mul_(~over)
        self.span.copy_(span) if isinstance(span, Tensor) else self.span.fill_(span)

    def forward(self, z_a: Float[Tensor, "B d"], z_b: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
        """The loss of two views' unit features, float32 under any autocast; it counts the first view."""
        with torch.autocast(z_a.device.type, enabled=False):
            t = self.similarities(torch.stack([z_a, z_b]))
            gathered = gather(t.detach().transpose(0, 1)).transpose(0, 1)
            # A category without images gets the share `EMPTY`: Sinkhorn's scaling cannot reach a share of 0.
            shares = self.shares.clamp(min=EMPTY)
            labels = sinkhorn(gathered, 1 / self.sharpness, self.iterations, shares / shares.sum())
            local_labels = labels[:, rank() * len(z_a) :][:, : len(z_a)]
            loss = -(local_labels.flip(0) * F.log_softmax(t / self.temperature, dim=2)).sum(2).mean(1).sum()
        if self.training:
            self.count(gathered[0])
        return self.ramp * loss

    def similarities(self, z: Float[Tensor, "*V B d"]) -> Float[Tensor, "*V B K"]:
        """The similarities t of each feature to the categories, at unit length."""
        return F.normalize(z @ self.directions.to(z.dtype).T, dim=-1)

    @torch.no_grad()
    def count(self, t: Float[Tensor, "B K"]) -> None:
        """Add each image to the category that is most similar to it."""
        nearest = t.argmax(1, keepdim=True) == torch.arange(self.categories, device=t.device)
        self.counted.add_(nearest.sum(0))


UPDATE, RAMP = 20.0, 10.0  # epochs, as in the paper, where the length of the run is unknown
EMPTY = 1e-6  # the share of a category without images, beside those that have some


def simplex(categories: int, features: int) -> Float[Tensor, "K d"]:
    """K unit vectors whose cosines are all -1 / (K - 1), the least that is possible for all pairs: K <= d + 1.

    The same sizes give the same vectors. Their orientation is arbitrary, as the features are learned.
    """
    generator = seeded(0)
    centred = torch.eye(categories, dtype=torch.float64) - 1 / categories
    # The corners' differences span K - 1 dimensions; a random rotation spreads them over all features.
    values, vectors = torch.linalg.eigh(centred)
    corners = vectors[:, 1:] * values[1:].sqrt()
    turned = torch.linalg.qr(torch.randn(features, categories - 1, generator=generator, dtype=torch.float64)).Q
    directions: Tensor = corners @ turned.T * math.sqrt(categories / (categories - 1))
    return directions.float()
