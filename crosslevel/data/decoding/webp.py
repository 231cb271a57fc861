"""Large WebP images at a reduced size: libwebp scales row by row, which Pillow does not offer.

Pillow holds several canvases, 22 bytes a pixel; libwebp itself holds no canvas for a lossy image, and one for a
lossless one. It is called in the library that Pillow is linked to, by its public interface (decode.h), whose structures
stay the same within a major version of the ABI; the version is checked. Without such a library, nothing is scaled.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crosslevel.data.bad_files import _Defect

_ABI = 0x0209
_RGBA = 1
_TOO_SHORT = 7
_STATUS = {1: "out of memory", 3: "broken data", 4: "an unknown feature", _TOO_SHORT: "truncated: its data end early"}
_LOSSY = 1
_CANVAS = 5  # bytes a pixel that libwebp holds for a lossless image, and for a lossy one with transparency
_HANDED = 4  # bytes of a pixel of its result

_int, _pointer = ctypes.c_int, ctypes.c_void_p


def _fields(names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _int) for name in names.split())


class _Features(ctypes.Structure):
    _fields_ = (*_fields("width height has_alpha has_animation format"), ("pad", ctypes.c_uint32 * 5))


class _Rgba(ctypes.Structure):
    _fields_ = (("rgba", _pointer), ("stride", _int), ("size", ctypes.c_size_t))


class _Yuva(ctypes.Structure):
    _fields_ = (("planes", _pointer * 4), ("strides", _int * 4), ("sizes", ctypes.c_size_t * 4))


class _Pixels(ctypes.Union):
    _fields_ = (("rgba", _Rgba), ("yuva", _Yuva))


class _Output(ctypes.Structure):
    _fields_ = (
        *_fields("colorspace width height is_external_memory"),
        ("pixels", _Pixels),
        ("pad", ctypes.c_uint32 * 4),
        ("private_memory", _pointer),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        *_fields("bypass_filtering no_fancy_upsampling use_cropping crop_left crop_top crop_width crop_height"),
        *_fields("use_scaling scaled_width scaled_height use_threads dithering_strength flip alpha_dithering_strength"),
        ("pad", ctypes.c_uint32 * 5),
    )


class _Config(ctypes.Structure):
    _fields_ = (("input", _Features), ("output", _Output), ("options", _Options))


class StillWebP(NamedTuple):
    """The header of a WebP that can be scaled; ``canvas``: bytes a pixel that libwebp needs while it decodes."""

    size: tuple[int, int]
    transparent: bool
    canvas: int


def still_webp(data: bytearray) -> StillWebP | None:
    """The header of a WebP; None for an animation, and if no usable libwebp is found.

    Raises:
        _Defect: it is damaged.

    """
    library = _library()
    if library is None:
        return None
    config = _Config()
    _begin(library, config, data)
    features = config.input
    if features.has_animation:
        return None
    canvas = 0 if features.format == _LOSSY and not features.has_alpha else _CANVAS
    return StillWebP((features.width, features.height), bool(features.has_alpha), canvas)


def needed_for_webp(header: StillWebP, scale: int, encoded: int) -> int:
    """Bytes needed at most for `scaled_webp`, and to turn its result and convert it to RGB."""
    pixels = header.size[0] * header.size[1]
    small = -(-header.size[0] // scale) * -(-header.size[1] // scale)
    return max(header.canvas * pixels + _HANDED * small, (2 * _HANDED + 3) * small) + 2 * encoded + 2**23


def scaled_webp(data: bytearray, header: StillWebP, scale: int) -> Image.Image:
    """The image at 1/``scale`` of its width and height, with its EXIF.

    Raises:
        _Defect: it is damaged.

    """
    library, config = _library(), _Config()
    encoded = _begin(library, config, data)
    width, height = (-(-side // scale) for side in header.size)
    pixels = np.empty((height, width, _HANDED), np.uint8)
    options, output = config.options, config.output
    if scale > 1:
        options.use_scaling, options.scaled_width, options.scaled_height = 1, width, height
    output.colorspace, output.is_external_memory = _RGBA, 1
    output.pixels.rgba = _Rgba(pixels.ctypes.data, pixels.strides[0], pixels.nbytes)
    _done(library.WebPDecode(encoded, ctypes.c_size_t(len(data)), ctypes.byref(config)))
    image = Image.frombuffer("RGBA" if header.transparent else "RGBX", (width, height), pixels, "raw")  # no copy
    if exif := _chunk(data, b"EXIF"):
        image.info["exif"] = exif
    return image


@cache
def _library() -> Any:
    """The libwebp that Pillow decodes with; None if none is found, or one of an unknown version."""
    try:
        library = ctypes.CDLL(import_module("PIL._webp").__file__)  # searches what it is linked to as well
        same = library.WebPInitDecoderConfigInternal(ctypes.byref(_Config()), _ABI)
        return library if same and library.WebPDecode and library.WebPGetFeaturesInternal else None
    except (ImportError, OSError, AttributeError, TypeError):
        return None


def _begin(library: Any, config: _Config, data: bytearray) -> Any:
    """Fill ``config`` from the header; return the data as a C buffer, without a copy."""
    library.WebPInitDecoderConfigInternal(ctypes.byref(config), _ABI)
    encoded = (ctypes.c_char * len(data)).from_buffer(data)
    _done(library.WebPGetFeaturesInternal(encoded, ctypes.c_size_t(len(data)), ctypes.byref(config.input), _ABI))
    return encoded


def _done(status: int) -> None:
    if status:
        message = _STATUS.get(status, f"libwebp's status {status}")
        raise _Defect(message if status == _TOO_SHORT else f"cannot be decoded: {message}")


def _chunk(data: bytearray, kind: bytes) -> bytes:
    """The content of the first chunk of a kind (RFC 9649, section 2.3); empty if there is none."""
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == kind:
            return bytes(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return b""
