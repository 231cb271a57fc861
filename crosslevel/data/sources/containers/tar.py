"""The members of a tar file, read from its beginning to its end by one walk over its headers.

Ours, as it is stricter than `tarfile`, which takes a damaged header after the first member for the end of the file:
here each error gives the byte offset and, if known, the member.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

BLOCK = 512
LONGEST = 2**20  # bytes of a header that extends the next one
LARGEST = 2**50  # the most bytes of a member: no shard is longer, and larger numbers are a sign of damage or malice
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # headers only: links, devices, folders, pipes
_WITH_DATA = (b"0", b"\0", b"7")


Damaged = Literal["header", "end", "pax", "long", "size", "sparse"]


class Tape(Protocol):
    """A file that is read once, from beginning to end; ``at`` is the next byte."""

    @property
    def at(self) -> int:
        """The next byte."""

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer only at the end."""

    def skip(self, count: int) -> int:
        """Skip the next ``count`` bytes; return the number of bytes skipped, fewer at the end."""


class Member(NamedTuple):
    """A regular file: its name, the offset of its data, and their size in bytes."""

    name: bytes
    offset: int
    size: int


class BadTar(Exception):
    """A tar file is damaged at byte ``at``; ``member`` is the name of the damaged member, if it is known.

    ``damage`` is "header" (no valid header there), "end" (the file ends), "pax" (a broken extended header), "long" (an
    extended header longer than `LONGEST`), "size" (a member said to be larger than `LARGEST`) or "sparse" (a member
    with holes, which cannot be read).
    """

    def __init__(self, damage: Damaged, at: int, member: bytes = b"") -> None:
        super().__init__(damage, at, member)
        self.damage, self.at, self.member = damage, at, member


def tar_members(tape: Tape) -> Iterator[Member]:
    """Yield the regular files (POSIX.1-1988 and pax, GNU's long names and sizes), with the tape at each one's data.

    The caller may read the data or a part of it; the rest is skipped.

    Raises:
        BadTar: after all members before the damage.

    """
    extended: dict[bytes, bytes] = {}  # for the next member, from headers before it
    while True:
        at, header = tape.at, tape.read(BLOCK)
        if len(header) < BLOCK:
            raise BadTar("end", at + len(header))
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _size_of(header)
        if size is None:
            raise BadTar("header", at)
        size = 0 if kind in _NO_DATA else int(extended.get(b"size", size))
        name = extended.get(b"path", _name_of(header))
        if size > LARGEST:
            raise BadTar("size", at, name)
        end = tape.at + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x"):
            extended |= _extended(tape, at, kind, size)
        elif kind not in (b"K", b"g"):
            extended = {}
            if kind == b"S":
                raise BadTar("sparse", at, name)
            if kind in _WITH_DATA:
                yield Member(name, tape.at, size)
        if tape.skip(end - tape.at) < end - tape.at:
            raise BadTar("end", tape.at, name)


def _size_of(header: bytes) -> int | None:
    """The bytes of data that a header announces; None if it is no valid header."""
    try:
        if int(header[148:156].strip(b" \0"), 8) not in _checks(header[:148] + b" " * 8 + header[156:]):
            return None
        field = header[124:136]
        size = int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _checks(header: bytes) -> tuple[int, int]:
    """The checksum of a header, and the variant with signed bytes that some old programs wrote."""
    return sum(header), sum(header) - 256 * sum(byte > 127 for byte in header)


def _name_of(header: bytes) -> bytes:
    name, folder = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return folder + b"/" + name if folder and header[257:263] == b"ustar\0" else name


def _extended(tape: Tape, at: int, kind: bytes, size: int) -> dict[bytes, bytes]:
    r"""Path and size of the next member: GNU's long name, or pax records, ``<length> <key>=<value>\n`` each."""
    if size > LONGEST:
        raise BadTar("long", at)
    data = tape.read(size)
    if len(data) < size:
        raise BadTar("end", tape.at)
    if kind == b"L":
        return {b"path": data.split(b"\0", 1)[0]}
    extended: dict[bytes, bytes] = {}
    while data.strip(b"\0"):
        length, _, record = data.partition(b" ")
        if not _is_number(length) or not len(length) < int(length) <= len(data):
            raise BadTar("pax", at)
        key, _, value = record[: int(length) - len(length) - 2].partition(b"=")
        extended[key] = value
        data = data[int(length) :]
    if not _is_number(extended.get(b"size", b"0")):
        raise BadTar("pax", at)
    return {key: value for key, value in extended.items() if key in (b"path", b"size")}


def _is_number(text: bytes) -> bool:
    """Whether the text is a number short enough for Python, which refuses thousands of digits."""
    return text.isdigit() and len(text) <= 32
