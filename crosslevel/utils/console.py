"""What is printed, and how progress is shown: one place, so that a file's name can neither style a line nor steer a
terminal, nor is a password in an address told to whoever reads along.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from crosslevel.utils.errors import printable
from crosslevel.utils.processes import BROKEN_PIPE, is_first


class Terminal(Console):
    """Rich's console, on which no text steers the terminal: not in lines, tables or bars, whoever made the name in it.

    Args:
        quiet: print nothing.

    """

    def __init__(self, quiet: bool = False, **options: Any) -> None:
        defaults = {"soft_wrap": True, "quiet": quiet, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(**(defaults | options))

    def on_broken_pipe(self) -> None:
        """Nobody reads what is printed any more: end as other commands do.

        Raises:
            SystemExit: in any case.

        """
        try:
            super().on_broken_pipe()
        except SystemExit as end:
            raise SystemExit(BROKEN_PIPE) from end

    def render_str(self, text: str, **options: Any) -> Text:
        """Text before it is measured."""
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render without any codes but the console's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def printer(quiet: bool = False) -> Console:
    """The console of a verb, for output and progress; it prints nothing if ``quiet``.

    Lines are never broken, so that a path can be copied; in a notebook they are text, as in a file.
    """
    return Terminal(quiet)


def say(console: Console, line: str, *, unbroken: bool = False) -> None:
    """Print one line without markup, once for all ranks; nothing if it is empty; ``unbroken`` lines never wrap."""
    if line and is_first():
        console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=unbroken or None)


def progress_bar(
    console: Console | None, *figures: ProgressColumn, width: int | None = 40, transient: bool = True
) -> Progress:
    """A bar with what is done and how long the rest takes, on a terminal; nothing elsewhere.

    Args:
        console: where it is shown; None for nowhere.
        figures: columns in place of the numbers done and to do.
        width: characters of the bar; None for as many as the line has.
        transient: whether it goes when it ends.

    """
    columns = (TextColumn("{task.description}"), BarColumn(width), *(figures or (MofNCompleteColumn(),)))
    hidden = console is None or not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=transient, disable=hidden)
