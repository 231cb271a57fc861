"""What an image looks like without any training: colours, edges, and how much two pictures differ pixel by pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

SIDE = 32  # pixels of the images that are described and compared
_LEVELS, _ORIENTATIONS, _CELLS = 4, 8, 4
_PIECE = 2048  # pairs compared at a time: about 100 MB


def describe(images: UInt8[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 192"]:
    """A histogram of 64 colours and one of 8 edge orientations in 4 x 4 cells, of about equal weight.

    Roots of the colours' shares, whose product is the Bhattacharyya coefficient; orientations as in histograms of
    oriented gradients (Dalal and Triggs, CVPR 2005), normalized over the whole image. Nothing is learned.
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
    apart = ((angle.unsqueeze(1) - around + _ORIENTATIONS / 2) % _ORIENTATIONS - _ORIENTATIONS / 2).abs()
    edges = F.adaptive_avg_pool2d((1 - apart).clamp(min=0) * strength.unsqueeze(1), _CELLS).flatten(1)
    # The constant keeps the noise of flat images from counting as edges.
    return torch.cat([share.sqrt(), edges / (edges.norm(dim=1, keepdim=True) + 0.05)], dim=1)


def difference(images: UInt8[Tensor, "N 3 32 32"], pairs: Int64[Tensor, "P 2"], reach: int = 2) -> Float[Tensor, " P"]:
    """How much two pictures differ: root mean square over all pixels and colours, 0 to 1, at the best of small shifts.

    The pictures are compared at half their size, which averages out noise and compression.

    Args:
        images: the pictures.
        pairs: which to compare.
        reach: the largest shift in pixels, in each direction.

    """
    steps = range(-reach, reach + 1)
    found = []
    for part in pairs.split(_PIECE):
        a, b = (images[part[:, side]].float() / 255 for side in (0, 1))
        best = torch.full((len(part),), torch.inf)
        for down in steps:
            for across in steps:
                best = torch.minimum(best, _apart(a, b, down, across))
        found.append(best)
    return torch.cat(found) if found else torch.zeros(0)


def _apart(a: Tensor, b: Tensor, down: int, across: int) -> Float[Tensor, " P"]:
    """The difference where ``a``, shifted, and ``b`` overlap."""
    height, width = SIDE - abs(down), SIDE - abs(across)
    y, x = max(0, down), max(0, across)
    v, u = max(0, -down), max(0, -across)
    gap = a[:, :, y : y + height, x : x + width] - b[:, :, v : v + height, u : u + width]
    return F.avg_pool2d(gap, 2).pow(2).flatten(1).mean(1).sqrt()
