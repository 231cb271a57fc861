"""JPEG: its header read by ourselves, its pixels by torchvision."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.io import ImageReadMode  # registers its decoders, too

from crosslevel.data.bad_files import _Defect


@dataclass(slots=True)
class JpegHeader:
    """The header of a JPEG, up to its first scan.

    ``plain``: baseline or progressive Huffman coding with 8 bits, and EXIF where torchvision looks for it. ``exif``:
    whether it has EXIF. ``scan``: where the first scan begins. ``coefficients``: how many coefficients of 2 bytes the
    decoder keeps in memory; a progressive image needs them.
    """

    width: int
    height: int
    components: int
    plain: bool
    huffman: bool
    exif: bool
    scan: int
    coefficients: int


def jpeg_header(data: bytearray) -> JpegHeader:
    """Walk the segments before the first scan (ITU T.81, annex B).

    Raises:
        _Defect: there is no whole header.

    """
    position, application, frame = 2, 0, b""
    kind, exif, exif_first = 0, False, True
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            raise _Defect("truncated: it ends before the picture begins")
        if data[position] != 0xFF:
            raise _Defect("broken: no marker where a JPEG segment must begin")
        marker, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        if marker == 0xDA:
            if not frame:
                raise _Defect("broken: a scan without a frame header")
            return _header(frame, kind, exif, exif_first, position)
        if marker == 0xE1:
            application += 1
            if data[position + 4 : position + 10] == b"Exif\0\0":
                exif, exif_first = True, exif_first and application == 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            kind, frame = marker, bytes(data[position + 4 : position + 2 + length])
            if len(frame) < 6:
                raise _Defect("broken: a frame header that is too short")
        position += 2 + length


def _header(frame: bytes, kind: int, exif: bool, exif_first: bool, scan: int) -> JpegHeader:
    precision, height, width, components = struct.unpack_from(">BHHB", frame)
    factors = frame[7::3][:components]  # of each component: horizontal in the upper four bits, vertical in the lower
    blocks = sum((factor >> 4) * (factor & 15) for factor in factors)
    largest = max((factor >> 4) * (factor & 15) for factor in factors) if factors else 1
    progressive = kind in (0xC2, 0xC6, 0xCA, 0xCE)
    coefficients = width * height * blocks // max(1, largest) if progressive else 0
    huffman = precision == 8 and kind <= 0xC2
    return JpegHeader(width, height, components, huffman and exif_first, huffman, exif, scan, coefficients)


def needed_for_jpeg(header: JpegHeader, encoded: int) -> int:
    """Bytes that torchvision takes at most: the result, a turned copy, a progressive image's coefficients."""
    return (6 if header.exif else 3) * header.width * header.height + 2 * header.coefficients + 2 * encoded


def decoded_jpeg(data: bytearray, exif: bool = False) -> UInt8[Tensor, "3 H W"]:
    """The pixels of a plain JPEG."""
    # What `torchvision.io.decode_jpeg` calls, which warns of its future at each image, and takes nearly as long again.
    decode = torch.ops.image.decode_jpeg.default
    image: Tensor = decode(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB.value, exif)
    return image
