"""Arrays, DICOM and bands of TIFF as images: which files are read here, and how their values are converted."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding.memory import room
from crosslevel.data.decoding.reading import Reading
from crosslevel.data.decoding.values.channels import checked, image_of
from crosslevel.data.decoding.values.dicom import decoded_dicom
from crosslevel.data.decoding.values.tiff import Bands

_LONGEST_HEADER = 10_000  # letters of an array's description


def is_valued(format: str | None, reading: Reading) -> bool:
    """Whether an image of this format is read here: arrays, DICOM, and TIFF in other channels than Pillow has."""
    return format in ("NPY", "DICOM") or (format == "TIFF" and reading.channels not in (1, 3))


def decoded_values(
    data: bytearray, format: str | None, reading: Reading, max_pixels: int, page: int
) -> UInt8[Tensor, "C H W"]:
    """The image in an array's file, in a DICOM file or in the bands of a TIFF.

    Raises:
        _Defect: it is broken, larger than allowed, or has another number of channels.

    """
    if format == "DICOM":
        return decoded_dicom(data, reading, max_pixels, page)
    return _of_tiff(data, reading, max_pixels, page) if format == "TIFF" else _of_array(data, reading, max_pixels)


def _of_array(data: bytearray, reading: Reading, max_pixels: int) -> UInt8[Tensor, "C H W"]:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, in_columns, kind = read(stream, max_header_size=_LONGEST_HEADER)
    except ValueError as error:
        raise _Defect(f"broken: no array ({' '.join(str(error).split())[:100]})") from None
    if kind.hasobject or kind.fields or not 2 <= len(shape) <= 3:
        raise _Defect(f"an array of {kind} {shape}, not (H, W), (H, W, C) or (C, H, W)")
    planes = _planes(shape, reading.channels)
    height, width, count = (shape[0], shape[1], 1) if len(shape) == 2 else _sides(shape, planes)
    need = checked(height, width, count, kind, len(data), max_pixels, "NPY")
    content = data[stream.tell() :]
    if len(content) != height * width * count * kind.itemsize:
        raise _Defect(f"{'truncated' if len(content) < height * width * count * kind.itemsize else 'broken'}: "
                      f"{len(content):,} bytes for an array of {kind} {shape}")  # fmt: skip
    with room(need):
        values = np.frombuffer(content, kind).reshape(shape, order="F" if in_columns else "C")
        values = values[..., None] if len(shape) == 2 else values.transpose(1, 2, 0) if planes else values
        return image_of(values, reading)


def _planes(shape: tuple[int, ...], channels: int) -> bool:
    """Whether the channels of an array come first: if its last dimension cannot be the channels."""
    if len(shape) == 2 or shape[2] == channels:
        return False
    return shape[0] == channels or (shape[2] not in (1, 3) and shape[0] in (1, 3))


def _sides(shape: tuple[int, ...], planes: bool) -> tuple[int, int, int]:
    return (shape[1], shape[2], shape[0]) if planes else (shape[0], shape[1], shape[2])


def _of_tiff(data: bytearray, reading: Reading, max_pixels: int, page: int) -> UInt8[Tensor, "C H W"]:
    first = Bands(data, page)
    # Some programs write each band as a page.
    bands = [first]
    if first.samples == 1 and not page and reading.channels > 1:
        bands += Bands.like(data, first, reading.channels)
    if len(bands) == 1 and first.samples not in (1, 3, reading.channels):
        raise _Defect(f"{first.samples} channels, not {reading.channels}: --channels {first.samples} reads it")
    count = first.samples * len(bands)
    need = checked(first.height, first.width, count, first.kind, len(data), max_pixels, "TIFF")
    with room(need):
        read = [each.values() for each in bands]
        image = image_of(read[0] if len(read) == 1 else np.concatenate(read, 2), reading)
        return 255 - image if first.inverted else image
