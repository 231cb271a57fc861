"""SwAV: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments", NeurIPS 2020.

Each view predicts the other's soft assignment to K prototypes c_k (eq. 1, 2)::

    L = l(z_a, q_b) + l(z_b, q_a),   l(z, q) = - sum_k q^k log softmax_k(z . c / T)

The assignments q of a batch, and of a queue of earlier features, give each prototype its share of all images (eq. 3 to
5). In the paper every prototype has the same share. A collection with a long tail has no such clusters: after Assran,
Balestriero, Duval et al., "The Hidden Uniform Cluster Prior in Self-Supervised Learning" (ICLR 2023), the shares may
follow a power law, k^-prior. Small crops predict the assignments of both large views, and have no assignments of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, feature_size, scaled_gradient
from crosslevel.methods.memory import KeyQueue
from crosslevel.models.heads import Head, NormLinear
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.models.sinkhorn import sinkhorn
from crosslevel.utils.distributed import gather, rank
from crosslevel.utils.errors import UserError

QUEUE, WIDTH = 3840, 512


class SwAV(Method):
    """Views predict each other's assignment to prototypes, whose shares are given."""

    online = 2
    later = ("queue", "queue_start")
    schedule: Temperature

    shares: Tensor
    filled: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.1,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        prototypes: int = 3000,
        prior: float = 0.0,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int | None = None,
        queue_start: float | None = None,
        freeze: float = 1.0,
        small_views: int = 6,
        head: Head = "mlp",
        out_features: int = 128,
        hidden: int | None = None,
    ) -> None:
        """Build the instance branch, the prototypes and the queues.

        Args:
            temperature: T; 0.1 in the paper.
            temperature_max: where a cosine schedule of T begins, from there to ``temperature`` and back (Kukleva et al.
                2023); constant unless given.
            temperature_period: epochs of the schedule's period; a fifth of the run unless given.
            prototypes: K; 3,000 in the paper.
            prior: the share of the k-th prototype is proportional to k^-prior; 0, the same for each, in the paper, and
                0.25 for a long tail in Assran et al.
            epsilon: how soft assignments are; 0.05 in the paper.
            iterations: of Sinkhorn's scaling; 3 in the paper.
            queue: earlier features of each large view that are assigned together with the batch's, 0 for none; 3,840 in
                the paper at 256 images a step. `train` chooses it by the number of images.
            queue_start: epochs after which the queue is used; 15 of 200 in the paper, the same share of the run unless
                given.
            freeze: epochs in which the prototypes are not trained; 1 in the paper.
            small_views: small crops an image, beside two large ones; 6 in the paper. Their size and area are settings
                of the views.
            head: linear, mlp, norm-linear or norm-mlp; MLPs with batch normalization.
            out_features: d; 128 in the paper.
            hidden: units of an MLP head's hidden layer; 2,048 in the paper, the encoder's feature size, but at least
                512, unless given.

        """
        default_hidden = max(WIDTH, feature_size(encoder))
        super().__init__(encoder, head, out_features, hidden, batch_norm=True, usual_hidden=default_hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        if prototypes < 2 or iterations < 1 or epsilon <= 0 or prior < 0 or small_views < 0:
            raise UserError(
                f"prototypes={prototypes}, iterations={iterations}, epsilon={epsilon}, prior={prior}, "
                f"small_views={small_views}: at least 2, at least 1, above 0, at least 0, at least 0"
            )
        self.epsilon, self.iterations, self.prior = epsilon, iterations, prior
        self.queue, self.queue_start, self.freeze = queue, queue_start, freeze
        self.small_views = self.extra_views = small_views
        self.prototypes, self.centres = prototypes, NormLinear(out_features, prototypes)
        shares = torch.arange(1, prototypes + 1, dtype=torch.float64) ** -prior
        self.register_buffer("shares", (shares / shares.sum()).float(), persistent=False)
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self._begin_queue(QUEUE if queue is None else queue)
        self.moving: float | Tensor = 1.0
        self.queue_counts: float | Tensor = 1.0

    def complete(self, **values: Any) -> None:
        """Complete the settings; another queue size starts empty queues."""
        super().complete(**values)
        if "queue" in values:
            self._begin_queue(values["queue"])

    def _begin_queue(self, size: int) -> None:
        self.earlier = nn.ModuleList([KeyQueue(size, self.out_features) for _ in range(2 if size else 0)])

    def begin_step(self, epoch: float | Tensor = 0.0) -> None:
        """Set whether the prototypes are trained, whether the queue is used, and the temperature."""
        super().begin_step(epoch)
        self.moving = _from(epoch, self.freeze)
        self.queue_counts = _from(epoch, self.queue_start or 0.0)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], list[Float[Tensor, "N d"]]]:
        """The loss: the mean over both assignments, each predicted from all other views.

        Both views' features, of all ranks, are returned for the queues.
        """
        z = [self.project(h) for h in (*features[:2], *self.encode_small(views))]
        with torch.autocast(index.device.type, enabled=False):
            centres = F.normalize(scaled_gradient(self.centres.weight, self.moving), dim=1)
            scores = [rows @ centres.T for rows in z]
            gathered = [gather(rows.detach()) for rows in z[:2]]
            codes = self.assign(gathered, centres.detach(), len(index))
            predicted = [F.log_softmax(s / self.schedule.value, dim=1) for s in scores]
        losses = [-(code * predicted[v]).sum(1).mean() for i, code in enumerate(codes) for v in range(len(z)) if v != i]
        return torch.stack(losses).mean(), gathered

    @torch.no_grad()
    def assign(
        self, gathered: list[Float[Tensor, "N d"]], centres: Float[Tensor, "K d"], batch: int
    ) -> list[Float[Tensor, "B K"]]:
        """The assignments of two views' unit features, computed together with those of all ranks and of the queue.

        Args:
            gathered: the views' features, of all ranks.
            centres: the prototypes' directions.
            batch: B, this rank's images.

        """
        mass, stacked = torch.ones(len(gathered[0]), device=gathered[0].device), torch.stack(gathered)
        if len(self.earlier):
            older = torch.stack([queue.keys.to(stacked.dtype) for queue in self._queues()])
            filled = torch.arange(older.shape[1], device=mass.device) < self.filled
            stacked = torch.cat([stacked, older], dim=1)
            mass = torch.cat([mass, filled * self.queue_counts])
        codes = sinkhorn(stacked @ centres.T, self.epsilon, self.iterations, self.shares, mass)
        first = rank() * batch
        return [view[first : first + batch] for view in codes]

    def _queues(self) -> list[KeyQueue]:
        return [queue for queue in self.earlier if isinstance(queue, KeyQueue)]

    def after_step(self, progress: float | Tensor = 0.0, *updates: list[Float[Tensor, "N d"]]) -> None:
        """Add this step's features, of all ranks, to the queues."""
        for step in updates:
            for queue, rows in zip(self._queues(), step, strict=False):
                queue.enqueue(rows)
            self.filled.copy_((self.filled + len(step[0])).clamp(max=self.queue or QUEUE))


def _from(epoch: float | Tensor, start: float) -> float | Tensor:
    """1 from ``start`` on, 0 before."""
    return (epoch >= start).float() if isinstance(epoch, Tensor) else float(epoch >= start)
