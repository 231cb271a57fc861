"""The views of published methods, as augmentations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from crosslevel.transforms.parameters import Augment
from crosslevel.utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
COLOURED = 3  # channels

_BYOL = Augment(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)

PRESETS: dict[str, tuple[Augment, ...]] = {
    # Chen et al. 2020, app. A, strength s = 1
    "simclr": (Augment(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),),
    # Chen et al. 2020 (MoCo v2), sec. 3
    "mocov2": (Augment(scale=(0.2, 1.0), blur=0.5),),
    # Grill et al. 2020, table 6: two views of different strength
    "byol": (_BYOL, replace(_BYOL, blur=0.1, solarize=0.2)),
    # Tian et al. 2020 (InfoMin), as in the authors' code
    "infomin": (
        Augment(scale=(0.2, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5, randaugment=2),
    ),
    # Wang et al. 2021, the authors' CIFAR recipe
    "cifar": (Augment(scale=(0.2, 1.0)),),
    # Caron et al. 2021 (DINO), as in the authors' code: BYOL's colours, two large crops of different strength
    "dino": (replace(_BYOL, scale=(0.4, 1.0)), replace(_BYOL, scale=(0.4, 1.0), blur=0.1, solarize=0.2)),
    # Caron et al. 2020 (SwAV), as in the authors' code: SimCLR's colours
    "swav": (Augment(scale=(0.14, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),),
    "none": (Augment(crop=False, flip=0.0, jitter=0.0, grayscale=0.0),),
}
"""The augmentation of each published method: of all views, or of several different views in turn."""

PLAIN = Augment(scale=(0.6, 1.0), jitter=0.0, grayscale=0.0)
"""A view that keeps its colours, for a jigsaw (Misra and van der Maaten 2020)."""

SMALL = {"dino": replace(_BYOL, blur=0.5)}
"""The augmentation of small crops, for presets where it differs from that of the first view."""

COLOURS = ("saturation", "hue", "grayscale", "randaugment")
"""Settings that only apply to red, green and blue."""

SMALL_SIDE = 3 / 7
"""The side of a small crop, as a share of a large one's: 96 of 224 in SwAV and DINO."""

SMALL_AREA = (0.05, 0.14)
"""The area of a small crop, as a share of the image. It ends where the area of large crops begins, at 0.14 in SwAV and
0.4 in DINO, but not below 0.14, which would be a few pixels.
"""


def small_of(preset: str, area: tuple[float, float]) -> Augment:
    """The smallest and largest area of small crops, as shares of the image, beside large crops of ``area``."""
    low, high = SMALL_AREA
    return replace(SMALL.get(preset, PRESETS[preset][0]), scale=(low, max(high, area[0])))


def uncoloured(augment: Augment) -> Augment:
    """The view's settings for images without red, green and blue: brightness and contrast stay."""
    nothing: dict[str, Any] = dict.fromkeys(COLOURS, 0)
    return replace(augment, **nothing)


def refuse_colours(settings: Mapping[str, Any], channels: int) -> None:
    """Refuse settings that need three channels, for images of other ``channels``.

    Raises:
        UserError: such a setting was given.

    """
    for name in COLOURS:
        if settings[name]:
            images = f"{channels} {'channel' if channels == 1 else 'channels'}"
            raise UserError(
                f"views.{name}={settings[name]} needs red, green and blue, not images of {images}: leave it out"
            )


def completed(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel; unless given, the usual ones, or for other channels than three their average.

    Raises:
        UserError: both are given, for different numbers of channels.

    """
    channels = len(mean or std or MEAN)
    resolved = [
        value or (default if channels == COLOURED else (sum(default) / COLOURED,) * channels)
        for value, default in ((mean, MEAN), (std, STD))
    ]
    if len(resolved[0]) != len(resolved[1]):
        raise UserError(f"mean={mean}, std={std}: give one of each for every channel")
    return resolved[0], resolved[1]
