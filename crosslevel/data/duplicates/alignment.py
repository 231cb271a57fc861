"""Whether two pictures are the same up to an edit: light, contrast, colour, a crop, a shift or a stamp."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from crosslevel.data.duplicates.descriptor import LUMA, SIDE

# The share of a side that is compared in each of the two: a crop of 3 % on each side leaves 94 %, one of 6 % 88 %.
_ZOOMS = ((1.0, 1.0), (0.94, 1.0), (1.0, 0.94), (0.88, 1.0), (1.0, 0.88))
_REACH = 3  # pixels that two pictures may be shifted
_BORDER = 2  # pixels left out on each side, where a shift brings in nothing
_BLOCKS, _BEST = 4, 12  # how many of the 4 x 4 blocks have to agree: a stamp may cover the others
_POSSIBLE = 0.4  # correlation of whole pictures from which on blocks are compared
_GAIN = 0.02  # correlation from which on a zoom is tried
_FLAT = 2e-3  # edges as weak as rounding
_COLOURLESS = 0.02  # standard deviation of a gray picture's colours, as a share of a pixel's range
_PIECE = 512  # pairs at a time

Pictures = UInt8[Tensor, "P 3 32 32"]
Planes = Float[Tensor, "P c 32 32"]


class Agreement(NamedTuple):
    """Correlation of edges and of colours: 1 if a pair differs by an edit alone, or if one picture has no colours."""

    edges: Float[Tensor, " P"]
    colours: Float[Tensor, " P"]


def agreement(a: Pictures, b: Pictures) -> Agreement:
    """How well pairs of pictures agree in their edges and colours, at the best shift and zoom.

    Edges are the luminance minus a blurred copy: brightness does not change them, contrast multiplies them, and
    correlation (normalized as in Lewis 1995) divides that out. Pictures are aligned by the peak of their correlation
    (Fourier transform), to a fraction of a pixel, each moved by half so that both are equally smooth. Only the 12 of 4
    x 4 blocks that agree best count, so that a stamp does not matter.

    Args:
        a: one picture of each pair.
        b: the other.

    """
    if not len(a):
        return Agreement(torch.zeros(0), torch.zeros(0))
    chunks = [_piece(x, y) for x, y in zip(a.split(_PIECE), b.split(_PIECE), strict=True)]
    return Agreement(torch.cat([part.edges for part in chunks]), torch.cat([part.colours for part in chunks]))


def _piece(a: Pictures, b: Pictures) -> Agreement:
    x, y = a.float() / 255, b.float() / 255
    best = Agreement(_peaks(_edges(_gray(x)), _edges(_gray(y))), torch.ones(len(x)))
    possible = (best.edges >= _POSSIBLE).nonzero()[:, 0]
    if not len(possible):
        return best
    first, second = _gray(x[possible]), _gray(y[possible])
    # Comparing whole pictures at whole pixels is cheap, and shows which zoom to try more closely.
    peaks = torch.stack(
        [_peaks(_edges(_zoomed(first, zoom_x)), _edges(_zoomed(second, zoom_y))) for zoom_x, zoom_y in _ZOOMS]
    )
    gain, choice = (peaks[1:] - peaks[0]).max(0)
    for number, (zoom_x, zoom_y) in enumerate(_ZOOMS):
        close = possible if number == 0 else possible[(choice == number - 1) & (gain > _GAIN)]
        if len(close):
            aligned = _aligned(_zoomed(x[close], zoom_x), _zoomed(y[close], zoom_y))
            better = (aligned.edges > best.edges[close]) | (number == 0)
            for values, new in zip(best, aligned, strict=True):
                values[close] = torch.where(better, new, values[close])
    return best


def _aligned(x: Planes, y: Planes) -> Agreement:
    """The agreement at the best shift."""
    down, across = _shift(_edges(_gray(x)), _edges(_gray(y)))
    x, y = _moved(x, down / 2, across / 2), _moved(y, -down / 2, -across / 2)
    inner = slice(_BORDER, SIDE - _BORDER)
    edges_x, edges_y = (_edges(_gray(side))[:, :, inner, inner] for side in (x, y))
    products = _products(edges_x, edges_y)
    order = (products[0] / (products[1] * products[2]).sqrt().add(_FLAT)).topk(_BEST, dim=1).indices
    cross, first, second = (values.gather(1, order).sum(1) for values in products)
    edges = cross / ((first * second).sqrt() + 4 * _FLAT)
    colours_x, colours_y = (_colours(side)[:, :, inner, inner] for side in (x, y))
    cross, first, second = (values.gather(1, order).sum(1) for values in _products(colours_x, colours_y))
    pixels = _BEST * ((SIDE - 2 * _BORDER) // _BLOCKS) ** 2
    gray = torch.minimum(first, second) < pixels * _COLOURLESS**2
    return Agreement(edges, torch.where(gray, 1.0, cross / (first * second).sqrt().clamp(min=1e-9)))


def _shift(x: Planes, y: Planes) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """The offset of ``x`` from ``y``, down and across: the peak of their correlation, to a fraction of a pixel."""
    peaks = _correlations(x, y)
    peak = peaks[:, 1:-1, 1:-1].flatten(1).argmax(1)
    wide = 2 * _REACH + 1
    row, column, each = peak // wide + 1, peak % wide + 1, torch.arange(len(x))
    down = _vertex(*(peaks[each, row + step, column] for step in (-1, 0, 1)))
    across = _vertex(*(peaks[each, row, column + step] for step in (-1, 0, 1)))
    return row - _REACH - 1 + down, column - _REACH - 1 + across


def _correlations(x: Planes, y: Planes) -> Float[Tensor, "P 9 9"]:
    """The products of ``x`` and ``y`` at shifts of up to 4 pixels in each direction, the unshifted in the middle."""
    spectrum = torch.fft.rfft2(x[:, 0]) * torch.fft.rfft2(y[:, 0]).conj()
    around = torch.arange(-_REACH - 1, _REACH + 2) % SIDE
    products: Tensor = torch.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return products[:, around][:, :, around]


def _peaks(x: Planes, y: Planes) -> Float[Tensor, " P"]:
    """The correlation at the best shift by whole pixels."""
    length = (x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)).clamp(min=_FLAT)
    best: Tensor = _correlations(x, y).flatten(1).amax(1)
    shares: Tensor = best / length
    return shares


def _vertex(before: Tensor, peak: Tensor, after: Tensor) -> Tensor:
    """The maximum of the parabola through three values, at -1, 0 and 1; at most half a step away."""
    bend = (2 * peak - before - after).clamp(min=1e-9)
    return ((after - before) / (2 * bend)).clamp(-0.5, 0.5)


def _moved(x: Planes, down: Float[Tensor, " P"], across: Float[Tensor, " P"]) -> Planes:
    """Resampled (bilinear) ``down`` and ``across`` pixels further; the border is repeated."""
    affine = torch.zeros(len(x), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1
    affine[:, 0, 2], affine[:, 1, 2] = across * 2 / SIDE, down * 2 / SIDE
    return _sampled(x, affine)


def _zoomed(x: Planes, part: float) -> Planes:
    """The middle ``part`` of each side, at the same size."""
    return x if part == 1 else _sampled(x, torch.diag(torch.full((3,), part))[:2].expand(len(x), 2, 3))


def _sampled(x: Planes, affine: Float[Tensor, "P 2 3"]) -> Planes:
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")


def _gray(x: Planes) -> Float[Tensor, "P 1 32 32"]:
    red, green, blue = (x[:, colour] * part for colour, part in enumerate(LUMA))
    return (red + green + blue).unsqueeze(1)  # a third of what a product of matrices takes


def edges_of(images: UInt8[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 1 32 32"]:
    """The edges that are compared: luminance less its mean over 5 x 5 pixels."""
    return _edges(_gray(images.float() / 255))


def _edges(gray: Float[Tensor, "P 1 32 32"]) -> Float[Tensor, "P 1 32 32"]:
    """The luminance less its mean over 5 x 5 pixels, mirrored at the border."""
    mean = _mean_of_five()
    return gray - mean @ gray @ mean.T


@cache
def _mean_of_five() -> Float[Tensor, "32 32"]:
    """The mean over 5 x 5 pixels as a matrix product, several times as fast as pooling."""
    line = F.pad(torch.eye(SIDE).unsqueeze(0), (2, 2), mode="reflect")
    return F.avg_pool1d(line, 5, 1)[0].T.contiguous()


def _colours(x: Planes) -> Float[Tensor, "P 2 32 32"]:
    """Red and blue less the luminance, less their mean over the picture."""
    colours = x[:, 0::2] - _gray(x)
    return colours - colours.mean((2, 3), keepdim=True)


def _products(x: Float[Tensor, "P c n n"], y: Float[Tensor, "P c n n"]) -> list[Float[Tensor, "P 16"]]:
    """Sums of x y, x x and y y over each block."""
    size = math.ceil(x.shape[-1] / _BLOCKS)
    return [F.avg_pool2d((p * q).sum(1, keepdim=True), size).flatten(1) * size**2 for p, q in ((x, y), (x, x), (y, y))]
