"""NPID: Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
CVPR 2018.

Every image is a class, and its class weight is a memory v_i of its own feature (eq. 2)::

    L = -log( exp(v_i . z / T) / sum_j exp(v_j . z / T) )

The sum runs over the whole bank, or over the image's own row and m rows drawn from the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, check_splits
from crosslevel.methods.memory import InstanceBank, ShardedBank
from crosslevel.models.heads import Head
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.utils.distributed import gather
from crosslevel.utils.errors import UserError, counted


class NPID(Method):
    """One or more views against the memory bank of all images."""

    per_image = True
    schedule: Temperature

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.1,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        negatives: int | None = None,
        momentum: float = 0.5,
        per_view: bool = False,
        float16: bool = False,
        sharded: bool = False,
        head: Head = "linear",
        out_features: int = 128,
        hidden: int | None = None,
        online: int = 1,
        splits: int = 1,
    ) -> None:
        """Build the instance branch and the bank.

        Args:
            images: N, the number of images: one row of the bank each.
            negatives: m rows drawn anew for each step, uniformly; all rows of the bank unless given.
            momentum: the weight of the old row in the update of an image's row.
            per_view: update the row once for each view in turn, as the authors of CLD do in the backward pass, instead
                of once towards the views' mean; for two views 60 degrees apart this nearly equals a momentum of 0.27.
            float16: keep the bank in float16, at half the memory.
            sharded: spread the bank over the devices of a distributed run; needs ``negatives``.
            online: number of views; raised to 2 where another branch compares two trained views.
            splits: parts of each device's batch that are normalized separately, in the batch's order, as on that many
                devices; 1 does not split the batch.

        """
        super().__init__(encoder, head, out_features, hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        if images is None:
            raise UserError("NPID keeps a row for every image: it needs a source of known length; use MoCo instead")
        if negatives is not None and not 1 <= negatives < images:
            raise UserError(f"negatives={negatives} must be between 1 and the {images} images less one")
        if sharded and negatives is None:
            raise UserError("sharded=True needs negatives=m: the softmax over the whole bank would move all of it")
        self.images, self.negatives = images, negatives
        self.momentum, self.online, self.float16, self.sharded = momentum, online, float16, sharded
        check_splits(splits)
        self.per_view, self.splits = per_view, splits
        bank = InstanceBank(images, out_features, momentum, torch.float16 if float16 else torch.float32)
        self.bank = ShardedBank(bank) if sharded else bank

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], tuple[Int64[Tensor, " B"], Float[Tensor, "V B d"]]]:
        """The mean loss of the views; their features, or their mean, are returned to update the images' rows."""
        projected = [self.project(h) for h in features[: self.online]]
        negatives = None if self.negatives is None else self.bank.draw(self.negatives)
        with torch.autocast(index.device.type, enabled=False):
            losses = [self.discriminate(z, index, negatives) for z in projected]
        detached = torch.stack([z.detach() for z in projected])
        return torch.stack(losses).mean(), (index, detached if self.per_view else detached.mean(0, keepdim=True))

    @property
    def host_decision(self) -> str:
        """A sharded bank looks at the images' numbers."""
        return "method.sharded: which rows of the bank a device has is decided by values" if self.sharded else ""

    def discriminate(
        self, z: Float[Tensor, "B d"], index: Int64[Tensor, " B"], negatives: Int64[Tensor, " m"] | None = None
    ) -> Float[Tensor, ""]:
        """Eq. 2 for unit vectors against the whole bank, or against each image's own row and the negatives'."""
        if negatives is None:
            return F.cross_entropy(z @ self.bank.rows.to(z.dtype).T / self.schedule.value, index)
        positive = (z * self.bank(index).to(z.dtype)).sum(1, keepdim=True)
        negative = z @ self.bank.common(negatives).to(z.dtype).T
        # An image drawn as its own negative would repel itself.
        negative = negative.masked_fill(negatives == index[:, None], -torch.inf)
        return F.cross_entropy(torch.cat([positive, negative], dim=1) / self.schedule.value, torch.zeros_like(index))

    def early_rise(self, batch: int, steps: int) -> str:
        """The loss rises while the bank fills."""
        return (
            f"the loss rises in the first epoch, {counted(steps, 'step')}, until the bank's random rows are replaced "
            "by images' features, which are harder to tell apart"
        )

    def after_step(
        self, progress: float | Tensor = 0.0, *updates: tuple[Int64[Tensor, " B"], Float[Tensor, "V B d"]]
    ) -> None:
        """Move the rows of this step's images, on all ranks, towards their views' features."""
        for index, features in updates:
            gathered = gather(index)
            for z in features:
                self.bank.update(gathered, F.normalize(gather(z), dim=1))
