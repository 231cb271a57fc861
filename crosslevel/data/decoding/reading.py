"""How the images of a source are read: the one place for settings of decoding, whatever the source and the verb."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from crosslevel.utils.errors import SourceError, UserError

Damaged = Literal["refuse", "keep"]
Pages = Literal["first", "all"]
MOST_CHANNELS = 1024


class Range(NamedTuple):
    """The values of more than 8 bits that become 0 and 255; written as ``-160:240``."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.15g}:{self.high:.15g}"


@dataclass(frozen=True)
class Reading:
    """How images are read; written after a source as ``photos/,damaged=keep,pages=all``.

    Args:
        damaged: refuse: an image of which its own decoder reports damage is a bad file; keep: it is used as far as it
            goes, with a warning that names it.
        pages: first: of an animation or of a file of several pages the first one; all: each is an image, and they are a
            track.
        channels: of an image, C: 1 is its brightness, 3 red, green and blue on white, 4 the same with its transparency
            (alpha) beside; any other number is that of the bands of a TIFF or of an array (.npy).
        range: of values of more than 8 bits, those that become 0 and 255; what lies outside becomes these. None: the
            whole of 16 bits, of DICOM the window that the file names.

    """

    damaged: Damaged = "refuse"
    pages: Pages = "first"
    channels: int = 3
    range: Range | None = None

    @property
    def takes_arrays(self) -> bool:
        """Whether files of arrays are images: their values mean nothing unless somebody says how to read them."""
        return self.channels != USUAL.channels or self.range is not None

    @property
    def text(self) -> str:
        """The settings as they are written after a source; empty if all are defaults."""
        settings = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return "".join(f",{name}={value}" for name, value, default in settings if value != default)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise UserError(f"use {' or '.join(words)}")
        return text

    return read


def _channels(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_CHANNELS:
        raise UserError(f"needs a whole number from 1 to {MOST_CHANNELS}")
    return int(text)


def _range(text: str) -> Range:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low = high = math.nan
    if not math.isfinite(high - low) or low >= high:
        raise UserError("needs the smallest and the largest value, such as -160:240")
    return Range(low, high)


USUAL = Reading()
_READ: dict[str, Callable[[str], Any]] = {
    "damaged": _one_of(*get_args(Damaged)),
    "pages": _one_of(*get_args(Pages)),
    "channels": _channels,
    "range": _range,
}
_WRITTEN = re.compile(rf"(?s)(?P<rest>.*),(?P<key>{'|'.join(_READ)})=(?P<value>[^,/]*)")


def split_reading(text: str) -> tuple[str, Reading]:
    """A source without what is written after it, and what that means.

    Raises:
        SourceError: a value that there is not.

    """
    settings: dict[str, Any] = {}
    source = text
    while match := _WRITTEN.fullmatch(source):
        source, key, value = match["rest"], match["key"], match["value"]
        try:
            read = _READ[key](value)
        except UserError as error:
            prefix = f"{text}: " if not text.startswith(",") else ""  # a setting alone
            raise SourceError(f"{prefix}{key}={value}: {error}") from None
        settings.setdefault(key, read)
    return source, Reading(**settings)
