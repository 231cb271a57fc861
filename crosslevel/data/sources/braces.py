"""Names with braces, which stand for several."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from crosslevel.utils.errors import SourceError

BRACES = re.compile(r"\{(?:(?P<first>\d{1,18})\.\.(?P<last>\d{1,18})|(?P<choices>[^{}]*,[^{}]*))\}")

MOST_NAMES, MOST_BRACES = 100_000, 10


def expanded(pattern: str) -> Iterator[str]:
    """The names that ``{000..009}`` and ``{a,b}`` in a name stand for, as shells and WebDataset expand them.

    Raises:
        SourceError: there are more than `MOST_BRACES`, or they stand for more than `MOST_NAMES`.

    """
    if pattern.count("{") > MOST_BRACES:
        raise SourceError(f"{pattern[:60]}...: more than {MOST_BRACES} braces")
    names = _expanded(pattern)
    yield from itertools.islice(names, MOST_NAMES)
    if next(names, None) is not None:
        raise SourceError(f"{pattern}: its braces stand for more than {MOST_NAMES:,} names")


def _expanded(pattern: str) -> Iterator[str]:
    braces = BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    for choice in _choices(braces):
        yield from (f"{pattern[: braces.start()]}{choice}{suffix}" for suffix in _expanded(pattern[braces.end() :]))


def _choices(braces: re.Match[str]) -> Iterator[str]:
    if braces["choices"] is not None:
        yield from braces["choices"].split(",")
        return
    first, last = int(braces["first"]), int(braces["last"])
    padded = any(len(end) > 1 and end.startswith("0") for end in (braces["first"], braces["last"]))
    width = max(len(braces["first"]), len(braces["last"])) if padded else 0
    step = 1 if first <= last else -1
    yield from (f"{number:0{width}}" for number in range(first, last + step, step))
