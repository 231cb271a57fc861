"""Many files by one name, as shells and WebDataset write them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")


def expanded(pattern: str) -> Iterator[str]:
    """The names that ``{000..009}`` and ``{a,b}`` in a name stand for, as shells and WebDataset expand them."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    head, tail = pattern[: found.start()], pattern[found.end() :]
    for choice in _choices(found):
        yield from (f"{head}{choice}{rest}" for rest in expanded(tail))


def _choices(braces: re.Match[str]) -> Iterator[str]:
    if braces["choices"] is not None:
        yield from braces["choices"].split(",")
        return
    first, last = int(braces["first"]), int(braces["last"])
    padded = any(len(end) > 1 and end.startswith("0") for end in (braces["first"], braces["last"]))
    width = max(len(braces["first"]), len(braces["last"])) if padded else 0
    step = 1 if first <= last else -1
    yield from (f"{number:0{width}}" for number in range(first, last + step, step))
