"""The size of an image by its own header, where Pillow allocates memory before giving it; and the parts of a TIFF."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from PIL import Image

from crosslevel.data.bad_files import _Defect

_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # of JPEG XL: width to height
_LENGTHS = (9, 13, 18, 30)  # of JPEG XL: bits of a side less 1
_HEADER = 16  # bytes that have the size of a JPEG XL
_STRIP_ROWS, _BITS, _SAMPLES, _TILE_WIDTH, _TILE_ROWS = 278, 258, 277, 322, 323  # tags of TIFF 6.0


def size_ahead(format: str | None, data: bytes | bytearray) -> tuple[int, int] | None:
    """Width and height of an image whose decoder allocates all pixels on opening; None for other formats.

    Raises:
        _Defect: there is no whole header.

    """
    read = _AHEAD.get(format or "")
    return None if read is None else read(data)


def _of_webp(data: bytes | bytearray) -> tuple[int, int]:
    """The size of a WebP (RFC 9649)."""
    head = bytes(data[12:30])
    if head[:4] == b"VP8X":
        return 1 + int.from_bytes(head[12:15], "little"), 1 + int.from_bytes(head[15:18], "little")
    if head[:4] == b"VP8L":
        bits = int.from_bytes(head[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[14:16], "little") & 0x3FFF, int.from_bytes(head[16:18], "little") & 0x3FFF


def _of_jxl(data: bytes | bytearray) -> tuple[int, int]:
    """By ISO/IEC 18181-1, annex D: the SizeHeader, bit after bit from the lowest."""
    stream = bytes(data[:_HEADER]) if data[:2] == b"\xff\x0a" else _codestream(data)
    if stream[:2] != b"\xff\x0a" or len(stream) < 3:
        raise _Defect("broken: no picture in the container")
    bits, at = int.from_bytes(stream[2:].ljust(_HEADER, b"\0"), "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> at - count & (1 << count) - 1

    small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take(_LENGTHS[take(2)])

    height, ratio = side(), take(3)
    return (height * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side()), height


def _codestream(data: bytes | bytearray) -> bytes:
    """The beginning of the codestream, from a container's box jxlc or its boxes jxlp in sequence (ISO/IEC 18181-2)."""
    codestream = b""
    for kind, begin, end in boxes(data):
        if kind == b"jxlc":
            return bytes(data[begin : min(end, begin + _HEADER)])
        if kind == b"jxlp":
            codestream += bytes(data[begin + 4 : min(end, begin + 4 + _HEADER)])
            if len(codestream) >= _HEADER:
                break
    return codestream


def boxes(data: bytes | bytearray) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each box, and where its content begins and ends."""
    at = 0
    while at + 8 <= len(data):
        length, begin = int.from_bytes(data[at : at + 4], "big"), at + 8
        if length == 1:
            length, begin = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        end = len(data) if length == 0 else at + length
        if end < begin:
            raise _Defect("broken: a box that ends before it begins")
        yield bytes(data[at + 4 : at + 8]), begin, min(end, len(data))
        at = end


_AHEAD: dict[str, Callable[[bytes | bytearray], tuple[int, int]]] = {"WEBP": _of_webp, "JXL": _of_jxl}


def part_bytes(image: Image.Image) -> int:
    """Bytes of the largest part of a TIFF that is decoded at once, a strip or a tile; 0 of all other formats."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.info.get("compression") == "raw":
        return 0
    width, height = image.size
    rows = max(1, min(height, int(tags.get(_STRIP_ROWS, height))))
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_ROWS, 0))
    bits = tags.get(_BITS, (1,))
    return int(max(width * rows, tile) * max(bits) * max(len(bits), int(tags.get(_SAMPLES, 1)))) // 8
