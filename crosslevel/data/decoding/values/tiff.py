"""The bands of a TIFF (TIFF 6.0 and BigTIFF), any number of them, in whole numbers or floats of up to 64 bits.

Pillow reads at most four, of 8 bits each. Every number in a file is first checked against the file's size or against
the size that the image can need.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decoding.values.lzw import unpacked as lzw_unpacked

Values = np.ndarray[Any, Any]

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _MEANING, _STRIPS, _TURNED, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = (
    256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284,
)  # fmt: skip
_PREDICTOR, _TILE_WIDTH, _TILE_ROWS, _TILES, _TILE_BYTES, _FORMAT = 317, 322, 323, 324, 325, 339
_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}  # of numbers in a tag: BYTE, SHORT, LONG, LONG8
_KINDS = {1: "u", 2: "i", 3: "f"}  # of samples
_MOST_TAGS, _MOST_PARTS = 4096, 2**20
_DEFLATE, _LZW, _PLAIN = (8, 32946), 5, 1


class Bands:
    """A page of a TIFF: ``height`` x ``width`` pixels of ``samples`` values of ``kind``.

    ``inverted``: 0 is white.

    Raises:
        _Defect: it is broken, or written in a way that is not read.

    """

    def __init__(self, data: bytes | bytearray, page: int = 0, at: int | None = None) -> None:
        self.data = memoryview(data)
        self.order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
        self.big = self._number(2, "H") == 43
        self.tags, self.following = self._tags(self._page_offset(page) if at is None else at)
        self.width, self.height, self.samples = (self._one(tag, default) for tag, default in _SIZES)
        bits, formats = self._several(_BITS, 2**16) or [1], self._several(_FORMAT, 2**16) or [1]
        if len({*bits}) > 1 or len({*formats}) > 1:
            raise _Defect("its bands are of different kinds: write them as one kind")
        if bits[0] not in (8, 16, 32, 64) or formats[0] not in _KINDS or (formats[0] == 3 and bits[0] == 8):
            raise _Defect(f"bands of {bits[0]} bits (sample format {formats[0]}) are not read: write 8, 16 or 32")
        self.kind = np.dtype(f"{_KINDS[formats[0]]}{bits[0] // 8}")
        self.packed, self.predictor = self._one(_COMPRESSION, _PLAIN), self._one(_PREDICTOR, 1)
        if self.packed not in (_PLAIN, _LZW, *_DEFLATE) or self.predictor not in (1, 2, 3):
            raise _Defect(
                f"bands in compression {self.packed} are not read: write it without compression, with LZW or deflate"
            )
        meaning = self._one(_MEANING, 1)
        if meaning not in (0, 1, 2):
            raise _Defect(f"its values are no brightness, colours or bands (photometric interpretation {meaning})")
        self.inverted = meaning == 0

    @classmethod
    def like(cls, data: bytes | bytearray, first: Bands, count: int) -> list[Bands]:
        """The pages after the first, if the file has ``count`` equal pages of one band each; else none."""
        bands = [first]
        while bands[-1].following and len(bands) <= count:
            bands.append(cls(data, at=bands[-1].following))
            if (bands[-1].shape, bands[-1].kind) != (first.shape, first.kind):
                return []
        return bands[1:] if len(bands) == count else []

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and the number of bands."""
        return self.height, self.width, self.samples

    def values(self) -> Values:
        """All values (H, W, samples); the caller must have checked their number."""
        out = np.zeros(self.shape, self.kind)
        planes = self.samples if self._one(_PLANAR, 1) == 2 else 1
        tiled = _TILES in self.tags
        rows = self._one(_TILE_ROWS, 0) if tiled else min(self.height, self._one(_ROWS, self.height))
        columns = self._one(_TILE_WIDTH, 0) if tiled else self.width
        if not rows or not columns:
            raise _Defect("broken: strips or tiles without pixels")
        down, across = -(-self.height // rows), -(-self.width // columns)
        offsets = self._several(_TILES if tiled else _STRIPS, _MOST_PARTS)
        sizes = self._several(_TILE_BYTES if tiled else _STRIP_BYTES, _MOST_PARTS)
        if len(offsets) != down * across * planes or len(sizes) != len(offsets):
            raise _Defect(f"broken: {len(offsets):,} strips or tiles, where {down * across * planes:,} would be")
        for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            plane, tile = divmod(number, down * across)
            top, left = tile // across * rows, tile % across * columns
            high = rows if tiled else min(rows, self.height - top)
            count = 1 if planes > 1 else self.samples
            if high * columns > 4 * max(out.size, 2**20):  # a tile may be larger than the image, but not by much
                raise _Defect("broken: tiles that are far larger than the image")
            part = self._part(offset, size, (high, columns, count))[: self.height - top, : self.width - left]
            into = out[top : top + part.shape[0], left : left + part.shape[1]]
            into[:, :, plane : plane + count] = part
        return _upright(out, self._one(_TURNED, 1))

    def _part(self, offset: int, size: int, shape: tuple[int, int, int]) -> Values:
        """A strip or tile (rows, columns, bands)."""
        need = shape[0] * shape[1] * shape[2] * self.kind.itemsize
        if offset + size > len(self.data):
            raise _Defect("truncated: a strip or tile ends behind the file")
        content = self.data[offset : offset + size]
        if self.packed in _DEFLATE:
            try:
                content = memoryview(
                    zlib.decompressobj().decompress(content, need)
                )  # never more than the image can need
            except zlib.error as error:
                raise _Defect(f"damaged: {error}") from None
        elif self.packed == _LZW:
            content = memoryview(lzw_unpacked(content, need))
        if len(content) < need:
            raise _Defect("truncated: a strip or tile has fewer values than its pixels")
        if self.predictor == 3:
            return _undone_floats(np.frombuffer(content[:need], np.uint8), shape, self.kind)
        values = np.frombuffer(content[:need], self.kind.newbyteorder(self.order)).reshape(shape).astype(self.kind)
        if self.predictor == 2:
            integers = values.view(f"u{self.kind.itemsize}")
            np.cumsum(integers, axis=1, dtype=integers.dtype, out=integers)
        return values

    def _page_offset(self, page: int) -> int:
        """The offset of a page's tags."""
        offset = self._number(8 if self.big else 4, self._word)
        for _ in range(page):
            offset = self._number(self._entries(offset).stop, self._word)
        if not offset:
            raise _Defect("there is no such page")
        return offset

    @property
    def _word(self) -> str:
        return "Q" if self.big else "I"

    def _entries(self, offset: int) -> range:
        """The offset of each tag of a page."""
        count, entry = self._number(offset, "Q" if self.big else "H"), 20 if self.big else 12
        if not offset or count > _MOST_TAGS:
            raise _Defect("broken: more tags than any image has" if offset else "there is no such page")
        begin = offset + (8 if self.big else 2)
        return range(begin, begin + entry * count, entry)

    def _tags(self, offset: int) -> tuple[dict[int, tuple[int, int, int]], int]:
        """The type, count and offset of each of a page's tags; and the next page's offset."""
        entries = self._entries(offset)
        return {self._number(at, "H"): self._tag(at) for at in entries}, self._number(entries.stop, self._word)

    def _tag(self, at: int) -> tuple[int, int, int]:
        kind, count = self._number(at + 2, "H"), self._number(at + 4, self._word)
        inside = at + (12 if self.big else 8)
        width = np.dtype(_TYPES.get(kind, "u1")).itemsize
        fits = count * width <= (8 if self.big else 4)
        return kind, count, inside if fits else self._number(inside, self._word)

    def _several(self, tag: int, limit: int) -> list[int]:
        kind, count, offset = self.tags.get(tag, (1, 0, 0))
        if kind not in _TYPES or count > limit:
            raise _Defect(f"broken: tag {tag} has {count:,} values of type {kind}")
        number = np.dtype(_TYPES[kind]).newbyteorder(self.order)
        content = self.data[offset : offset + count * number.itemsize]
        if len(content) != count * number.itemsize:
            raise _Defect("truncated: a tag lies behind the end of the file")
        values: list[int] = np.frombuffer(content, number).tolist()
        return values

    def _one(self, tag: int, default: int) -> int:
        values = self._several(tag, _MOST_PARTS)
        return values[0] if values else default

    def _number(self, at: int, kind: str) -> int:
        try:
            return int(struct.unpack_from(self.order + kind, self.data, at)[0])
        except struct.error:
            raise _Defect("truncated: a tag lies behind the end of the file") from None


_SIZES: Sequence[tuple[int, int]] = ((_WIDTH, 0), (_HEIGHT, 0), (_SAMPLES, 1))


def _undone_floats(content: np.ndarray[Any, Any], shape: tuple[int, int, int], kind: np.dtype[Any]) -> Values:
    """Undo the predictor for floats: a row has all highest bytes first, then all next, as differences (TIFF note 3)."""
    rows, columns, count = shape
    lines = content.reshape(rows, -1, count)
    lines = np.cumsum(lines, axis=1, dtype=np.uint8).reshape(rows, kind.itemsize, columns * count)
    values = np.ascontiguousarray(lines.transpose(0, 2, 1)).view(kind.newbyteorder(">"))
    return values.reshape(shape).astype(kind)


def _upright(values: Values, turned: int) -> Values:
    """Turn the image upright by its orientation tag, 1 to 8: from 5 on rows and columns are swapped first."""
    if turned >= 5:
        values = values.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if turned in (2, 3, 6, 7) else values
