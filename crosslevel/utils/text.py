"""Text as a person may see it: nothing in it steers a terminal, and no password of an address is in it."""

from __future__ import annotations

import re


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
