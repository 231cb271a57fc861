"""How the images of a source are read: the one place for settings of decoding, whatever the source and the verb."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from crosslevel.utils.errors import SourceError

Damaged = Literal["refuse", "keep"]
Pages = Literal["first", "all"]


@dataclass(frozen=True)
class Reading:
    """What is made of an image; written after a source as ``photos/,damaged=keep,pages=all``.

    Args:
        damaged: refuse: an image of which its own decoder reports damage is a bad file; keep: it is used as far as it
            goes, with a warning that names it.
        pages: first: of an animation or of a file of several pages the first one; all: each is an image, and they are a
            track.

    """

    damaged: Damaged = "refuse"
    pages: Pages = "first"

    @property
    def text(self) -> str:
        """What is written after a source; nothing where all is as usual."""
        given = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return "".join(f",{name}={value}" for name, value, usual in given if value != usual)


USUAL = Reading()
_CHOICES: dict[str, tuple[Any, ...]] = {"damaged": get_args(Damaged), "pages": get_args(Pages)}
_WRITTEN = re.compile(rf"(?s)(?P<rest>.*),(?P<key>{'|'.join(_CHOICES)})=(?P<value>[^,/]*)")


def apart(text: str) -> tuple[str, Reading]:
    """A source without what is written after it, and what that means.

    Raises:
        SourceError: a value that there is not.

    """
    given: dict[str, Any] = {}
    rest = text
    while match := _WRITTEN.fullmatch(rest):
        rest, key, value = match["rest"], match["key"], match["value"]
        if value not in _CHOICES[key]:
            raise SourceError(f"{text}: {key}={value}: use {' or '.join(_CHOICES[key])}")
        given.setdefault(key, value)
    return rest, Reading(**given)
