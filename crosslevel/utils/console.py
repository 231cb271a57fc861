"""What is printed: one place, so that a file's name can neither style a line nor steer a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosslevel.utils.processes import local_rank

if TYPE_CHECKING:
    from rich.console import Console


def printer(quiet: bool = False) -> Console:
    """Where a verb prints, and where its progress is shown; nothing at all where it is ``quiet``.

    Lines are never broken, so that a path can be copied; in a notebook they are text, as in a file.
    """
    from rich.console import Console  # noqa: PLC0415

    return Console(soft_wrap=True, quiet=quiet, force_jupyter=False)


def say(console: Console, line: str, *, whole: bool = False) -> None:
    """Print one line as it is, without markup, once for all ranks; nothing where it is empty; ``whole``: unbroken."""
    if line and local_rank() == 0:
        console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=whole or None)


def printable(text: str) -> str:
    r"""``text`` with what steers a terminal, ends a line or is no character written as ``\x1b``, ``\n``, ``\udcff``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
