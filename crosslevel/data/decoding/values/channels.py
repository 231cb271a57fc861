"""Conversion of values and channels: more than 8 bits to 8, colours to brightness, transparency added."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding.memory import LARGEST, check, check_size
from crosslevel.data.decoding.reading import Range, Reading

Values = np.ndarray[Any, Any]

_LUMA = (19595, 38470, 7471)  # of red, green and blue in 65536 (ITU-R 601, as Pillow rounds it)
_AT_ONCE = 2**20  # values


def fitted(image: UInt8[Tensor, "c H W"], channels: int) -> UInt8[Tensor, "C H W"]:
    """Convert an image of 1 or 3 channels to ``channels``: brightness or colours, with or without full opacity added.

    Raises:
        _Defect: it has another number of channels, and cannot be converted.

    """
    have = len(image)
    if have == channels:
        return image
    if have not in (1, 3) or channels not in (1, 2, 3, 4):
        raise _Defect(f"{have} {'channel' if have == 1 else 'channels'}, not {channels}: --channels {have} reads it")
    if have == 3 and channels in (1, 2):
        image = _brightness(image)
    elif have == 1 and channels in (3, 4):
        image = image.expand(3, -1, -1)
    result = torch.full((*image.shape[1:], channels), 255, dtype=torch.uint8).permute(2, 0, 1)
    result[: len(image)] = image
    return result


def _brightness(image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "1 H W"]:
    """The brightness as Pillow's mode L has it, rounded to integers."""
    out = torch.empty(1, *image.shape[1:], dtype=torch.uint8)
    rows = max(1, _AT_ONCE // max(1, image.shape[2]))
    for part, into in zip(image.split(rows, 1), out.split(rows, 1), strict=True):
        red, green, blue = part.int().unbind(0)
        into.copy_((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 32768) >> 16)
    return out


def scaled(values: np.ndarray[Any, Any], limits: Range | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert values of any type to bytes; NaN becomes 0.

    Args:
        values: bytes stay as they are; without ``limits``, unsigned 16 bits are scaled from their whole range.
        limits: the values that become 0 and 255.

    Raises:
        _Defect: values without an agreed range.

    """
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if not (np.issubdtype(kind, np.integer) or np.issubdtype(kind, np.floating)):
        raise _Defect(f"values of kind {kind} are no picture")
    if limits is None and kind != np.uint16:
        description = "floating-point" if np.issubdtype(kind, np.floating) else "32-bit or signed"
        raise _Defect(
            f"{description} pixels have no agreed range: --range LOW:HIGH says which, or convert it to 8 or 16 bits"
        )
    out = np.empty(values.shape, np.uint8)
    flat, into = values.reshape(len(values), -1), out.reshape(len(values), -1)
    rows = max(1, _AT_ONCE // max(1, flat.shape[1]))
    for first in range(0, len(flat), rows):
        part = flat[first : first + rows]
        if limits is None:  # exact rounding of v * 255 / 65535
            into[first : first + rows] = (part.astype(np.uint32) + 128) // 257
            continue
        share = (np.clip(part.astype(np.float64), *limits) - limits.low) * 255 / (limits.high - limits.low)
        into[first : first + rows] = np.nan_to_num(np.rint(share), nan=0.0)
    return out


def checked(height: int, width: int, count: int, kind: np.dtype[Any], encoded: int, max_pixels: int, name: str) -> int:
    """The bytes that an image takes to decode, if it may take them.

    Raises:
        _Defect: too many pixels or bytes, or none.

    """
    check_size(width, height, max_pixels)
    if height * width > LARGEST:
        raise _Defect(f"{width} x {height} are more than {LARGEST:,} pixels: cut it into smaller images")
    # The values, a part of them in double precision, the bytes, and the result.
    need = height * width * (count * (2 * kind.itemsize + 1) + count + 4) + 2 * encoded
    check(need, (width, height), name)
    return need


def image_of(values: Values, reading: Reading) -> UInt8[Tensor, "C H W"]:
    """Values (H, W, c) as an image."""
    result = torch.from_numpy(np.ascontiguousarray(scaled(values, reading.range))).permute(2, 0, 1)
    return fitted(result, reading.channels)
