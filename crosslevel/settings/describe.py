"""A run's settings as a tree in the form of the command line, read from the objects themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from crosslevel.settings.kinds import plain
from crosslevel.utils import files
from crosslevel.utils.errors import hidden


def describe(thing: object, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments that would build ``thing`` again: from its attributes of the same names, or from its
    ``arguments()``.

    Raises:
        AttributeError: ``thing`` has no attribute for an argument.

    """
    if hasattr(thing, "arguments"):
        return {name: plain(value) for name, value in thing.arguments().items() if name not in skip}
    names = [n for n in inspect.signature(type(thing).__init__).parameters if n not in ("self", *skip)]
    return {name: plain(getattr(thing, name)) for name in names}


def write(tree: dict[str, Any], file: Path, notes: Sequence[str] = ()) -> str:
    """Write ``tree`` to ``file``, after ``notes`` as comments, and return its text.

    A continued run needs complete addresses: a file with a secret in an address can be read by its owner alone.
    """
    text: str = yaml.safe_dump(plain(tree), sort_keys=False, allow_unicode=True)
    comments = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    files.write(file, comments + text, private=hidden(text) != text)
    return text
