"""The random parameters of views: the settings of an augmentation, and one draw for each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from crosslevel.transforms.random_numbers import (
    BOX,
    CHANCE,
    ERASE,
    FACTORS,
    ORDER,
    SIGMA,
    TRIES,
    InTurn,
    Numbers,
    Words,
)
from crosslevel.utils.errors import UserError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The columns of ``Draw.factors`` and the values of ``Draw.order``."""

ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Area and aspect ratio of an erased box (Zhong et al. 2017, as in torchvision)."""


@dataclass(frozen=True)
class Augment:
    """How one view of an image is drawn. Operations happen in the order of the fields, but colour is dropped after the
    blur, with which it commutes, and after RandAugment.

    Attributes:
        scale: smallest and largest area of the crop, as a share of the image.
        ratio: smallest and largest width / height of the crop.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter: the next four, in a random order for each image.
        brightness: factor uniform in [1 - brightness, 1 + brightness], never negative.
        contrast: likewise.
        saturation: likewise.
        hue: shift uniform in [-hue, hue] of the circle; at most 0.5.
        grayscale: probability of dropping the colour.
        blur: probability of a Gaussian blur; its kernel holds four standard deviations to either side.
        blur_sigma: smallest and largest standard deviation of the blur in pixels.
        randaugment: operations of RandAugment an image, after the blur and before the colour is dropped.
        magnitude: of RandAugment's operations, in [0, 10].
        solarize: probability of inverting values from 0.5 up (128 of 255 and up in whole levels).
        erase: probability of erasing a box, after normalization, to 0: the data set's mean colour.
        crop: False takes the largest centred square in place of a random crop.

    Raises:
        ValueError: a setting is outside its range; the message names it.

    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    randaugment: int = 0
    magnitude: float = 10.0
    solarize: float = 0.0
    erase: float = 0.0
    crop: bool = True

    def __post_init__(self) -> None:
        unit = (0.0, 1.0)
        ranges = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize", "erase"), unit)
        strengths = dict.fromkeys(("brightness", "contrast", "saturation"), (0.0, math.inf))
        for name, (low, high) in {**ranges, **strengths, "hue": (0.0, 0.5), "magnitude": (0.0, 10.0)}.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value} is outside its range: choose a number in [{low}, {high}]")
        if self.randaugment < 0:
            raise UserError(f"randaugment={self.randaugment}: give the number of operations, 0 for none")
        for name, most in (("scale", 1.0), ("ratio", math.inf), ("blur_sigma", math.inf)):
            first, last = getattr(self, name)
            if not 0 < first <= last <= most:
                raise UserError(f"{name}=({first}, {last}): give smallest and largest, above 0 and at most {most}")


@dataclass(frozen=True)
class Draw:
    """The parameters of one view of B images.

    Attributes:
        boxes: crop (top, left, height, width) in pixels, whole numbers.
        flip: mirrored or not.
        jitter: colours jittered or not.
        factors: of brightness, contrast and saturation, and the shift of hue.
        order: which of the four comes first, second, third, last.
        grayscale: colour dropped or not.
        blur: blurred or not.
        sigma: standard deviation of the blur in pixels.
        operations: of RandAugment, by their number; -1 for none.
        levels: of these operations, in [-1, 1].
        solarize: solarized or not.
        erase: erased or not.
        erase_boxes: (top, left, height, width) in pixels of the view; empty where no box fitted or none is ever erased.

    """

    boxes: Float[Tensor, "B 4"]
    flip: Bool[Tensor, " B"]
    jitter: Bool[Tensor, " B"]
    factors: Float[Tensor, "B 4"]
    order: Int64[Tensor, "B 4"]
    grayscale: Bool[Tensor, " B"]
    blur: Bool[Tensor, " B"]
    sigma: Float[Tensor, " B"]
    operations: Int64[Tensor, "B N"]
    levels: Float[Tensor, "B N"]
    solarize: Bool[Tensor, " B"]
    erase: Bool[Tensor, " B"]
    erase_boxes: Float[Tensor, "B 4"]

    @staticmethod
    def joined(draws: Sequence[Draw]) -> Draw:
        """Several draws as one, in this order."""
        return Draw(**{field.name: torch.cat([getattr(d, field.name) for d in draws]) for field in fields(Draw)})

    def part(self, first: int, count: int) -> Draw:
        """The draw of some images in sequence."""
        return Draw(**{field.name: getattr(self, field.name)[first : first + count] for field in fields(self)})

    def to(self, device: torch.device) -> Draw:
        """Move the parameters to a device, without waiting for the copies."""
        return Draw(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})

    def sorted_by(self, index: Int64[Tensor, " B"]) -> Draw:
        """Reorder the images' parameters."""
        return Draw(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def draw(
    augment: Augment, count: int, height: int, width: int, size: int, generator: torch.Generator | Words | None
) -> Draw:
    """Parameters of a view of (size, size) pixels for ``count`` images of (height, width), independent.

    With a generator, every call uses the same number of random numbers for each N of RandAugment, whatever the other
    settings. With an image's words, each parameter has its own word, and nothing waits for the device.
    """
    numbers: Numbers = generator if isinstance(generator, Words) else InTurn(count, generator)
    flip, jitter, grayscale, blur, solarize, erase = numbers.uniform(CHANCE, 6).unbind(1)
    low, high = augment.blur_sigma
    operations, levels = numbers.operations(augment.randaugment, augment.magnitude / 10)
    return Draw(
        boxes=_boxes(augment, numbers.box(BOX), height, width),
        flip=flip < augment.flip,
        jitter=jitter < augment.jitter,
        factors=_factors(augment, numbers.uniform(FACTORS, 4)),
        order=numbers.uniform(ORDER, 4).argsort(dim=1, stable=True),
        grayscale=grayscale < augment.grayscale,
        blur=blur < augment.blur,
        sigma=numbers.uniform(SIGMA, 1)[:, 0] * (high - low) + low,
        operations=operations,
        levels=levels,
        solarize=solarize < augment.solarize,
        erase=erase < augment.erase,
        # Drawn in any case, so that the generator's later numbers do not depend on this setting.
        erase_boxes=_erase_boxes(numbers, count, size, augment.erase > 0, flip.device),
    )


def draw_boxes(
    augment: Augment, count: int, height: int, width: int, generator: torch.Generator | None
) -> Float[Tensor, "B 4"]:
    """Crops (top, left, height, width) by the law of torchvision's RandomResizedCrop.

    Area uniform in ``scale``, log of the aspect ratio uniform; the first of ten tries that fits, else the
    largest centred box whose ratio is allowed.
    """
    return _boxes(augment, InTurn(count, generator).box(BOX), height, width)


def _boxes(augment: Augment, chance: Float64[Tensor, "B 2*tries+2"], height: int, width: int) -> Float[Tensor, "B 4"]:
    if not augment.crop:
        side = min(height, width)
        return _constant(((height - side) // 2, (width - side) // 2, side, side), chance)

    def fits(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)

    rows, columns, fitting = _first_that_fits(chance, augment.scale, augment.ratio, height * width, fits)
    box = _placed(rows, columns, height, width, chance)
    return torch.where(fitting.unsqueeze(1), box, _constant(_largest_box(augment.ratio, height, width), chance))


def _placed(
    rows: Float64[Tensor, " B"], columns: Float64[Tensor, " B"], height: int, width: int, chance: Tensor
) -> Float[Tensor, "B 4"]:
    """Boxes of this size at random positions in the picture."""
    bottom, right = height - rows, width - columns
    top = ((bottom + 1) * chance[:, -2]).floor().minimum(bottom)
    left = ((right + 1) * chance[:, -1]).floor().minimum(right)
    return torch.stack([top, left, rows, columns], dim=1).float()


def _constant(box: tuple[int, int, int, int], like: Tensor) -> Float[Tensor, "B 4"]:
    """Repeat one box for all images, without a copy from the host."""
    return torch.stack([torch.full((len(like),), float(v), device=like.device) for v in box], dim=1)


def draw_box(augment: Augment, height: int, width: int, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """One crop (top, left, height, width), the same as ``draw_boxes`` draws for one image, in a tenth of its time."""
    chance: list[float] = torch.rand(2 * TRIES + 2, generator=generator, dtype=torch.float64).tolist()
    if not augment.crop:
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side
    (smallest, largest), (low, high) = augment.scale, map(math.log, augment.ratio)
    for share, turn in zip(chance[:TRIES], chance[TRIES : 2 * TRIES], strict=True):
        area = height * width * (share * (largest - smallest) + smallest)
        aspect = math.exp(turn * (high - low) + low)
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            bottom, right = height - rows, width - columns
            top, left = int((bottom + 1) * chance[-2]), int((right + 1) * chance[-1])
            return min(top, bottom), min(left, right), rows, columns
    return _largest_box(augment.ratio, height, width)


def _largest_box(ratio: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    if width / height < ratio[0]:
        rows, columns = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        rows, columns = height, round(height * ratio[1])
    else:
        rows, columns = height, width
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _erase_boxes(numbers: Numbers, count: int, size: int, enabled: bool, device: torch.device) -> Float[Tensor, "B 4"]:
    if not enabled:
        if isinstance(numbers, InTurn):
            numbers.box(ERASE)
        return torch.zeros(count, 4, device=device)
    chance = numbers.box(ERASE)

    def fits(a: Tensor, b: Tensor) -> Tensor:
        return (a < size) & (b < size)

    # torchvision takes the ratio of an erased box as height / width, that of a crop as width / height.
    columns, rows, fitting = _first_that_fits(chance, ERASE_SCALE, ERASE_RATIO, size**2, fits)
    return _placed(rows, columns, size, size, chance) * fitting.unsqueeze(1)


def _first_that_fits(
    chance: Float64[Tensor, "B 2*tries+2"],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    pixels: int,
    fits: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Float64[Tensor, " B"], Float64[Tensor, " B"], Bool[Tensor, " B"]]:
    """The first of the sampled box heights and widths, in whole pixels, that fit; and whether any does.

    Usually the very first fits: on a CPU, the rest are computed for the other images only.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])

    def shapes(chances: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        area = pixels * (chances[:, start:stop] * (scale[1] - scale[0]) + scale[0])
        aspect = torch.exp(chances[:, TRIES + start : TRIES + stop] * (high - low) + low)
        return (area / aspect).sqrt().round(), (area * aspect).sqrt().round()

    def first(chances: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = shapes(chances, start, TRIES)
        fitting = fits(rows, columns)
        first_fit = fitting.int().argmax(dim=1, keepdim=True)
        return rows.gather(1, first_fit)[:, 0], columns.gather(1, first_fit)[:, 0], fitting.any(dim=1)

    if not for_its_cache(chance.device):
        return first(chance, 0)
    rows, columns = (shape[:, 0] for shape in shapes(chance, 0, 1))
    success = fits(rows, columns)
    unfitting = (~success).nonzero()[:, 0]
    if len(unfitting):
        rows[unfitting], columns[unfitting], success[unfitting] = first(chance[unfitting], 1)
    return rows, columns, success


def _factors(augment: Augment, chance: Float[Tensor, "B 4"]) -> Float[Tensor, "B 4"]:
    ends = [(max(0.0, 1 - s), 1 + s) for s in (augment.brightness, augment.contrast, augment.saturation)]
    ends.append((-augment.hue, augment.hue))
    columns = zip(chance.unbind(1), ends, strict=True)
    return torch.stack([column * (high - low) + low for column, (low, high) in columns], dim=1)


def for_its_cache(device: torch.device) -> bool:
    """Whether a device works best on small parts divided by the random parameters; others use fixed shapes."""
    return device.type == "cpu" if _pieces is None else _pieces


_pieces: bool | None = None


@contextmanager
def in_pieces(enabled: bool) -> Iterator[None]:
    """While the block runs, make views in small parts on every device, or with fixed shapes on every device."""
    global _pieces  # noqa: PLW0603
    before, _pieces = _pieces, enabled
    try:
        yield
    finally:
        _pieces = before
