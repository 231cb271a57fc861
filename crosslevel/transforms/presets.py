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
"""What one view, or several different views in turn, of a published method look like."""

PLAIN = Augment(scale=(0.6, 1.0), jitter=0.0, grayscale=0.0)
"""A view whose colours stay: of it a jigsaw is cut (Misra and van der Maaten 2020)."""

SMALL = {"dino": replace(_BYOL, blur=0.5)}
"""What a small crop's colours are like, where they are not those of the preset's first view."""

COLOURS = ("saturation", "hue", "grayscale", "randaugment")
"""Settings that mean something for red, green and blue alone."""

SMALL_SIDE = 3 / 7
"""Of a small crop beside a large one, both in pixels: 96 of 224 in SwAV and DINO."""

SMALL_AREA = (0.05, 0.14)
"""Of a small crop, as a share of the image: it ends where the area of the large ones begins, at 0.14 in SwAV, 0.4 in
DINO; but at 0.14 at the least, since less would be a few pixels.
"""


def small_of(preset: str, area: tuple[float, float]) -> Augment:
    """A small crop beside large ones of ``area``: smallest and largest, as a share of the image."""
    low, high = SMALL_AREA
    return replace(SMALL.get(preset, PRESETS[preset][0]), scale=(low, max(high, area[0])))


def uncoloured(augment: Augment) -> Augment:
    """The view's settings for images without red, green and blue: brightness and contrast stay."""
    nothing: dict[str, Any] = dict.fromkeys(COLOURS, 0)
    return replace(augment, **nothing)


def refuse_colours(settings: Mapping[str, Any], channels: int) -> None:
    """Refuse settings that images of ``channels`` other than three have nothing for.

    Raises:
        UserError: one was given.

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
    """Mean and deviation of each channel: of what was not given the usual ones, or for other channels their mean.

    Raises:
        UserError: two that are of different numbers of channels.

    """
    channels = len(mean or std or MEAN)
    resolved = [
        value or (default if channels == COLOURED else (sum(default) / COLOURED,) * channels)
        for value, default in ((mean, MEAN), (std, STD))
    ]
    if len(resolved[0]) != len(resolved[1]):
        raise UserError(f"mean={mean}, std={std}: give one of each for every channel")
    return resolved[0], resolved[1]
