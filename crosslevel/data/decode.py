"""Which image files can be read: decoding that detects every defect."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from contextlib import ExitStack

from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding import trace
from crosslevel.data.decoding.complaints import Complaints, heard, reason
from crosslevel.data.decoding.formats import HEAD, format_of, readable
from crosslevel.data.decoding.jpeg import JpegHeader, decoded_jpeg, jpeg_header, needed_for_jpeg
from crosslevel.data.decoding.jpeg2000 import reduced
from crosslevel.data.decoding.memory import (
    budget,
    check,
    check_size,
    exceeds_budget,
    halvings,
    limit_to,
    needed,
    room,
    too_many_bytes,
)
from crosslevel.data.decoding.pillow import is_turned, noted_warnings, upright
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.decoding.sizes import part_bytes, size_ahead
from crosslevel.data.decoding.values.channels import fitted
from crosslevel.data.decoding.values.dicom import count_frames
from crosslevel.data.decoding.values.read import decoded_values, is_valued
from crosslevel.data.decoding.webp import needed_for_webp, scaled_webp, still_webp
from crosslevel.utils.errors import BadImage, printable

PIXEL_LIMIT = 178_956_970
"""More pixels are taken for a decompression bomb: where Pillow too refuses (half a GiB of RGB)."""

MOST_PAGES = 100_000
"""Frames or pages that a file may have."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def read_image(
    file: str, path: str | None = None, max_pixels: int = PIXEL_LIMIT, reading: Reading = USUAL, page: int = 0
) -> UInt8[Tensor, "C H W"]:
    """Read and decode one image file, or a ``page`` of it; ``path`` is its name in errors (default: ``file``).

    Raises:
        BadImage: it cannot be opened or decoded.

    """
    path = file if path is None else path
    try:
        with open(file, "rb", buffering=0, opener=_unblocked) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage(path, "not a file, but a pipe or a device")
            if too_large := too_many_bytes(status.st_size, max_pixels, "the file"):
                raise BadImage(path, too_large)
            data = bytearray(stream.read())  # torch takes no read-only buffers
    except OSError as error:
        raise BadImage(path, f"cannot be opened: {error.strerror or error}") from error
    return decode(data, path, max_pixels, reading, page, file)


def _unblocked(file: str, flags: int) -> int:
    """Open a file without blocking: opening a pipe that has no writer would wait for ever."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def decode(
    data: bytearray,
    path: str,
    max_pixels: int = PIXEL_LIMIT,
    reading: Reading = USUAL,
    page: int = 0,
    location: str | None = None,
) -> UInt8[Tensor, "C H W"]:
    """Decode an encoded image to RGB, upright (EXIF), transparency on white, 16 bits scaled to 8.

    C is 3, or ``reading.channels``: 1 is brightness, 4 is colours and transparency. With another number, or a
    ``reading.range``, arrays (.npy) and the bands of TIFF count as images too.

    Reads all of `formats.PILLOW`, and HEIC and JPEG XL if their packages are installed. The content, not the name,
    decides the format. ``page`` selects one of several frames or pages, counted from 0. In memory the three values of a
    pixel lie together, unless EXIF turns the image: decoders write them so, and crops are fastest so.

    An image that has crashed a process is not decoded again; it is recognized by ``location`` (a file) or ``path``.

    Decoders' messages about damage are never printed. The image counts as bad; with ``reading.damaged`` "keep" its
    intact part is used, with a warning that names it.

    Raises:
        BadImage: empty, broken, truncated, not an image, or more than ``max_pixels``; named ``path``.

    """
    if not data:
        raise BadImage(path, "empty file")
    location = path if location is None else location
    if location in trace.refused:
        raise BadImage(path, trace.refused[location])
    trace.begin(location)
    try:
        return _decoded_or_refused(data, path, max_pixels, reading, page)
    finally:
        trace.end()


def _decoded_or_refused(
    data: bytearray, path: str, max_pixels: int, reading: Reading, page: int
) -> UInt8[Tensor, "C H W"]:
    keep = reading.damaged == "keep"
    image, complaint = _heard(data, path, max_pixels, reading, page)
    if complaint:
        # Messages of another thread of this process would be attributed to this image.
        image, complaint = _heard(data, path, max_pixels, reading, page)
    if complaint and not keep:
        raise BadImage(path, f"damaged: {complaint}")
    if complaint:
        warnings.warn(f"{printable(path)}: damaged, and kept: {complaint}", stacklevel=3)
    return image


def _heard(
    data: bytearray, path: str, max_pixels: int, reading: Reading, page: int
) -> tuple[UInt8[Tensor, "C H W"], str]:
    """The image, and its decoder's message about damage; empty if there is none.

    Raises:
        BadImage: as from `decode`.

    """
    complaints = Complaints()
    try:
        with heard() as messages:
            image = _decoded(data, max_pixels, reading, page, complaints)
        complaints.add(messages.text)
        return image, complaints.text
    except _Defect as defect:
        raise BadImage(path, str(defect)) from None
    except UnidentifiedImageError:
        raise BadImage(path, "not an image, or the beginning of one is damaged") from None
    except Image.DecompressionBombError:
        raise BadImage(path, f"more than {max_pixels:,} pixels") from None
    except Exception as error:
        # A damaged file makes decoders fail in any way (struct.error, SyntaxError, IndexError, ...), and
        # none of them may stop a run of a week.
        raise BadImage(path, reason(error, messages.text)) from error


def _decoded(data: bytearray, max_pixels: int, reading: Reading, page: int, complaints: Complaints) -> Tensor:
    keep = reading.damaged == "keep"
    if data.startswith(_JPEG):
        return fitted(_decode_jpeg(data, max_pixels, keep, complaints), reading.channels)
    format = format_of(data[:HEAD])
    if is_valued(format, reading):
        return decoded_values(data, format, reading, max_pixels, page)
    if data.startswith(_PNG):
        damage = _damage_of_png(data, max_pixels)
        if damage and not keep:
            raise _Defect(damage)
        complaints.add(damage)
    return _decode_pillow(data, max_pixels, complaints, page, reading=reading)


def _decode_jpeg(data: bytearray, max_pixels: int, keep: bool, complaints: Complaints) -> Tensor:
    header = jpeg_header(data)
    check_size(header.width, header.height, max_pixels)
    # libjpeg fills what is missing with gray and only warns. Inside scans the two bytes of the end marker
    # cannot occur, so without them the file was cut (or cut and padded with zeros).
    if data.rfind(b"\xff\xd9") < header.scan:
        if not keep:
            raise _Defect("truncated: the end-of-image marker is missing")
        complaints.add("truncated: the end-of-image marker is missing")
        data = data + b"\xff\xd9"
    need, size = needed_for_jpeg(header, len(data)), (header.width, header.height)
    smaller = exceeds_budget(need) or halvings(size[0] * size[1]) > 1
    if header.plain and header.components in (1, 3) and not smaller:
        with room(need):
            return decoded_jpeg(data, header.exif)
    heard_first = header.huffman and header.components in (1, 3, 4) and need <= budget()
    if heard_first:
        with room(need):
            decoded_jpeg(data)  # captures libjpeg's messages about damage, which Pillow does not pass on
    if smaller:
        return _decode_smaller(data, header, complaints)
    return _decode_pillow(data, max_pixels, complaints, in_use=need if heard_first else 0)


def _decode_smaller(data: bytearray, header: JpegHeader, complaints: Complaints) -> Tensor:
    """A JPEG at a half, a quarter or an eighth of its size; libjpeg does not decode the full size for it."""
    size = header.width, header.height
    for scale in (2, 4, 8):
        pixels = size[0] * size[1] // scale**2
        need = 11 * pixels + 2 * header.coefficients + 2 * len(data)
        if need <= budget() and halvings(pixels) == 1:
            break
    check(need, size, "JPEG")
    with room(need), noted_warnings(complaints), Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
        opened.draft(None, (size[0] // scale, size[1] // scale))  # rounded up, it would take the next larger one
        image = upright(opened)
        opened.close()
        return image


def _damage_of_png(data: bytearray, max_pixels: int) -> str:
    """Describe the damage of a PNG's chunks (W3C PNG, section 5.3); empty if there is none.

    torchvision's decoder crashes the process on damaged data, so Pillow decodes. Pillow skips checksums,
    and would take a part filled with zeros for a picture, so they are checked here.
    """
    if data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        check_size(width, height, max_pixels)
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return f"broken: wrong checksum in chunk {kind.decode('ascii', 'replace')}"
        if kind == b"IEND":
            return ""
        position = end + 4
    return "truncated: the end chunk is missing"


def _decode_pillow(
    data: bytearray, max_pixels: int, complaints: Complaints, page: int = 0, in_use: int = 0, reading: Reading = USUAL
) -> Tensor:
    """Decode with Pillow; ``in_use``: bytes allocated for this image before, which the C library may still hold."""
    formats, format = readable(data), format_of(data[:HEAD]) or "image"
    ahead = size_ahead(format, data)
    if format == "WEBP" and ahead and needed(format, ahead, len(data), True) > budget():
        check_size(*ahead, max_pixels)
        if (decoded := _decode_large_webp(data)) is not None:
            return fitted(decoded, reading.channels)
    with ExitStack() as stack:
        if ahead is not None:
            check_size(*ahead, max_pixels)
            _check_memory(format, ahead, len(data), False)
            need = needed(format, ahead, len(data), True)  # whether EXIF turns it is not known yet
            stack.enter_context(room(min(need + in_use, budget())))
            stack.enter_context(limit_to(need, format))
        stack.enter_context(noted_warnings(complaints))
        opened = stack.enter_context(Image.open(io.BytesIO(data), formats=formats))
        check_size(*opened.size, max_pixels)
        seekable = page and opened.format == "TIFF"  # formats that find a page without decoding those before
        if seekable:
            opened.seek(page)
            check_size(*opened.size, max_pixels)
        turned = _may_be_turned(opened, data)
        if isinstance(opened, Jpeg2KImageFile):
            check(need := reduced(opened, data, turned), opened.size, format)
        else:
            need = _check_memory(format, opened.size, len(data), turned, part_bytes(opened))
        if ahead is None:
            stack.enter_context(room(min(need + in_use, budget())))
            stack.enter_context(limit_to(need, format))
        if page and not seekable:
            opened.seek(page)
            check_size(*opened.size, max_pixels)
            _check_memory(format, opened.size, len(data), is_turned(opened))
        opened.load()
        image = upright(opened, reading)
        opened.close()  # its memory is free before another process allocates
        return image


def _decode_large_webp(data: bytearray) -> Tensor | None:
    """A still WebP, decoded at the largest fraction of its size that fits into memory; None for other images."""
    header = still_webp(data)
    if header is None:
        return None
    for scale in (1, 2, 4, 8):
        need = needed_for_webp(header, scale, len(data))
        if need <= budget() and halvings(header.size[0] * header.size[1] // scale**2) == 1:
            break
    check(need, header.size, "WEBP")
    with room(need), limit_to(need, "WEBP"):
        return upright(scaled_webp(data, header, scale))


def _may_be_turned(opened: Image.Image, data: bytearray) -> bool:
    """Whether EXIF may turn an image on its side; assumed for a PNG, which Pillow would have to decode to find out."""
    return b"eXIf" in data or b"rientation" in data if opened.format == "PNG" else is_turned(opened)


def _check_memory(format: str, size: tuple[int, int], encoded: int, turned: bool, part: int = 0) -> int:
    """The bytes that an image takes to decode.

    Raises:
        _Defect: it takes too many.

    """
    need = needed(format, size, encoded, turned, part)
    check(need, size, format)
    return need


def count_pages(file: str) -> int:
    """How many frames or pages an image file has; 1 if it cannot be read (decoding it will raise the error)."""
    try:
        with heard(), noted_warnings(Complaints()), open(file, "rb", opener=_unblocked) as stream:
            head = stream.read(HEAD)
            format = format_of(head)
            if format is None or format == "JPEG":  # further pages of a JPEG are previews
                return 1
            if format == "DICOM":
                return min(MOST_PAGES, count_frames(head + stream.read(budget() // 2)))
            # Only in a JPEG XL may the size come later, after the camera's metadata.
            size = size_ahead(format, head + stream.read(budget() // 2) if format == "JXL" else head)
            if size is not None:
                _check_memory(format, size, os.fstat(stream.fileno()).st_size, False)
            stream.seek(0)
            with Image.open(stream, formats=readable(head)) as opened:
                return min(MOST_PAGES, max(1, getattr(opened, "n_frames", 1)))
    except Exception:  # decoders fail in any way, and the file is read again
        return 1


def from_pillow(image: Image.Image, reading: Reading = USUAL) -> UInt8[Tensor, "C H W"]:
    """Convert an image that Pillow has opened to RGB: upright (EXIF), transparency on white, 16 bits scaled to 8.

    ``reading`` may set other channels than these three.

    Raises:
        BadImage: pixels that have no agreed range, or none that can be decoded.

    """
    name = str(getattr(image, "filename", "") or "image")
    try:
        return upright(image, reading)
    except _Defect as defect:
        raise BadImage(name, str(defect)) from None
