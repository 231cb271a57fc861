"""All formats but plain JPEG: decoded by Pillow, and converted to RGB some rows at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding.complaints import Complaints
from crosslevel.data.decoding.memory import halvings
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.decoding.values.channels import scaled

_AT_ONCE, _BAND = 2**20, 2**18  # pixels that are converted at once: all of a small image, this many of a larger one
_ORIENTATION = 0x0112  # the tag of EXIF


@contextmanager
def noted_warnings(complaints: Complaints) -> Iterator[None]:
    """Collect Pillow's warnings: truncated data are damage; the rest is about metadata and large pictures."""
    messages: list[str] = []
    _heard.messages = messages
    try:
        yield
    finally:
        _heard.messages = None
        for message in messages:
            if "truncated" in message.lower():
                complaints.add(message)


class _Heard(threading.local):
    """Pillow's warnings in this thread; None while none are collected."""

    messages: list[str] | None = None


_heard = _Heard()


class _Warnings:
    """A stand-in for the module ``warnings`` inside Pillow: the module itself, except in a thread that decodes.

    `warnings.catch_warnings` cannot be used: it changes the whole process, and other threads run meanwhile.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    @staticmethod
    def warn(message: Warning | str, category: type[Warning] | None = None, stacklevel: int = 1, **more: Any) -> None:
        """Warn as `warnings.warn` does, or collect it for the thread's `noted_warnings`."""
        if _heard.messages is None:
            warnings.warn(message, category, stacklevel + 1, **more)
        else:
            _heard.messages.append(str(message))


for _module in (Image, TiffImagePlugin, PngImagePlugin, JpegImagePlugin):
    _module.warnings = _Warnings()  # type: ignore[attr-defined]


_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels


def upright(
    image: Image.Image, reading: Reading = USUAL, *, at_once: int = _AT_ONCE, band: int = _BAND
) -> UInt8[Tensor, "C H W"]:
    """RGB, turned as EXIF says, transparency on white, 16 bits scaled to 8; smaller above `LARGEST` pixels.

    Other channels than these three as ``reading`` says. Images of up to ``at_once`` pixels are converted whole, others
    in bands of rows of about ``band`` pixels.

    Raises:
        _Defect: pixels that have no agreed range, or another number of channels.

    """
    # exif_transpose copies what it does not turn.
    turned = ImageOps.exif_transpose(image) if is_turned(image) else image
    return torch.from_numpy(_pixels(turned, reading, at_once, band)).permute(2, 0, 1)


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that an image lies on its side."""
    return bool(image.getexif().get(_ORIENTATION, 1) != 1)


def _pixels(
    image: Image.Image, reading: Reading, at_once: int, band: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(H, W, C) from any of Pillow's modes, a band of rows at a time: a whole large image takes gigabytes."""
    width, height = image.size
    scale = halvings(width * height)
    rows = scale * max(1, band // width // scale)
    channels = reading.channels
    if width * height <= at_once and scale == 1:
        return np.array(_converted(image, reading)).reshape(height, width, channels)
    image.load()
    pixels = np.empty((-(-height // scale), -(-width // scale), channels), np.uint8)
    for first in range(0, height, rows):
        part = _converted(image.crop((0, first, width, min(height, first + rows))), reading)
        smaller = np.asarray(part if scale == 1 else part.reduce(scale))
        pixels[first // scale : first // scale + len(smaller)] = smaller.reshape(*smaller.shape[:2], channels)
    return pixels


def _converted(image: Image.Image, reading: Reading) -> Image.Image:
    if reading.channels not in _MODES:
        raise _Defect(f"{len(image.getbands())} channels, not {reading.channels}")
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_bytes(np.asarray(image), reading))
    if reading.channels in (2, 4):
        return image.convert("RGBA").convert(_MODES[reading.channels])
    return _opaque(image).convert(_MODES[reading.channels])


def _bytes(values: np.ndarray[Any, Any], reading: Reading) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Gray values of more than 8 bits."""
    integral = np.issubdtype(values.dtype, np.integer)
    if reading.range is None and integral and values.min(initial=0) >= 0 and values.max(initial=0) <= 65535:
        values = values.astype(np.uint16)  # Pillow has 16 bits as 32
    return scaled(values, reading.range)


def _opaque(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparency on white."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
