"""The contract between a method and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.models.heads import Head, projection_head
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.utils.errors import UserError


class Method(nn.Module):
    """An instance-level method: the instance branch's head, its memory and its loss.

    Every method takes the trained encoder and the number of images as its first two arguments and keeps
    each further argument as an attribute of the same name. The loop encodes the first ``online`` views with
    the trained network and hands over all views, those features, and the images' indices.

    Arguments that several methods share are described here alone. The help of a method, ``--method.help NAME``, uses
    this text for an argument that the method's own docstring does not describe.

    Args:
        encoder: the network that is trained, with ``num_features`` D. It is no submodule of the method: the training
            loop owns it.
        head: linear, mlp, norm-linear or norm-mlp.
        out_features: d.
        hidden: units of an MLP head's hidden layer; the encoder's feature size unless given.
        batch_norm: normalize the hidden layer's batch.
        hidden_layers: how many of them an MLP has.
        norm_output: normalize the batch of the head's outputs.
        usual_hidden: the hidden layer's units where ``hidden`` is not given; the encoder's feature size unless given.

    """

    online: int
    """How many views the trained network encodes; they are the first ones."""

    extra_views: int = 0
    """How many further views the method encodes itself."""

    small_views: int = 0
    """How many of the extra views, the ones before the plain ones, are small crops of fewer pixels."""

    plain_views: int = 0
    """How many of the extra views, the last ones, are crops and flips without any change of colour."""

    splits: int = 1
    """The number of parts of a batch that are encoded and normalized separately, as on that many devices."""

    sgd_rate: ClassVar[float] = 0.06
    """A learning rate for SGD at 256 images a batch that suits the method's temperature."""

    usual_optimizer: ClassVar[str] = "sgd"
    """The optimizer that convolutional networks are usually trained with by the method."""

    per_image: ClassVar[bool] = False
    """Whether it stores something for each image of the source: then a run cannot continue with other images."""

    later: ClassVar[tuple[str, ...]] = ()
    """Settings that may be left open, as None, until the numbers of images, steps and epochs are known."""

    loaded: str = ""
    """What further networks it has loaded, and under which licence: told once, and kept with the run's settings."""

    schedule: Temperature | None = None
    """The temperature of its loss, where it may follow a schedule."""

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        out_features: int,
        hidden: int | None,
        batch_norm: bool = False,
        hidden_layers: int = 1,
        norm_output: bool = False,
        usual_hidden: int | None = None,
    ) -> None:
        super().__init__()
        # A tuple, so that the encoder is no submodule: its weights are neither saved nor optimized twice.
        self._trained = (encoder,)
        self.head, self.out_features, self.hidden = head, out_features, hidden
        self.branch = projection_head(
            head, feature_size(encoder), out_features, hidden or usual_hidden, batch_norm, hidden_layers, norm_output
        )

    def set_temperature(
        self, temperature: float, temperature_max: float | None, temperature_period: float | None
    ) -> None:
        """Keep the temperature T of the loss, constant or on a cosine schedule.

        Args:
            temperature: T.
            temperature_max: where a cosine schedule of T begins, from there to ``temperature`` and back (Kukleva et al.
                2023: from 1 to 0.1, for a long tail); constant unless given.
            temperature_period: epochs of the schedule's period; 400 of 2,000 in their code, a fifth of the run unless
                given.

        """
        self.schedule = Temperature(temperature, temperature_max, temperature_period)
        self.temperature, self.temperature_max = temperature, temperature_max
        self.temperature_period = temperature_period

    @property
    def encoder(self) -> nn.Module:
        """The network that is trained."""
        return self._trained[0]

    def train_on(self, encoder: nn.Module) -> None:
        """Replace the trained network by a copy of it; before the first step."""
        self._trained = (encoder,)

    @property
    def host_decision(self) -> str:
        """What of a step is decided on the host, so that it cannot be one CUDA graph; empty if nothing is."""
        return ""

    @property
    def views(self) -> int:
        """How many views of each image the method needs."""
        return self.online + self.extra_views

    def check(self, batch: int, devices: int, images: int | None = None) -> None:
        """Refuse batches that would fail in the first step, before anything is trained.

        Args:
            batch: images a step, on each device.
            devices: how many of them.
            images: number of images in the collection; None if unknown.

        Raises:
            ValueError: the message says what to change.

        """
        if batch < 2 * self.splits:
            raise UserError(
                f"method.splits={self.splits} leaves some parts of the batch of {batch} images less than 2: lower "
                "splits or raise batch_size"
            )

    def open_settings(self) -> tuple[str, ...]:
        """The names of settings that are still left open: see `complete`."""
        return tuple(name for name in self.later if getattr(self, name) is None)

    def complete(self, **values: Any) -> None:
        """Set the settings that were left open; before the first step."""
        for name, value in values.items():
            setattr(self, name, value)

    def piece_size(self, view: int) -> int | None:
        """The size of the pieces that the method cuts out of views of ``view`` pixels; None if it cuts none."""
        return None

    def early_rise(self, batch: int, steps: int) -> str:
        """The reason why the loss rises at first by construction, in one line; empty if it does not.

        Args:
            batch: images a step, of all devices.
            steps: of an epoch.

        """
        return ""

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], Any]:
        """The instance loss of one batch, and the tensors that `after_step` needs; None if it needs none.

        Args:
            views: all views, `views` of them.
            features: the encoder's features of the first `online` views.
            index: which images of the source these are.

        """
        raise NotImplementedError

    def begin_step(self, epoch: float | Tensor = 0.0) -> None:
        """Set what depends on the training's progress, such as a temperature on a schedule.

        Args:
            epoch: passes over the images done so far; a tensor if the step is captured.

        """
        if self.schedule is not None:
            self.schedule.follow(epoch)

    def after_step(self, progress: float | Tensor = 0.0, *updates: Any) -> None:
        """Update the method's memory, after the optimizer's step.

        Args:
            progress: the share of all steps that are done, in [0, 1]; a tensor if the step is captured.
            updates: the second result of `forward`, for each batch whose gradients were in the step.

        """

    def encode_small(self, views: Sequence[Float[Tensor, "B 3 h w"]]) -> list[Float[Tensor, "B D"]]:
        """The trained network's features of the small views, normalized as one batch; empty without small views."""
        small = views[self.views - self.plain_views - self.small_views : self.views - self.plain_views]
        if not small:
            return []
        joined = torch.cat(list(small)).contiguous(memory_format=torch.channels_last)
        return list(self.encoder(joined).chunk(len(small)))

    def project(self, h: Float[Tensor, "B D"]) -> Float[Tensor, "B d"]:
        """The instance features, unit length, float32 (float64 for float64 input) under any autocast."""
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(in_float32(self.branch, h), dim=1)


def in_float32(branch: nn.Module, h: Float[Tensor, "B D"]) -> Float[Tensor, "B d"]:
    """Apply a head in float32 (float64 stays float64); call it with autocast off."""
    z: Tensor = branch(h.to(torch.promote_types(h.dtype, torch.float32)))
    return z


def encode_in_parts(
    encoder: Callable[[Tensor], Tensor], images: Float[Tensor, "B 3 h w"], splits: int
) -> Float[Tensor, "B D"]:
    """The features of a batch, in order, encoded and normalized in ``splits`` separate parts."""
    if splits == 1:
        return encoder(images)
    return torch.cat([encoder(part) for part in images.tensor_split(splits)])


def check_splits(splits: int) -> None:
    """Refuse a number of parts that is not positive."""
    if splits < 1:
        raise UserError(f"splits={splits} must be at least 1")


def feature_size(encoder: nn.Module) -> int:
    """D, the encoder's ``num_features``."""
    features = encoder.num_features
    if not isinstance(features, int):
        raise TypeError(f"the encoder's num_features must be an int, not {features!r}")
    return features


def scaled_gradient(weight: Tensor, moving: float | Tensor) -> Tensor:
    """The weight, with its gradient multiplied by ``moving``: 0 stops learning without changing the operations."""
    return torch.lerp(weight.detach(), weight, moving)
