"""How the images of a source are read: the settings of decoding, the same for every source and every verb."""

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
    """The values that become 0 and 255, for images of more than 8 bits; written as ``-160:240``."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.15g}:{self.high:.15g}"


@dataclass(frozen=True)
class Reading:
    """How images are read; written after a source as ``photos/,damaged=keep,pages=all``.

    Args:
        damaged: what happens to an image whose decoder reports damage. refuse: it counts as a bad file. keep: its
            intact part is used, with a warning that names it.
        pages: of animations and files of several pages. first: only the first page is read. all: each page is an image,
            and the pages of a file are a track.
        channels: C, the channels of an image. 1: brightness; 3: red, green and blue on white; 4: red, green, blue and
            transparency (alpha); any other number: the bands of a TIFF or of an array (.npy).
        range: the two values that become 0 and 255, for images of more than 8 bits; values outside are clipped. None:
            the whole range of 16 bits, or the window that a DICOM file names.

    """

    damaged: Damaged = "refuse"
    pages: Pages = "first"
    channels: int = 3
    range: Range | None = None

    @property
    def takes_arrays(self) -> bool:
        """Whether files of arrays count as images: only if the user has set how their values are read."""
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
    """Split a source's text into the source and its reading settings.

    Raises:
        SourceError: an unknown value.

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
