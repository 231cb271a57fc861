"""Distillation of features: a small network learns the features of a large, frozen one for the same view.

The head's output q(h) learns the direction of the teacher's feature t, as for the summary features of Ranzinger et al.,
"AM-RADIO: Agglomerative Vision Foundation Model", CVPR 2024 (sec. 3.2)::

    L = mean over views and images of 2 - 2 cos(q(h), t - m)

m is the mean of the teacher's features over the images. Most of a feature is common to all images; without m, a student
that learned only this common part would already have a low loss. m is a moving average over the steps, like DINO's
centre (Caron et al., ICCV 2021, sec. 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import Method, feature_size, in_float32
from crosslevel.methods.byol import distance
from crosslevel.models.heads import Head
from crosslevel.models.named import open_encoder
from crosslevel.utils.distributed import gather
from crosslevel.utils.errors import UserError


class Distill(Method):
    """A student's features of a view, through its head, learn the direction of the teacher's."""

    centre: Tensor
    steps: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        teacher: str | None = None,
        momentum: float = 0.99,
        centred: bool = True,
        head: Head = "mlp",
        hidden: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        """Load the teacher, and build a head to its features.

        Args:
            teacher: the large network: the folder of a run, or weights by name such as
                timm:vit_large_patch14_dinov2.lvd142m; ,size=224 after it sets the size of its input.
            momentum: of the moving average of the teacher's features.
            centred: subtract that average from the teacher's features.
            head: of the student: linear, mlp, norm-linear or norm-mlp.
            hidden: units of an MLP head's hidden layer; the larger of both feature sizes unless given.
            batch_norm: normalize the hidden layer's batch.

        Raises:
            ValueError: no teacher, or none of this name.

        """
        if teacher is None:
            raise UserError("Distill needs a teacher: --method.teacher RUN, or weights by name, such as timm:NAME")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum} must be from 0 to below 1")
        network = open_encoder(teacher).requires_grad_(False)
        channels = getattr(encoder, "view", network.view).channels
        if channels != network.view.channels:
            raise UserError(
                f"method.teacher={teacher} takes {network.view.channels} channels, the images have {channels}"
            )
        default_hidden = max(feature_size(encoder), network.num_features)
        super().__init__(encoder, head, network.num_features, hidden, batch_norm, usual_hidden=default_hidden)
        self.teacher, self.momentum, self.centred = teacher, momentum, centred
        licence = f"licence {network.licence}" if network.licence else ""
        self.loaded = f"teacher {teacher}: {network.loaded or licence}" if network.loaded or licence else ""
        self.batch_norm, self.online = batch_norm, 1
        self.taught_by = (network,)  # the teacher; in a tuple it is no submodule: neither saved nor trained
        # From the student's normalization to the teacher's: view * scale + shift.
        (m, s), (mean, std) = (
            torch.tensor(view[1:]) for view in (getattr(encoder, "view", network.view), network.view)
        )
        self.register_buffer("scale", (s / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((m - mean) / std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("centre", torch.zeros(network.num_features))
        self.register_buffer("steps", torch.zeros(()))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distill:
        self.taught_by[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d"]]:
        """The mean distance of the student's views from the teacher's, in [0, 4].

        The mean of the teacher's features is returned to update their average.
        """
        targets = [self.ask(view) for view in views[: len(features)]]
        mean = gather(torch.cat(targets)).mean(0)
        # In the first steps there is no average yet.
        centre = torch.where(self.steps > 0, self.centre.to(mean.dtype), mean)
        with torch.autocast(views[0].device.type, enabled=False):
            pairs = [
                (in_float32(self.branch, h), t - centre if self.centred else t)
                for h, t in zip(features, targets, strict=True)
            ]
            return torch.stack([distance(q, t) for q, t in pairs]).mean(), mean

    @torch.no_grad()
    def ask(self, view: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B d"]:
        """The teacher's features of a view, resized and normalized for the teacher."""
        teacher = self.taught_by[0]
        resized, size = view * self.scale + self.shift, teacher.view.size
        if view.shape[-1] != size:
            resized = F.interpolate(resized, (size, size), mode="bicubic", antialias=True)
        t: Tensor = teacher(resized.contiguous(memory_format=torch.channels_last))
        return t.to(torch.promote_types(t.dtype, torch.float32))

    @torch.no_grad()
    def after_step(self, progress: float | Tensor = 0.0, *updates: Float[Tensor, " d"]) -> None:
        """Move the average of the teacher's features."""
        for step_mean in updates:
            mean = step_mean.to(self.centre.dtype)
            moved = self.momentum * self.centre + (1 - self.momentum) * mean
            self.centre.copy_(torch.where(self.steps > 0, moved, mean))
            self.steps += 1
