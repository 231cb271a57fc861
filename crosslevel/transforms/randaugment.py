"""RandAugment for a whole batch (Cubuk et al., CVPR workshops 2020), as InfoMin uses it.

Each image takes N operations, drawn with repetition from fifteen; each is left out with probability 1/2. Every
operation has one level in [0, 1], noisy around a common magnitude. Operations of one kind are done together for all
images that drew it; none reads a value back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

from crosslevel.transforms import functional as op

SKIP = -1
"""The number for no operation."""

NOISE = 0.05
"""Standard deviation of a level around the magnitude (0.5 of 10 in the authors' code)."""

SHEAR, SHIFT, TURN, ADD = 0.3, 0.45, 30.0, 110 / 255
"""The meaning of level 1: shear, share of the side, degrees, and the value that solarize-add adds."""


def draw_operations(
    count: int, layers: int, magnitude: float, generator: torch.Generator | None
) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Which operation each image takes in each of ``layers`` rounds, and its level in [-1, 1]; both on the CPU.

    Args:
        count: B.
        layers: N, operations an image.
        magnitude: mean of the level's size, in [0, 1]; with noise, it is clipped to [0, 1].
        generator: a CPU generator; None takes torch's own.

    """
    kind = torch.randint(len(OPERATIONS), (count, layers), generator=generator)
    skipped, negative = torch.rand(2, count, layers, generator=generator) < 0.5
    level = (magnitude + NOISE * torch.randn(count, layers, generator=generator)).clamp(0, 1)
    return torch.where(skipped, SKIP, kind), torch.where(negative, -level, level)


def operations_of(
    kind: Int64[Tensor, "B N"],
    skipped: Int64[Tensor, "B N"],
    negative: Int64[Tensor, "B N"],
    noise: Int64[Tensor, "B N"],
    magnitude: float,
) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N"]]:
    """`draw_operations` from random words of 32 bits, on their device: operation, whether it is used, sign, noise."""
    number = (kind * len(OPERATIONS)) >> 32
    normal = torch.special.ndtri((noise.double() + 0.5) * 2.0**-32).float()
    level = (magnitude + NOISE * normal).clamp(0, 1)
    half = 2**31
    return torch.where(skipped < half, SKIP, number), torch.where(negative < half, -level, level)


def rows_by_operation(kind: Int64[Tensor, "B N"]) -> Iterator[Int64[Tensor, " n"]]:
    """The images of each operation: those of the first round in the order of `OPERATIONS`, then the next round's."""
    for layer in kind.unbind(1):
        for number in range(len(OPERATIONS)):
            yield (layer == number).nonzero()[:, 0]


def apply_everywhere(
    x: Float[Tensor, "B 3 H W"], kind: Int64[Tensor, "B N"], level: Float[Tensor, "B N"], fill: Float[Tensor, " 3"]
) -> Float[Tensor, "B 3 H W"]:
    """Apply the operations ``kind`` of each image; each is computed for all images, and selected by a mask."""
    for layer, size in zip(kind.unbind(1), level.unbind(1), strict=True):
        for number, operation in enumerate(OPERATIONS):
            x = torch.where((layer == number).view(-1, 1, 1, 1), operation(x, size, fill), x)
    return x


def apply_(
    x: Float[Tensor, "B 3 H W"],
    groups: Sequence[Int64[Tensor, " n"]],
    level: Float[Tensor, "B N"],
    fill: Float[Tensor, " 3"],
) -> None:
    """Apply operations in place to ``groups`` (see `rows_by_operation`) of images in [0, 1].

    Args:
        x: images.
        groups: the images of every operation of every round, on the images' device.
        level: of every image and round.
        fill: colour of the area that a geometric operation moves into the picture.

    """
    for number, images in enumerate(groups):
        if len(images):
            layer, kind = divmod(number, len(OPERATIONS))
            part = x.index_select(0, images)
            x.index_copy_(0, images, OPERATIONS[kind](part, level.select(1, layer).index_select(0, images), fill))


def autocontrast(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; one of a single value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    room = high - low
    return torch.where(room > 0, (x - low) / torch.where(room > 0, room, 1), x)


def equalize(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Each channel's histogram flattened, in 256 steps."""
    out: Tensor = torchvision.equalize(_steps(x).to(torch.uint8)) / 255
    return out


def invert(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """1 - x."""
    return 1 - x


def rotate(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Turned about the centre by at most 30 degrees."""
    angle = level * math.radians(TURN)
    nothing = torch.zeros_like(angle)
    return _moved(x, [angle.cos(), -angle.sin(), nothing], [angle.sin(), angle.cos(), nothing], fill)


def shear_x(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Rows shifted in proportion to their distance from the top edge."""
    return _moved(x, [1, SHEAR * level, SHEAR * level], [0, 1, 0], fill)


def shear_y(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Columns shifted in proportion to their distance from the left edge."""
    return _moved(x, [1, 0, 0], [SHEAR * level, 1, SHEAR * level], fill)


def translate_x(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Shifted sideways by at most 45 % of the width."""
    return _moved(x, [1, 0, 2 * SHIFT * level], [0, 1, 0], fill)


def translate_y(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Shifted up or down by at most 45 % of the height."""
    return _moved(x, [1, 0, 0], [0, 1, 2 * SHIFT * level], fill)


def posterize(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Only the highest bits of 8 kept: 4 at level 1, 3 below, 0 near level 0."""
    step = 2.0 ** (8 - (4 * level.abs()).floor().view(-1, 1, 1, 1))
    return (_steps(x) / step).floor() * step / 255


def solarize(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Values from a threshold up inverted; none at level 1."""
    return op.solarize(x, (256 * level.abs()).floor() / 255)


def solarize_add(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """The darker half brightened, by at most 110 of 255."""
    added = ((255 * ADD * level.abs()).floor() / 255).view(-1, 1, 1, 1)
    return torch.where(x < 128 / 255, (x + added).clamp(max=1), x)


def color(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Saturation times 0.1 to 1.9."""
    return op.adjust_saturation(x, _factor(level))


def contrast(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Contrast times 0.1 to 1.9."""
    return op.adjust_contrast(x, _factor(level))


def brightness(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Brightness times 0.1 to 1.9."""
    return op.adjust_brightness(x, _factor(level))


def sharpness(x: Tensor, level: Tensor, fill: Tensor) -> Tensor:
    """Difference to a smoothed version times 0.1 to 1.9; the outermost pixels stay."""
    kernel = torch.ones(3, 3, device=x.device, dtype=x.dtype)
    kernel[1, 1] = 5
    smooth = x.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(x.flatten(0, 1).unsqueeze(1), (kernel / 13).view(1, 1, 3, 3)).view(
        *x.shape[:2], x.shape[2] - 2, x.shape[3] - 2
    )
    return torch.lerp(smooth, x, _factor(level).view(-1, 1, 1, 1)).clamp_(0, 1)


Operation = Callable[[Tensor, Tensor, Tensor], Tensor]

OPERATIONS: tuple[Operation, ...] = (
    autocontrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
"""The operations on images (B, 3, H, W) in [0, 1], levels (B,) in [-1, 1] and a fill colour (3,); only geometric ones
use the sign."""


def _factor(level: Tensor) -> Tensor:
    return 1.8 * level.abs() + 0.1


def _steps(x: Tensor) -> Tensor:
    """Round to integer levels, 0 to 255."""
    return (x * 255).round()


def _moved(
    x: Tensor, first: Sequence[Tensor | float], second: Sequence[Tensor | float], fill: Tensor
) -> Float[Tensor, "B 3 H W"]:
    """Each pixel fetched, bilinearly, from where the two rows of an affine map say, in units of half the image."""
    rows = [
        torch.stack([v if isinstance(v, Tensor) else x.new_full((len(x),), v) for v in row], dim=1)
        for row in (first, second)
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    # The area outside is filled with zeros, which are differences from the fill colour here.
    level = fill.view(3, 1, 1)
    return F.grid_sample(x - level, grid, align_corners=False).add_(level)
