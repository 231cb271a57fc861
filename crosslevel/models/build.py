"""Networks of timm, without classifier, and ResNets in any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from crosslevel.utils.errors import UserError
from crosslevel.utils.tensors import without_values

MODERN = (
    "beit", "cait", "coat", "convit", "convnext", "crossvit", "davit", "deit", "edgenext", "eva", "focalnet", "gcvit",
    "hiera", "hieradet_sam2", "mambaout", "metaformer", "mvitv2", "naflexvit", "nest", "pit", "pvt_v2", "rdnet",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "twins", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip
"""Families of timm that are trained with AdamW and stochastic depth, and normalize layers, not batches."""

Init = Literal["timm", "torch"]


def is_modern(architecture: str) -> bool:
    """Whether a network belongs to one of these families: a ViT, a ConvNeXt and the like."""
    name = architecture.removeprefix("timm:").partition(".")[0]
    if not timm.is_model(name):
        return False
    entry = timm.model_entrypoint(name)
    return entry.__module__.rpartition(".")[2] in MODERN


def create(name: str, options: Mapping[str, Any], **more: Any) -> nn.Module:
    """A timm model without classifier; its weights are random unless ``more`` says which.

    Raises:
        UserError: an option that the model does not take.

    """
    if timm.model_entrypoint(name.partition(".")[0]).__module__ == ResNet.__module__:
        options = {**options, "zero_init_last": bool(options.get("zero_init_last"))}
    # The mean of a ViT's tokens is taken after the normalization that its weights with a class token have.
    pooled = {"fc_norm": False} if options.get("global_pool") == "avg" and "fc_norm" not in options else {}
    try:
        model: nn.Module = _without(name, options, pooled, **more)
    except TypeError as error:
        raise UserError(f"encoder.name={name} does not take {' or '.join(options)}: leave it out") from error
    except (AssertionError, ValueError) as error:
        if more and isinstance(error, ValueError):
            raise  # an error of the weights, whose caller reports it
        listed = ", ".join(f"{key} {value}" for key, value in options.items())
        raise UserError(f"encoder.name={name} does not take {listed}: {error}") from error
    return model


def create_narrow(name: str, options: Mapping[str, Any], width: float, zero_init_last: bool | None) -> nn.Module:
    """`create` and `narrow`, without drawing the full-width network's weights, which would take most of the time."""
    with without_values():
        model = create(name, options)
    narrow(model, name, width, zero_init_last)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):  # layers of other kinds
        model = create(name, options)
        narrow(model, name, width, zero_init_last)
    return model


def draw_as_torch(model: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers again, as PyTorch's layers do by themselves."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()


def draw_stem(weight: Tensor, init: Init, generator: torch.Generator) -> None:
    """Draw a small stem's weights: normal by fan-out as timm's, or uniform by fan-in as PyTorch's."""
    if init == "torch":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    else:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)


def _without(name: str, options: Mapping[str, Any], pooled: Mapping[str, Any], **more: Any) -> Any:
    """The timm model without a classifier; ``pooled`` are arguments that only ViTs take, left out for others."""
    try:
        return timm.create_model(name, num_classes=0, **options, **pooled, **more)
    except TypeError:
        if not pooled:
            raise
        return timm.create_model(name, num_classes=0, **options, **more)


def narrow(model: nn.Module, name: str, width: float, zero_init_last: bool | None) -> None:
    """Rebuild a ResNet with ``width`` times the channels, its stem included, in place."""
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise UserError(f"encoder.width={width} is for ResNets with a one-convolution stem; {name} takes 1.0")
    scale, stem = _scaled(width), model.conv1
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, key, scale(child, child is stem))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, nn.BatchNorm2d(max(1, round(child.num_features * width))))
    model.num_features = model.head_hidden_size = max(1, round(model.num_features * width))
    model.init_weights(zero_init_last=bool(zero_init_last))


def _scaled(width: float) -> Callable[[nn.Conv2d, bool], nn.Conv2d]:
    def scale(conv: nn.Conv2d, first: bool) -> nn.Conv2d:
        inputs = conv.in_channels if first else max(1, round(conv.in_channels * width))
        same: Any = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        thin = inputs < _THIN and conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        kind = _Strided if thin else nn.Conv2d
        return kind(inputs, max(1, round(conv.out_channels * width)), bias=conv.bias is not None, **same)

    return scale


class _Strided(nn.Conv2d):
    """A strided 1x1 convolution in two steps: first every other pixel is selected, then convolved.

    The results are the same. In one step, oneDNN's gradient of the weights writes beyond its memory if there are fewer
    channels than a vector holds: float32, channels last, on processors with AVX2 (uxlfoundation/oneDNN issue 6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (B, C, H, W)."""
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


_THIN = 16  # float32 numbers in the longest vector
