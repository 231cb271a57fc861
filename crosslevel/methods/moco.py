"""MoCo: He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning",
CVPR 2020; with an MLP head and stronger views v2 (Chen, Fan, Girshick, He, 2020).

A query q is contrasted with its key k+ against the keys k_i of other images in a queue (eq. 1)::

    L = -log( exp(q . k+ / T) / (exp(q . k+ / T) + sum_i exp(q . k_i / T)) )

The key k+ is another view of q's image, encoded by a moving average of the network (eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, check_splits, encode_in_parts, in_float32
from crosslevel.methods.memory import KeyQueue, MomentumCopy
from crosslevel.models.heads import Head
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.utils.distributed import gather, shuffled, world_size
from crosslevel.utils.errors import UserError

MOMENTUM, QUEUE = 0.999, 4096


class Queued(Method):
    """The base of MoCo and InfoMin: keys by a moving average of the network, and a queue of earlier keys."""

    schedule: Temperature
    later = ("momentum", "queue")
    queue: int | None
    momentum: float | None
    shuffle: bool

    def _remember(self, encoder: nn.Module) -> None:
        """Make the key network and the queue, after all other parts."""
        self.key = MomentumCopy(
            nn.Sequential(encoder, self.branch), MOMENTUM if self.momentum is None else self.momentum
        )
        self.negatives = KeyQueue(QUEUE if self.queue is None else self.queue, self.out_features)

    def complete(self, **values: Any) -> None:
        """Complete the settings; another queue size starts an empty queue."""
        super().complete(**values)
        if "queue" in values:
            self.negatives = KeyQueue(values["queue"], self.out_features)

    def check(self, batch: int, devices: int, images: int | None = None) -> None:
        """Check the batch also against the queue, which takes a whole step's keys at once."""
        super().check(batch, devices, images)
        # For a collection of few batches, a queue of the images outside one batch is enough.
        if self.queue is not None and self.queue < min(batch * devices, (images or math.inf) - batch * devices):
            raise UserError(
                f"method.queue={self.queue} is smaller than the batch of {batch * devices}: raise the queue"
            )

    @property
    def host_decision(self) -> str:
        """Which keys are normalized together."""
        return f"method.splits={self.splits} deals out the keys on the host" if self.splits > 1 else ""

    def encode_key(self, view: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B d"]:
        """The momentum network's unit features."""
        return encode_keys(self.key, view, self.splits, self.shuffle)

    def contrast(self, query: Float[Tensor, "B d"], key: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
        """Eq. 1 with the queue's keys as negatives, at the current temperature."""
        return contrast(query, key, self.negatives, self.schedule.value)

    def early_rise(self, batch: int, steps: int) -> str:
        """The loss rises while the queue fills."""
        return self.negatives.early_rise(batch)

    def after_step(self, progress: float | Tensor = 0.0, *updates: Float[Tensor, "B d"]) -> None:
        """Enqueue this step's keys, of all ranks, and move the key network."""
        for keys in updates:
            self.negatives.enqueue(gather(keys))
        self.key.momentum = MOMENTUM if self.momentum is None else self.momentum
        self.key.update(nn.ModuleList([self.encoder, self.branch]))


class MoCo(Queued):
    """One or more query views against one key view and a queue of earlier keys."""

    extra_views = 1

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.2,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        queue: int | None = None,
        momentum: float | None = None,
        head: Head = "mlp",
        out_features: int = 128,
        hidden: int | None = None,
        online: int = 1,
        shuffle: bool = True,
        splits: int = 1,
    ) -> None:
        """Build the instance branch, the momentum network and the queue.

        Args:
            temperature: T; 0.07 in MoCo, 0.2 in MoCo v2.
            queue: K, the number of negative keys. 4,096 unless given; `train` chooses it by the number of images.
            momentum: m of the key network's moving average. 0.999 unless given; `train` chooses it by the number of
                steps.
            online: number of query views; raised to 2 where another branch compares two trained views.
            shuffle: compute a key on another device than its query (ShuffleBN), so that batch statistics do not reveal
                the pair; this has no effect on one device.
            splits: parts of each device's batch that both networks normalize separately, the queries in the batch's
                order and the keys at random: on one device this equals ShuffleBN on that many devices. The paper's 8
                devices are 8 splits; 1 does not split the batch.

        """
        super().__init__(encoder, head, out_features, hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        self.momentum, self.queue, self.online = momentum, queue, online
        check_splits(splits)
        self.shuffle, self.splits = shuffle, splits
        self._remember(encoder)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B d"]]:
        """The mean loss of the query views; the keys are returned for the queue."""
        positive = self.encode_key(views[self.online])
        losses = [self.contrast(self.project(h), positive) for h in features[: self.online]]
        return torch.stack(losses).mean(), positive


@torch.no_grad()
def encode_keys(
    network: MomentumCopy, view: Float[Tensor, "B 3 h w"], splits: int, shuffle: bool
) -> Float[Tensor, "B d"]:
    """A momentum network's unit features; its head in float32 like the trained one's.

    Args:
        network: a moving average of encoder and head in sequence.
        view: the views to encode.
        splits: random parts of the batch that are normalized separately.
        shuffle: encode the views of other ranks (ShuffleBN).

    """
    encoder, branch = network.ema.children()
    shuffles = splits > 1 or (shuffle and world_size() > 1)
    drawn_views, unshuffle = shuffled(view) if shuffles else (view, None)
    h = encode_in_parts(encoder, drawn_views.contiguous(memory_format=torch.channels_last), splits)
    h = h if unshuffle is None else unshuffle(h)
    with torch.autocast(view.device.type, enabled=False):
        return F.normalize(in_float32(branch, h), dim=1)


def contrast(
    query: Float[Tensor, "B d"], key: Float[Tensor, "B d"], negatives: KeyQueue, temperature: float | Tensor
) -> Float[Tensor, ""]:
    """Eq. 1 for unit vectors: the key of the same row is the positive, the queue has the negatives."""
    attract = (query * key).sum(1, keepdim=True)
    with torch.autocast(query.device.type, enabled=False):
        repel = query @ negatives.keys.T.to(query.dtype)
    logits = torch.cat([attract, repel], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))
