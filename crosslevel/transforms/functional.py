"""Image operations on a whole batch, each image with parameters of its own, equal to torchvision's.

Images are float (B, C, H, W) with values in [0, 1], contiguous by channel; a parameter is a (B,) tensor on
the images' device. Functions for hue and saturation take only red, green and blue (C = 3); for other channels,
brightness is their mean. No function loops over images, reads a value back from the device, or changes its input.
Matrix products run in the precision that torch is set to: with TF32 allowed, values are off by up to 1e-3.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from crosslevel.utils.errors import UserError

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a gray value (ITU-R 601, as in torchvision)."""


def crop_resize(
    images: Shaped[Tensor, "B C H W"],
    boxes: Shaped[Tensor, "B 4"],
    size: int,
    mirror: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C size size"]:
    """Box b of image b, resized to (size, size): bilinear with antialiasing, and mirrored where asked.

    Interpolation is linear and separable, so a resized crop is two matrix products with one small matrix an
    image. That is exact for shrinking and enlarging alike, and mirroring costs nothing.

    Args:
        images: uint8 in [0, 255], or float in [0, 1].
        boxes: (top, left, height, width) in pixels, inside the image, at least one pixel high and wide.
        size: height and width of the result.
        mirror: where true, left and right change places after the crop.

    Returns:
        Float32 images in [0, 1].

    """
    height, width = images.shape[-2:]
    top, left, rows, columns = boxes.to(torch.float32).unbind(1)
    if height == width:  # both at once: half as many operations
        mirror = mirror if mirror is None else torch.cat([torch.zeros_like(mirror), mirror])
        start, length = torch.cat([top, left]), torch.cat([rows, columns])
        down, across = _interpolation(start, length, width, size, mirror).chunk(2)
    else:
        down, across = _interpolation(top, rows, height, size), _interpolation(left, columns, width, size, mirror)
    if not images.is_floating_point():
        down.div_(255)
    pixels = images.to(torch.float32).reshape(len(images), -1, width)
    squeezed = torch.bmm(pixels, across.transpose(1, 2)).view(len(images), -1, height, size)
    return torch.matmul(down.unsqueeze(1), squeezed)


def flip(x: Float[Tensor, "B C H W"], mirror: Bool[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """Left and right change places where ``mirror`` is true."""
    return torch.where(_column(mirror), x.flip(-1), x)


def adjust_brightness(x: Float[Tensor, "B C H W"], factor: Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """Values times ``factor`` (>= 0), cut at 1."""
    nothing = torch.zeros_like(factor)
    return mix_colors(x, *mixing(factor, nothing, nothing, x.shape[1]))


def adjust_contrast(x: Float[Tensor, "B C H W"], factor: Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """``factor`` (>= 0) of the image, 1 - ``factor`` of its mean gray value."""
    return mix_colors(x, *mixing(factor, torch.zeros_like(factor), 1 - factor, x.shape[1]))


def adjust_saturation(x: Float[Tensor, "B 3 H W"], factor: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """``factor`` (>= 0) of the image, 1 - ``factor`` of its grayscale version."""
    return mix_colors(x, *mixing(factor, 1 - factor, torch.zeros_like(factor)))


def adjust_hue(x: Float[Tensor, "B 3 H W"], shift: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Hue turned by ``shift``, in [-0.5, 0.5] of the circle; saturation and value (HSV) stay."""
    thirds = torch.round(3 * shift)
    return rotate_hue_(_permute_channels(x, thirds.to(torch.int64)), 6 * shift - 2 * thirds)


def to_grayscale(x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The gray value in all three channels."""
    red, green, blue = x.unbind(1)
    gray = red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return gray.unsqueeze(1).expand_as(x)


def blur_taps(size: int, sigma: float) -> int:
    """Kernel size of a blur of at most ``sigma`` pixels: four deviations to either side, less in a tiny image.

    17 for 2 pixels, which leaves out 6e-5 of the kernel's mass. A tenth of the image (Chen et al. 2020, app. A), which
    is 3 at 32 pixels, lets through 0.35 of white noise's deviation at 2 pixels, where a whole Gaussian leaves 0.14.
    """
    return 2 * min(math.ceil(4 * sigma), size - 1) + 1


def gaussian_blur(x: Float[Tensor, "B C H W"], sigma: Float[Tensor, " B"], taps: int) -> Float[Tensor, "B C H W"]:
    """Gaussian blur of ``sigma`` (> 0) pixels with a kernel of ``taps`` pixels, edges reflected.

    Args:
        x: images, more than ``taps // 2`` pixels high and wide.
        sigma: standard deviation in pixels, one an image.
        taps: kernel size, odd; `blur_taps` has one that is large enough.

    Raises:
        ValueError: ``taps`` is even, or the images are too small for it.

    """
    height, width = x.shape[-2:]
    reach = taps // 2
    if taps % 2 == 0 or reach >= min(height, width):
        raise UserError(
            f"taps={taps} for images of {height}x{width}: choose an odd number below {2 * min(height, width)}"
        )
    steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (steps / sigma.unsqueeze(1)).square(), dim=1)
    down, across = _reflected_band(kernel, height), _reflected_band(kernel, width)
    smooth = torch.bmm(x.reshape(len(x), -1, width), across.transpose(1, 2)).view_as(x)
    return torch.matmul(down.unsqueeze(1), smooth)


def solarize(x: Float[Tensor, "B C H W"], threshold: Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """Values at or above ``threshold`` inverted."""
    return torch.where(x >= _column(threshold), 1 - x, x)


def erase(x: Float[Tensor, "B C H W"], boxes: Shaped[Tensor, "B 4"], value: float = 0.0) -> Float[Tensor, "B C H W"]:
    """``value`` in the box (top, left, height, width; pixels) of each image; an empty box erases nothing."""
    top, left, rows, columns = boxes.view(-1, 4, 1).unbind(1)
    y = torch.arange(x.shape[-2], device=x.device)
    column = torch.arange(x.shape[-1], device=x.device)
    inside_rows = (y >= top) & (y < top + rows)
    inside_columns = (column >= left) & (column < left + columns)
    return x.masked_fill((inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1), value)


def normalize(
    x: Float[Tensor, "B C H W"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "B C H W"]:
    """Channel by channel, minus ``mean``, divided by ``std``."""
    return x.sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def mixing(
    identity: Float[Tensor, "*n"], gray: Float[Tensor, "*n"], mean: Float[Tensor, "*n"], channels: int = 3
) -> tuple[Float[Tensor, "*n C C"], Float[Tensor, "*n C"]]:
    """``identity`` x + ``gray`` gray(x) + ``mean`` mean(gray(x)), as the arguments of ``mix_colors``.

    Brightness, contrast and saturation are all of this form, so that one kernel handles a batch whose images need
    different operations.
    """
    weights = LUMA if channels == len(LUMA) else (1 / channels,) * channels
    luma = torch.cat([identity.new_full((1,), weight) for weight in weights])  # no copy from the host
    eye = torch.eye(channels, device=identity.device, dtype=identity.dtype)
    return identity[..., None, None] * eye + gray[..., None, None] * luma, mean[..., None] * luma


def mix_colors(
    x: Float[Tensor, "B C H W"], matrix: Float[Tensor, "B C C"], level: Float[Tensor, "B C"]
) -> Float[Tensor, "B C H W"]:
    """clamp(matrix x + level · mean colour of x, 0, 1), where x is the colour of a pixel."""
    flat = x.flatten(2)
    offset = torch.bmm(level.unsqueeze(1), flat.mean(2, keepdim=True))
    return torch.baddbmm(offset, matrix, flat).clamp_(0, 1).view_as(x)


def rotate_hue_(x: Float[Tensor, "B 3 H W"], sixths: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """Rotate the hue in place by ``sixths`` of the circle, in [-1, 1].

    Let v be the pixel's largest value, d the middle one and m the smallest. As the hue turns, a channel stays at v
    for a third of the circle, falls to m, stays there for a third, and rises again. Without the holds the ramp is
    2x - d: a step f moves it by (v - m) f, up where the channel before is larger than the one after, else down, and
    clamping to [m, v] restores the holds. As |f| <= 1 the step never passes a whole hold, so this equals the
    way over HSV, without its divisions and cases.
    """
    red, green, blue = x.unbind(1)
    low, high = torch.minimum(red, green), torch.maximum(red, green)
    largest = torch.maximum(high, blue).unsqueeze_(1)
    smallest = torch.minimum(low, blue).unsqueeze_(1)
    middle = torch.maximum(low, torch.minimum(high, blue, out=high), out=low).unsqueeze_(1)
    step = torch.empty_like(x)
    torch.sub(blue, green, out=step[:, 0])
    torch.sub(red, blue, out=step[:, 1])
    torch.sub(green, red, out=step[:, 2])
    torch.copysign(largest - smallest, step, out=step)
    torch.add(middle.neg_(), x, alpha=2, out=x)
    return x.addcmul_(step, _column(sixths)).clamp_(smallest, largest)


def _column(parameter: Shaped[Tensor, " B"]) -> Shaped[Tensor, "B 1 1 1"]:
    return parameter.view(-1, 1, 1, 1)


def _permute_channels(x: Float[Tensor, "B 3 H W"], thirds: Int64[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """A copy in which hue is turned by whole thirds of the circle: the channels change places."""
    channel = torch.arange(3, device=x.device)
    image = torch.arange(len(x), device=x.device).unsqueeze(1)
    rows = (3 * image + (channel - thirds.unsqueeze(1)) % 3).flatten()
    return x.flatten(0, 1).index_select(0, rows).view_as(x)


def _reflected_band(kernel: Float[Tensor, "B taps"], size: int) -> Float[Tensor, "B size size"]:
    """The matrices that convolve ``size`` pixels, reflected at both ends, with one kernel an image.

    A dense matrix product was as fast as a grouped convolution at 224 pixels (23 taps) and faster at 32.
    """
    images, taps = kernel.shape
    reach, padded = taps // 2, size + taps - 1
    band = kernel.new_zeros(images, size, padded)
    band.as_strided((images, size, taps), (size * padded, padded + 1, 1)).copy_(kernel.unsqueeze(1))
    matrix = band[:, :, reach : reach + size]
    matrix[:, :, 1 : reach + 1] += band[:, :, :reach].flip(2)
    matrix[:, :, size - 1 - reach : size - 1] += band[:, :, reach + size :].flip(2)
    return matrix


def _interpolation(
    start: Float[Tensor, " B"],
    length: Float[Tensor, " B"],
    source: int,
    target: int,
    mirror: Bool[Tensor, " B"] | None = None,
) -> Float[Tensor, "B target source"]:
    """Weights that resize pixels [start, start + length) of ``source`` to ``target``.

    A triangle around each target pixel's centre, as wide as the larger of a source and a target pixel
    (antialiased bilinear, as in Pillow and torchvision), cut at the box and brought to sum 1.
    """
    scale = (length / target).unsqueeze(1)
    sharpness = scale.clamp(min=1).reciprocal()
    centre = torch.arange(target, device=start.device) + 0.5
    if mirror is not None:
        centre = torch.where(mirror.unsqueeze(1), target - centre, centre)
    centre = (start.unsqueeze(1) + centre * scale) * sharpness
    pixel = torch.arange(source, device=start.device) + 0.5
    outside = (pixel < start.unsqueeze(1)) | (pixel > (start + length).unsqueeze(1))
    # Far away, so that the triangle is zero there, and the (B, target, source) tensor needs no mask.
    pixel = (pixel * sharpness).masked_fill_(outside, -1e6)
    weights = (pixel.unsqueeze(1) - centre.unsqueeze(2)).abs_()
    weights = torch.rsub(weights, 1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))
