"""Faster R-CNN (Ren et al. 2015) of torchvision on an encoder's ResNet, as C4 or with a feature pyramid (FPN).

C4 is the detector of the MoCo paper (He et al. 2020, appendix): the layers up to conv4 run on the image, conv5 on each
region, followed by a batch normalization. FPN (Lin et al. 2017) takes the maps of conv2 to conv5.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from crosslevel.models.encoder import Encoder
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import UserError

Kind = Literal["c4", "fpn"]
BatchNorm = Literal["train", "frozen"]

STAGES = ("layer1", "layer2", "layer3", "layer4")
ANCHORS = (2, 4, 8, 16, 32)
"""Sizes of C4's anchors in strides of its map: 32 to 512 pixels at the usual stride of 16."""

PYRAMID_ANCHOR = 8
"""Size of a pyramid's anchors in strides of each level: 32 to 512 pixels at the usual strides of 4 to 64."""


class Sizes(NamedTuple):
    """Sides of the images in pixels: the shorter one is drawn from ``train``; the longer one is at most ``longest``."""

    train: tuple[int, ...] = tuple(range(480, 801, 32))
    test: int = 800
    longest: int = 1333


def detector(
    encoder: Encoder,
    classes: int,
    kind: Kind = "c4",
    *,
    sizes: Sizes | None = None,
    regions: int = 512,
    batchnorm: BatchNorm = "train",
    hardware: Hardware | None = None,
) -> FasterRCNN:
    """A detector that starts from a copy of the encoder's weights; its other layers start from random weights.

    Anchors keep their published ratio to the stride, so that networks with the stem for small images detect objects as
    small as that stem resolves. Convolutions run in the precision of ``hardware``; regions, boxes and losses stay in
    float32.

    Args:
        encoder: a ResNet; its ``view`` gives mean and standard deviation.
        classes: how many, without the background.
        kind: c4 or fpn.
        sizes: of the images; those of the MoCo paper on VOC unless given.
        regions: sampled in each image to train the box head.
        batchnorm: ``train`` fine-tunes the encoder's normalizations with the statistics of each batch (in the paper
            over all devices) and puts them into the new layers too; ``frozen`` keeps the encoder's as they are.
        hardware: precision; float32 unless given.

    Raises:
        ValueError: the encoder is not a ResNet with four stages.

    """
    backbone = _resnet(encoder)
    if batchnorm == "frozen":
        freeze_batchnorm(backbone)
    strides, channels = _maps(backbone)
    builder = _c4 if kind == "c4" else _fpn
    sizes = sizes or Sizes()
    # The means of a view are what GeneralizedRCNNTransform takes off; padding to whole strides keeps maps aligned.
    shared = {
        "min_size": sizes.train, "max_size": sizes.longest, "size_divisible": strides[-1],
        "image_mean": list(encoder.view.mean), "image_std": list(encoder.view.std),
        "box_batch_size_per_image": regions,
    }  # fmt: skip
    model = FasterRCNN(**builder(backbone, classes, strides, channels, batchnorm), **shared)
    _start_predictor(model.roi_heads.box_predictor)
    if hardware is not None and hardware.precision == "bf16":
        model.backbone = _Mixed(model.backbone, hardware)
        model.rpn.head = _Mixed(model.rpn.head, hardware)
        model.roi_heads.box_head = _Mixed(model.roi_heads.box_head, hardware)
    return model


def glance(model: FasterRCNN, side: int) -> None:
    """Call each part with zeros: a lying and a standing image, the shorter side of ``side`` pixels, and two regions."""
    stride = model.transform.size_divisible
    short, long = (math.ceil(pixels / stride) * stride for pixels in (side, 2 * side))
    for shape in ((short, long), (long, short)):
        maps = model.backbone(torch.zeros(1, 3, *shape))
        levels = list(maps.values()) if isinstance(maps, dict) else [maps]
        model.rpn.head(levels)
    pooled = model.roi_heads.box_roi_pool.output_size
    model.roi_heads.box_head(torch.zeros(2, levels[0].shape[1], *pooled))


def freeze_batchnorm(network: nn.Module) -> None:
    """Replace every batch normalization by one with constant statistics, scale and shift."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                fixed = FrozenBatchNorm2d(norm.num_features, norm.eps)
                fixed.load_state_dict(norm.state_dict())
                setattr(parent, name, fixed)


def _resnet(encoder: Encoder) -> Any:
    if not isinstance(encoder.backbone, ResNet) or not all(hasattr(encoder.backbone, stage) for stage in STAGES):
        raise UserError(f"detection takes ResNets (with stages {STAGES[0]} to {STAGES[-1]}), not {encoder.name}")
    if encoder.view.channels != 3:
        raise UserError(f"detection takes images of 3 channels, {encoder.name} those of {encoder.view.channels}")
    return copy.deepcopy(encoder.backbone).requires_grad_(True)


def _maps(backbone: Any) -> tuple[list[int], list[int]]:
    """Stride and channels of the four stages' maps, measured with one small image."""
    size, was_training = 128, backbone.training
    device = next(backbone.parameters()).device
    with torch.no_grad():
        image = torch.zeros(1, 3, size, size, device=device)
        maps: Any = backbone.eval().forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True)
    backbone.train(was_training)
    return [size // level.shape[-1] for level in maps], [level.shape[1] for level in maps]


def _c4(backbone: Any, classes: int, strides: list[int], channels: list[int], batchnorm: BatchNorm) -> dict[str, Any]:
    stem = (backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool)
    trunk: Any = nn.Sequential(*stem, backbone.layer1, backbone.layer2, backbone.layer3)
    trunk.out_channels = channels[2]
    norm = nn.BatchNorm2d(channels[3]) if batchnorm == "train" else nn.Identity()
    anchors = tuple(stride * strides[2] for stride in ANCHORS)
    return {
        "backbone": trunk,
        "rpn_anchor_generator": AnchorGenerator((anchors,), ((0.5, 1.0, 2.0),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 2),
        "box_head": nn.Sequential(backbone.layer4, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(channels[3], classes + 1),
        # One map has all the anchors that a pyramid has on five: detectron2's numbers for C4.
        "rpn_pre_nms_top_n_train": 12_000,
        "rpn_pre_nms_top_n_test": 6_000,
    }


def _fpn(backbone: Any, classes: int, strides: list[int], channels: list[int], batchnorm: BatchNorm) -> dict[str, Any]:
    norm = nn.BatchNorm2d if batchnorm == "train" else None
    levels = {stage: str(i) for i, stage in enumerate(STAGES)}
    sizes = tuple((PYRAMID_ANCHOR * stride,) for stride in (*strides, 2 * strides[-1]))
    return {
        "backbone": BackboneWithFPN(backbone, levels, channels, 256, norm_layer=norm),
        "num_classes": classes + 1,
        "rpn_anchor_generator": AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
    }


def _start_predictor(predictor: Any) -> None:
    """Small weights, so that at first all classes are equally likely and no box moves (Girshick 2015, section 3.1)."""
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)


class _Mixed(nn.Module):
    """A part of the detector that runs in the hardware's precision and returns float32."""

    def __init__(self, inner: nn.Module, hardware: Hardware) -> None:
        super().__init__()
        self.inner, self.hardware = inner, hardware

    def forward(self, maps: Any) -> Any:
        """The wrapped module's output."""
        with self.hardware.autocast():
            result = self.inner(maps)
        return _float32(result)


def _float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    if isinstance(value, dict):
        return type(value)((key, _float32(item)) for key, item in value.items())
    return type(value)(_float32(item) for item in value)
