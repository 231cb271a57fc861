"""What is printed: one place, so that a file's name can neither style a line nor steer a terminal, nor is a password
in an address told to whoever reads along.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from crosslevel.utils.processes import is_first

if TYPE_CHECKING:
    from rich.console import Console


def printer(quiet: bool = False) -> Console:
    """Where a verb prints, and where its progress is shown; nothing at all where it is ``quiet``.

    Lines are never broken, so that a path can be copied; in a notebook they are text, as in a file.
    """
    from crosslevel.utils.terminal import Terminal  # noqa: PLC0415

    return Terminal(quiet)


def say(console: Console, line: str, *, whole: bool = False) -> None:
    """Print one line as it is, without markup, once for all ranks; nothing where it is empty; ``whole``: unbroken."""
    if line and is_first():
        console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=whole or None)


def printable(text: str, lines: bool = False) -> str:
    r"""``text`` with what steers a terminal, ends a line or is no character written as ``\x1b``, ``\n``, ``\udcff``.

    Passwords in addresses are hidden. ``lines``: ends of lines, and tabs, stay.
    """
    kept = "\n\t" if lines else ""
    text = hidden(text) if "@" in text else text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


_SCHEMES = "s3a?|gs|gcs|az|abfss?|https?|s?ftp|hdfs|postgres(?:ql)?|mysql|mariadb|oracle|mssql|redis"
_PASSWORD = re.compile(
    # scheme, slashes (any number: it may be mistyped) and name
    rf"((?:\b(?:{_SCHEMES})(?:\+\w+)?:/{{0,2}}|//)[^\s/:@]*):"
    # not a port; up to the last @ that begins no part of a source
    r"(?!\d+/(?!\S*@))\S*@(?!\w+=)"
)


def hidden(text: str) -> str:
    """``text`` without the passwords of its addresses: ``postgresql://bob:***@host/database``."""
    return _PASSWORD.sub(r"\1:***@", text)
