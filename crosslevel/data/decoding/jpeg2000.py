"""JPEG 2000 at a reduced size: a file stores smaller sizes first, and the decoder can skip the rest."""

from __future__ import annotations

from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile

from crosslevel.data.decoding.memory import budget, halvings, needed
from crosslevel.data.decoding.sizes import boxes

_CODING, _CODING_OF_ONE, _ENDS = 0x52, 0x53, (0x90, 0xD9)  # markers
_LEFT_OUT = 2  # bytes for each pixel of the whole, when a part of its size is decoded: the table of its blocks


def reduced(opened: Jpeg2KImageFile, data: bytearray, turned: bool) -> int:
    """Set an opened image to be decoded at the largest fraction of its size that fits into memory.

    Returns:
        the bytes that it takes at most; more than the limit if no fraction is small enough.

    """
    for level in range(min(3, _levels(data)) + 1):
        size = -(-opened.width // 2**level), -(-opened.height // 2**level)
        left_out = _LEFT_OUT * opened.width * opened.height if level else 0
        need = needed("JPEG2000", size, len(data), turned) + left_out
        if need <= budget() and halvings(size[0] * size[1]) == 1:
            if level:
                opened.reduce = level
                # Pillow rounds the expected size, OpenJPEG rounds its result up: only sizes on which both agree are
                # used.
                opened._size = size[0] * 2**level, size[1] * 2**level
            return need
    return needed("JPEG2000", opened.size, len(data), turned)


def _levels(data: bytearray) -> int:
    """How often its size can be halved, by the main header (ITU T.800, annex A); 0 if that cannot be read."""
    start = 0 if data[:2] == b"\xff\x4f" else next((begin for kind, begin, _ in boxes(data) if kind == b"jp2c"), 0)
    at, levels = start + 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in _ENDS:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        offset = {_CODING: at + 9, _CODING_OF_ONE: at + 6}.get(marker)
        if offset is not None and offset < len(data):
            levels.append(data[offset])
        at += 2 + length
    return min(levels, default=0)
