"""Views of a whole batch with fixed shapes: every operation is done to all images and kept where it was drawn.

The way of a device that should be told everything in advance, as a GPU: nothing is decided by a value, so that no step
waits and the whole can be captured. The views are those of `grouped`, to rounding.
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
    drawn: Draw,
    augment: Augment,
    size: int,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
) -> Float[Tensor, "B C size size"]:
    """One normalized view of each image, in float32.

    Args:
        images: whole, or crops of ``size`` pixels.
        cropped: whether they are.
        drawn: the parameters, on the images' device.
        augment: which operations there are at all.
        size: height and width of a view.
        mean: of the channels, which normalization subtracts; RandAugment fills with it.
        std: what normalization divides by.

    """
    if cropped:
        x = images.to(torch.float32).div(255)
        x = op.flip(x, drawn.flip) if augment.flip > 0 else x
    else:
        x = op.crop_resize(images, drawn.boxes, size, drawn.flip)
    if augment.jitter > 0:
        x = _jittered(x, drawn, augment)
    if augment.blur > 0:
        taps = op.blur_taps(size, augment.blur_sigma[1])
        x = _kept(drawn.blur, op.gaussian_blur(x, drawn.sigma, taps), x)
    x = randaugment.apply_everywhere(x, drawn.operations, drawn.levels, mean)
    if augment.grayscale > 0:
        x = _kept(drawn.grayscale, op.to_grayscale(x), x)
    if augment.solarize > 0:
        x = _kept(drawn.solarize, torch.where(x >= 0.5, 1 - x, x), x)
    x = op.normalize(x, mean, std)
    if augment.erase > 0:
        x = op.erase(x, drawn.erase_boxes * drawn.erase.unsqueeze(1))
    return x


def _jittered(x: Float[Tensor, "B C H W"], drawn: Draw, augment: Augment) -> Float[Tensor, "B C H W"]:
    """Each image's four operations in its order: those before hue, hue, those after."""
    hue_round = (drawn.order == HUE).int().argmax(dim=1)
    place = torch.arange(3, device=x.device)
    kind = torch.where(place < hue_round.unsqueeze(1), drawn.order[:, :3], drawn.order[:, 1:])
    factor = drawn.factors.gather(1, kind)
    gray, mean = (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST)
    matrix, level = op.mixing(factor, gray, mean, x.shape[1])
    for step in range(3):
        chosen = drawn.jitter & (hue_round > step)
        x = _kept(chosen, op.mix_colors(x, matrix[:, step], level[:, step]), x)
    if augment.hue > 0:
        x = _kept(drawn.jitter, op.adjust_hue(x, drawn.factors[:, HUE]), x)
    for step in range(3):
        chosen = drawn.jitter & (hue_round <= step)
        x = _kept(chosen, op.mix_colors(x, matrix[:, step], level[:, step]), x)
    return x


def _kept(chosen: Bool[Tensor, " B"], new: Shaped[Tensor, "B ..."], old: Shaped[Tensor, "B ..."]) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), new, old)
