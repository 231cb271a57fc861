"""LZW decompression for TIFF (TIFF 6.0, section 13): codes of 9 to 12 bits, the highest bit first.

Ours, since Python's standard library has no LZW, and Pillow gives at most four bands of a TIFF (see tiff.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from crosslevel.data.bad_files import _Defect

_CLEAR, _END, _FIRST = 256, 257, 258
_WIDEST = 12


def unpacked(data: memoryview, limit: int) -> bytes:
    """Decompress to at most ``limit`` bytes.

    Raises:
        _Defect: a code that is not in the table.

    """
    out, table, before = bytearray(), _table(), b""
    for code in _codes(data):
        if code is None:
            table, before = _table(), b""
            continue
        if code < len(table):
            entry = table[code]
        elif before and code == len(table):
            entry = before + before[:1]
        else:
            raise _Defect("damaged: an LZW code that nothing stands for")
        if before and len(table) < 1 << _WIDEST:
            table.append(before + entry[:1])
        out += entry
        before = entry
        if len(out) >= limit:
            break
    return bytes(out[:limit])


def _table() -> list[bytes]:
    return [*(bytes([i]) for i in range(256)), b"", b""]


def _codes(data: memoryview) -> Iterator[int | None]:
    """The codes up to the end; None where the table begins anew. Their width grows with the table, one code early."""
    buffer = bits = 0
    width, entries = 9, _FIRST
    for byte in data:
        buffer, bits = buffer << 8 | byte, bits + 8
        if bits < width:
            continue
        bits -= width
        code, buffer = buffer >> bits, buffer & (1 << bits) - 1
        if code == _END:
            return
        if code == _CLEAR:
            width, entries = 9, _FIRST
            yield None
            continue
        yield code
        entries += 1  # the new entry, made of the previous code and this one
        width = min(_WIDEST, max(9, entries.bit_length()))
