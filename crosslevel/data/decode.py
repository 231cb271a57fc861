"""Which image files can be read: decoding that detects every defect, and the list of the bad ones."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from crosslevel.data.bad_files import _Defect
from crosslevel.utils.errors import BadImage

PIXEL_LIMIT = 178_956_970
"""More pixels are taken for a decompression bomb: where Pillow too refuses (half a GiB of RGB)."""

# Only formats that are pictures: Pillow would otherwise also hand files to Ghostscript and the like.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF")
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def read_image(file: str, path: str | None = None, max_pixels: int = PIXEL_LIMIT) -> UInt8[Tensor, "3 H W"]:
    """Read and decode one image file; ``path`` is its name in errors (default: ``file``).

    Raises:
        BadImage: it cannot be opened or decoded.

    """
    path = file if path is None else path
    try:
        with open(file, "rb", buffering=0, opener=_unblocked) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(path, "not a file, but a pipe or a device")
            size = status.st_size
            if size > 8 * max_pixels:
                raise BadImage(path, f"the file has {size:,} bytes, more than {max_pixels:,} pixels can need")
            data = bytearray(stream.read())  # torch takes no read-only buffers
    except OSError as error:
        raise BadImage(path, f"cannot be opened: {error.strerror or error}") from error
    return decode(data, path, max_pixels)


def _unblocked(file: str, flags: int) -> int:
    """Opening a pipe that nobody writes to would wait for ever."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def decode(data: bytearray, path: str, max_pixels: int = PIXEL_LIMIT) -> UInt8[Tensor, "3 H W"]:
    """Decode an encoded image to RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    JPEG, PNG, WebP, BMP, TIFF, PPM and GIF (the first frame of several), told by content and not by name. In
    memory the three values of a pixel lie together, as decoders write them and crops are fastest, unless EXIF turns it.

    Raises:
        BadImage: empty, broken, truncated, not an image, or more than ``max_pixels``; named ``path``.

    """
    if not data:
        raise BadImage(path, "empty file")
    try:
        if data.startswith(_JPEG):
            return _decode_jpeg(data, max_pixels)
        if data.startswith(_PNG):
            return _decode_png(data, max_pixels)
        return _decode_pillow(data, max_pixels)
    except _Defect as defect:
        raise BadImage(path, str(defect)) from None
    except UnidentifiedImageError:
        raise BadImage(path, "not an image, or the beginning of one is damaged") from None
    except Image.DecompressionBombError:
        raise BadImage(path, f"more than {max_pixels:,} pixels") from None
    except Exception as error:
        # A damaged file makes decoders fail in any way (struct.error, SyntaxError, IndexError, ...), and
        # none of them may stop a run of a week.
        raise BadImage(path, _reason(error)) from error


@dataclass(slots=True)
class _JpegHeader:
    components: int
    plain: bool  # baseline or progressive Huffman coding with 8 bits, and EXIF where torchvision looks for it
    exif: bool
    scan: int  # where the first scan begins


def _decode_jpeg(data: bytearray, max_pixels: int) -> Tensor:
    header = _jpeg_header(data, max_pixels)
    # libjpeg fills what is missing with gray and only warns. Inside scans the two bytes of the end marker
    # cannot occur, so without them the file was cut (or cut and padded with zeros).
    if data.rfind(b"\xff\xd9") < header.scan:
        raise _Defect("truncated: the end-of-image marker is missing")
    if header.plain and header.components in (1, 3):
        encoded = torch.frombuffer(data, dtype=torch.uint8)
        image: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=header.exif)
        return image
    return _decode_pillow(data, max_pixels)


def _jpeg_header(data: bytearray, max_pixels: int) -> _JpegHeader:
    """Walk the segments before the first scan (ITU T.81, annex B)."""
    position, components, plain, application = 2, 0, False, 0
    exif, exif_first = False, True
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 4 > len(data):
            raise _Defect("truncated: it ends before the picture begins")
        if data[position] != 0xFF:
            raise _Defect("broken: no marker where a JPEG segment must begin")
        marker = data[position + 1]
        if marker == 0xDA:
            if not components:
                raise _Defect("broken: a scan without a frame header")
            return _JpegHeader(components, plain and exif_first, exif, position)
        if marker == 0xE1:
            application += 1
            if data[position + 4 : position + 10] == b"Exif\0\0":
                exif, exif_first = True, exif_first and application == 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            _check_size(width, height, max_pixels)
            plain = precision == 8 and marker <= 0xC2
        position += 2 + (data[position + 2] << 8 | data[position + 3])


def _decode_png(data: bytearray, max_pixels: int) -> Tensor:
    """Check a PNG's chunks (W3C PNG, section 5.3), then decode it.

    torchvision's decoder crashes the process on damaged data, so Pillow decodes. Pillow skips checksums,
    and would take a part filled with zeros for a picture, so they are checked here.
    """
    if data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        _check_size(width, height, max_pixels)
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise _Defect(f"broken: wrong checksum in chunk {kind.decode('ascii', 'replace')}")
        if kind == b"IEND":
            return _decode_pillow(data, max_pixels)
        position = end + 4
    raise _Defect("truncated: the end chunk is missing")


def _open(data: bytearray) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _decode_pillow(data: bytearray, max_pixels: int) -> Tensor:
    # Pillow warns of damaged metadata and of large pictures; what counts here is raised.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(data) as opened:
            _check_size(*opened.size, max_pixels)
            opened.load()
            image = _rgb(ImageOps.exif_transpose(opened))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def from_pillow(image: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """An image that is open already as RGB: upright (EXIF), transparency on white, 16 bits scaled to 8.

    Raises:
        BadImage: pixels that have no agreed range.

    """
    try:
        return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(image)))).permute(2, 0, 1)
    except _Defect as defect:
        raise BadImage(str(getattr(image, "filename", "") or "image"), str(defect)) from None


def _rgb(image: Image.Image) -> Image.Image:
    """RGB from any of Pillow's modes."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise _Defect("32-bit or signed pixels have no agreed range: convert it to 8 or 16 bits")
        # Exact rounding of v * 255 / 65535.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _Defect("floating-point pixels have no agreed range: convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _Defect(f"broken: a picture of {width} x {height} pixels")
    if width * height > max_pixels:
        raise _Defect(f"{width} x {height} are more than {max_pixels:,} pixels")


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    # torchvision begins with the place in its own source.
    text = text.rsplit(": ", 1)[-1] if ".cpp" in text else text
    if "truncated" in text.lower() or "incomplete" in text.lower():
        return f"truncated: {text}"
    return f"cannot be decoded: {text or type(error).__name__}"
