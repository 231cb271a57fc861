"""DICOM (PS3.3, PS3.5, PS3.10): pydicom reads the pixels in the modality's units; a window maps them to bytes.

A file's header is checked against the file before anything is decoded: its transfer syntax (a deflated data set could
expand to any size), the size of the picture, and whether a compressed frame has that size.
"""

from __future__ import annotations

import io
import struct
import warnings
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding.jpeg import jpeg_header
from crosslevel.data.decoding.memory import check, limit_to, needed, room
from crosslevel.data.decoding.reading import Range, Reading
from crosslevel.data.decoding.values.channels import Values, checked, image_of

_PREFIX = "1.2.840.10008.1.2"
PLAIN = (_PREFIX, f"{_PREFIX}.1", f"{_PREFIX}.2")  # implicit, explicit, big endian
RLE = f"{_PREFIX}.5"
JPEG = (f"{_PREFIX}.4.50", f"{_PREFIX}.4.51")  # baseline, extended
JPEG2000 = (f"{_PREFIX}.4.90", f"{_PREFIX}.4.91")  # lossless, any
_RUN = 64  # bytes that one byte of RLE can expand to, at most
_META, _SYNTAX, _LONG = 0x0002, 0x0010, (b"OB", b"OW", b"OF", b"SQ", b"UN", b"UT")
_COLOURS = {1: 1, 2: 1, 3: 3, 4: 3}  # for each number of channels, those that are not transparency
_TAGS = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "VOILUTSequence", "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
)  # fmt: skip


def decoded_dicom(data: bytes | bytearray, reading: Reading, max_pixels: int, frame: int) -> UInt8[Tensor, "C H W"]:
    """Decode one frame.

    Gray values are in the modality's units, such as Hounsfield's, and go through ``reading.range``; without one through
    the file's first window, or else from the smallest to the largest of the frame. MONOCHROME1 is inverted.

    Raises:
        _Defect: pydicom is missing, or the file is broken, too large, or compressed in a way that is not read.

    """
    opened, syntax = _opened(data)
    count = frames_of(opened)
    if frame >= count:
        raise _Defect("there is no such frame")
    if "PixelData" not in opened:
        raise _Defect("a DICOM file without a picture")
    samples, size = int(opened.SamplesPerPixel), (int(opened.Columns), int(opened.Rows))
    # In the modality's units values are floats of 64 bits.
    need = checked(size[1], size[0], samples, np.dtype("f8"), len(data), max_pixels, "DICOM")
    need += _compressed(opened, syntax, size, frame, count, need)
    with room(need), limit_to(need, "JPEG2000" if syntax in JPEG2000 else "DICOM"):
        values = library().pixels.pixel_array(opened, index=frame)
        return _picture(opened, values if values.ndim == 3 else values[..., None], reading)


def frames_of(opened: Any) -> int:
    """How many frames a data set says that it has, 1 at the least."""
    return max(1, int(opened.get("NumberOfFrames") or 1))


def count_frames(data: bytes | bytearray) -> int:
    """How many frames a file says that it has."""
    return frames_of(_opened(data)[0])


def _opened(data: bytes | bytearray) -> tuple[Any, str]:
    pydicom, syntax = library(), _transfer_syntax(data)
    if syntax not in (*PLAIN, RLE, *JPEG, *JPEG2000):
        raise _Defect(
            f"a DICOM image in transfer syntax {syntax} is not read: write it without compression, as JPEG 2000 or as "
            "baseline JPEG"
        )
    return pydicom.dcmread(io.BytesIO(data), specific_tags=list(_TAGS)), syntax


@cache
def library() -> Any:
    """pydicom, set up; cached, and ``cache_clear`` looks for it again."""
    try:
        import pydicom  # noqa: PLC0415
        import pydicom.pixels  # noqa: PLC0415
    except ImportError:
        raise _Defect("a DICOM image: pip install 'crosslevel[dicom]'") from None
    # Many programs break rules that do not matter here; their warnings are of no use.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for module in (r"pydicom(\..*)?$", r"crosslevel\.data\.decoding\.values\.dicom$"):
        warnings.filterwarnings("ignore", module=module)
    return pydicom


def _transfer_syntax(data: bytes | bytearray) -> str:
    """How the data set is written, by the group of elements before it (PS3.10, section 7.1)."""
    at = 132
    while at + 12 <= len(data):
        group, element, kind, length = struct.unpack_from("<HH2sH", data, at)
        at += 8
        if group != _META:
            break
        if kind in _LONG:
            (length,) = struct.unpack_from("<I", data, at)
            at += 4
        if element == _SYNTAX:
            return bytes(data[at : at + min(length, 64)]).decode("ascii", "replace").strip("\0 ")
        at += length
    raise _Defect("broken: a DICOM file that does not say how it is written")


def _compressed(opened: Any, syntax: str, size: tuple[int, int], frame: int, count: int, need: int) -> int:
    """The bytes that decompressing a frame takes beside ``need``, which its result takes.

    Raises:
        _Defect: the frame is of another size than the file says, or it takes too many.

    """
    if syntax in PLAIN:
        return 0
    encaps = library().encaps
    offsets = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    extended = tuple(opened[name].value for name in offsets) if all(name in opened for name in offsets) else None
    encoded = encaps.get_frame(opened.PixelData, frame, extended_offsets=extended, number_of_frames=count)
    if syntax == RLE:
        more = _RUN * len(encoded)
    elif syntax in JPEG:
        header = jpeg_header(bytearray(encoded))
        _same((header.width, header.height), size)
        more = 2 * header.coefficients + 2 * len(encoded)
    else:
        if encoded[:4] != b"\xff\x4f\xff\x51" or len(encoded) < 24:
            raise _Defect("broken: no JPEG 2000 codestream")
        width, height, left, top = struct.unpack_from(">IIII", encoded, 8)
        _same((width - left, height - top), size)
        more = needed("JPEG2000", size, len(encoded), turned=False)
    check(need + more, size, "DICOM")
    return more


def _same(actual: tuple[int, int], stated: tuple[int, int]) -> None:
    if actual != stated:
        raise _Defect(f"broken: a frame of {actual[0]} x {actual[1]} pixels in a picture of {stated[0]} x {stated[1]}")


def _picture(opened: Any, values: Values, reading: Reading) -> UInt8[Tensor, "C H W"]:
    pixels, meaning = library().pixels, str(opened.PhotometricInterpretation)
    if meaning == "PALETTE COLOR":
        coloured = pixels.apply_color_lut(values[..., 0], opened)
        bits = int(opened.RedPaletteColorLookupTableDescriptor[2])
        return image_of(coloured, reading if bits == 8 else _within(reading, Range(0, 2.0**bits - 1)))
    if values.shape[2] > 1:
        bits = int(opened.BitsStored)
        return image_of(values, reading if bits == 8 else _within(reading, Range(0, 2.0**bits - 1)))
    gray = np.asarray(pixels.apply_modality_lut(values[..., 0], opened))
    windowed = gray if reading.range is not None else _windowed(opened, gray)
    # Values in [0, 1] have been mapped by the file's own window.
    picture = image_of(windowed.astype(np.float64)[..., None], _within(reading, Range(0, 1)))
    if meaning == "MONOCHROME1":
        picture[: _COLOURS[len(picture)]] ^= 255  # its brightness, without its opacity
    return picture


def _within(reading: Reading, default: Range) -> Reading:
    return reading if reading.range is not None else Reading(channels=reading.channels, range=default)


def _windowed(opened: Any, gray: Values) -> Values:
    """Gray values in [0, 1] by the file's first window (PS3.3, C.11.2.1), or from its smallest to its largest."""
    centre, width = _first(opened.get("WindowCenter")), _first(opened.get("WindowWidth"))
    x = gray.astype(np.float64)
    if centre is None or width is None or not np.isfinite([centre, width]).all() or width <= 0:
        if "VOILUTSequence" in opened and opened.VOILUTSequence:
            bits = int(opened.VOILUTSequence[0].LUTDescriptor[2])
            mapped: Values = library().pixels.apply_voi_lut(gray, opened, prefer_lut=True) / (2.0**bits - 1)
            return mapped
        finite = x[np.isfinite(x)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        return (x - low) / (high - low if high > low else 1.0)
    function = str(opened.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT" or width <= 1:
        return np.clip((x - centre) / width + 0.5, 0, 1)
    return np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    """The first of one or several numbers; None if there is none."""
    try:
        return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)
    except (TypeError, ValueError, IndexError):
        return None
