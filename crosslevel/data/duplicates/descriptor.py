"""What an image looks like without any training: colours, edges, and how much two pictures differ pixel by pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

SIDE = 32  # pixels of the images that are described and compared
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in the luminance (ITU-R BT.601)
_LEVELS, _ORIENTATIONS, _CELLS = 4, 8, 4
_PIECE = 1024  # pairs compared at a time, so that gray pictures stay in the cache


def describe(images: UInt8[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 192"]:
    """A histogram of 64 colours and one of 8 edge orientations in 4 x 4 cells, of about equal weight.

    Colours enter by the roots of their shares, whose product is the Bhattacharyya coefficient; orientations as in
    histograms of oriented gradients (Dalal and Triggs, CVPR 2005), normalized over the whole image. Nothing is learned.
    """
    x = images.float() / 255
    level = (x * _LEVELS).long().clamp(max=_LEVELS - 1).flatten(2)
    colour = (level * torch.tensor([_LEVELS**2, _LEVELS, 1], device=x.device).view(1, 3, 1)).sum(1)
    share = torch.zeros(len(x), _LEVELS**3, device=x.device)
    share.scatter_add_(1, colour, torch.full(colour.shape, 1 / colour.shape[1], device=x.device))
    gray = x.mean(1)
    across, down = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2], gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
    strength = torch.hypot(across, down)
    angle = torch.atan2(down, across) % math.pi * (_ORIENTATIONS / math.pi)
    around = torch.arange(_ORIENTATIONS, device=x.device).view(1, -1, 1, 1)
    gaps = ((angle.unsqueeze(1) - around + _ORIENTATIONS / 2) % _ORIENTATIONS - _ORIENTATIONS / 2).abs()
    edges = F.adaptive_avg_pool2d((1 - gaps).clamp(min=0) * strength.unsqueeze(1), _CELLS).flatten(1)
    # The constant keeps the noise of flat images from counting as edges.
    return torch.cat([share.sqrt(), edges / (edges.norm(dim=1, keepdim=True) + 0.05)], dim=1)


def outline(images: UInt8[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 64"]:
    """The luminance at 8 x 8 pixels, scaled to mean 0 and length 1: brightness, contrast and colour do not change it.

    The product of two outlines is their correlation. The outline of an image without contrast is zero.
    """
    gray = torch.einsum("bchw,c->bhw", images.float() / 255, torch.tensor(LUMA, device=images.device)).unsqueeze(1)
    coarse = F.avg_pool2d(gray, SIDE // 8).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    return torch.where(coarse.norm(dim=1, keepdim=True) < 1e-3, 0.0, F.normalize(coarse, dim=1))


def mirrored(outlines: Float[Tensor, "B 64"]) -> Float[Tensor, "B 64"]:
    """The outlines of the images seen in a mirror."""
    return outlines.view(-1, 8, 8).flip(2).flatten(1)


def difference(images: UInt8[Tensor, "N 3 32 32"], pairs: Int64[Tensor, "P 2"], reach: int = 2) -> Float[Tensor, " P"]:
    """How much two pictures differ: root mean square over all pixels and colours, 0 to 1, at the best small shift.

    The pictures are compared at half their size, which averages out noise and compression.

    Args:
        images: the pictures.
        pairs: which to compare.
        reach: the largest shift in pixels, in each direction.

    """
    results = []
    for i, j in (part.T for part in pairs.split(_PIECE)):
        results.append(_least(images[i].float() / 255, images[j].float() / 255, reach))
    return torch.cat(results)


def alike(
    images: UInt8[Tensor, "N 3 32 32"], pairs: Int64[Tensor, "P 2"], limit: float, reach: int = 2
) -> Bool[Tensor, " P"]:
    """Whether the `difference` is at most ``limit``; faster than computing it, if most pairs exceed the limit.

    The mean over colours differs at most as much as the colours do (a mean of squares is no less than the square of the
    mean), so that this mean rules out most pairs.
    """
    results = []
    for i, j in (part.T for part in pairs.split(_PIECE)):
        a, b = (_mean_of_colours(images[side]) for side in (i, j))
        results.append(_least(a, b, reach) <= limit + 1e-6)
    possible = torch.cat(results)
    possible[possible.clone()] = difference(images, pairs[possible], reach) <= limit
    return possible


def _mean_of_colours(images: UInt8[Tensor, "P 3 32 32"]) -> Float[Tensor, "P 1 32 32"]:
    red, green, blue = images.float().unbind(1)
    return (red + green + blue).unsqueeze(1) / (3 * 255)


def _least(a: Float[Tensor, "P c 32 32"], b: Float[Tensor, "P c 32 32"], reach: int) -> Float[Tensor, " P"]:
    """The difference at the best shift."""
    a_halves, b_halves = _halves(a), _halves(b)
    best = torch.full((len(a),), torch.inf)
    for down in range(-reach, reach + 1):
        for across in range(-reach, reach + 1):
            best = torch.minimum(best, _distance_at(a_halves, b_halves, down, across))
    return best.sqrt()


def _halves(x: Float[Tensor, "P c 32 32"]) -> dict[tuple[int, int], Tensor]:
    """The pictures at half the size, beginning at pixel 0 or 1 in each direction: this covers all shifts.

    Means of 2 x 2 pixels by sums of rows, then of columns: a third of what four poolings take.
    """
    rows = x[:, :, 1:] + x[:, :, :-1]
    fours = (rows[..., 1:] + rows[..., :-1]) / 4
    return {(v, u): fours[:, :, v::2, u::2].contiguous() for v in (0, 1) for u in (0, 1)}


def _distance_at(
    a: dict[tuple[int, int], Tensor], b: dict[tuple[int, int], Tensor], down: int, across: int
) -> Float[Tensor, " P"]:
    """The mean square of the difference where ``a``, shifted, and ``b`` overlap."""
    height, width = (SIDE - abs(down)) // 2, (SIDE - abs(across)) // 2

    def part(halves: dict[tuple[int, int], Tensor], y: int, x: int) -> Tensor:
        return halves[y % 2, x % 2][:, :, y // 2 : y // 2 + height, x // 2 : x // 2 + width]

    gap = part(a, max(0, down), max(0, across)) - part(b, max(0, -down), max(0, -across))
    return gap.square_().flatten(1).mean(1)
