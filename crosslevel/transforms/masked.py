"""Views of a whole batch with fixed shapes: every operation is applied to all images, and selected by a mask.

This suits a GPU: no decision depends on a value on the device, so that nothing waits for it and the whole can be
captured. The views equal those of `grouped`, up to rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from crosslevel.transforms import functional as op
from crosslevel.transforms import randaugment
from crosslevel.transforms.parameters import CONTRAST, HUE, SATURATION, Augment, Draw

# Floats at a time: 256 megabytes.
CHUNK = 2**26


def view(
    images: UInt8[Tensor, "B C H W"],
    cropped: bool,
    parameters: Draw,
    augment: Augment,
    size: int,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
) -> Float[Tensor, "B C size size"]:
    """One normalized view of each image, in float32.

    Args:
        images: whole, or crops of ``size`` pixels.
        cropped: whether they are crops.
        parameters: the parameters, on the images' device.
        augment: the settings, which say which operations occur at all.
        size: height and width of a view.
        mean: of the channels, which normalization subtracts; RandAugment fills with it.
        std: what normalization divides by.

    """
    if cropped:
        x = images.to(torch.float32).div(255)
        x = op.flip(x, parameters.flip) if augment.flip > 0 else x
    else:
        x = op.crop_resize(images, parameters.boxes, size, parameters.flip)
    if augment.jitter > 0:
        x = _jittered(x, parameters, augment)
    if augment.blur > 0:
        taps = op.blur_taps(size, augment.blur_sigma[1])
        x = _where(parameters.blur, op.gaussian_blur(x, parameters.sigma, taps), x)
    x = randaugment.apply_everywhere(x, parameters.operations, parameters.levels, mean)
    if augment.grayscale > 0:
        x = _where(parameters.grayscale, op.to_grayscale(x), x)
    if augment.solarize > 0:
        x = _where(parameters.solarize, torch.where(x >= 0.5, 1 - x, x), x)
    x = op.normalize(x, mean, std)
    if augment.erase > 0:
        x = op.erase(x, parameters.erase_boxes * parameters.erase.unsqueeze(1))
    return x


def _jittered(x: Float[Tensor, "B C H W"], parameters: Draw, augment: Augment) -> Float[Tensor, "B C H W"]:
    """Each image's four operations in its order: those before hue, hue, those after."""
    hue_round = (parameters.order == HUE).int().argmax(dim=1)
    positions = torch.arange(3, device=x.device)
    kind = torch.where(positions < hue_round.unsqueeze(1), parameters.order[:, :3], parameters.order[:, 1:])
    factor = parameters.factors.gather(1, kind)
    gray, mean = (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST)
    matrix, level = op.mixing(factor, gray, mean, x.shape[1])
    for step in range(3):
        mask = parameters.jitter & (hue_round > step)
        x = _where(mask, op.mix_colors(x, matrix[:, step], level[:, step]), x)
    if augment.hue > 0:
        x = _where(parameters.jitter, op.adjust_hue(x, parameters.factors[:, HUE]), x)
    for step in range(3):
        mask = parameters.jitter & (hue_round <= step)
        x = _where(mask, op.mix_colors(x, matrix[:, step], level[:, step]), x)
    return x


def _where(mask: Bool[Tensor, " B"], new: Shaped[Tensor, "B ..."], old: Shaped[Tensor, "B ..."]) -> Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), new, old)
