"""Output and progress on the console. It is all in this module, so that a file's name can neither style a line nor
control a terminal, and passwords in addresses are never printed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from crosslevel.utils.errors import printable
from crosslevel.utils.processes import CommandLine, is_first


class Terminal(Console):
    """Rich's console, on which no text (such as a file's name) can control the terminal: in lines, tables or bars.

    Args:
        quiet: print nothing.

    """

    def __init__(self, quiet: bool = False, **options: Any) -> None:
        defaults = {"soft_wrap": True, "quiet": quiet, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(**(defaults | options))

    def on_broken_pipe(self) -> None:
        """Print nothing more when nobody reads the output any more; the work goes on, unless it is a command's.

        Raises:
            BrokenPipeError: in a command, which then ends quietly (`unread`).

        """
        self.quiet = True
        if CommandLine.runs:
            raise  # noqa: PLE0704
        _drop_unwritten(self.file)

    def render_str(self, text: str, **options: Any) -> Text:
        """Clean the text before it is measured."""
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render without any control codes except the console's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def _drop_unwritten(file: IO[str]) -> None:
    """Empty the buffer of a file that nobody reads: the interpreter would complain of it at the end."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system
        output, sink = file.fileno(), os.open(os.devnull, os.O_WRONLY)
        saved = os.dup(output)
        try:
            os.dup2(sink, output)
            file.flush()
        finally:
            os.dup2(saved, output)
            os.close(saved)
            os.close(sink)


def printer(quiet: bool = False) -> Console:
    """The console of a verb, for output and progress; it prints nothing if ``quiet``.

    Lines are never wrapped, so that a path can be copied; in a notebook they are plain text, as in a file.
    """
    return Terminal(quiet)


def say(console: Console, line: str, *, unbroken: bool = False) -> None:
    """Print one line without markup, once for all ranks; nothing if it is empty; ``unbroken`` lines never wrap."""
    if line and is_first():
        console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=unbroken or None)


def progress_bar(
    console: Console | None, *figures: ProgressColumn, width: int | None = 40, transient: bool = True
) -> Progress:
    """A bar with the progress and the remaining time, on a terminal; nothing elsewhere.

    Args:
        console: shows the bar; None for no bar.
        figures: columns in place of the numbers done and to do.
        width: characters of the bar; None to fill the line.
        transient: whether it disappears at its end.

    """
    columns = (TextColumn("{task.description}"), BarColumn(width), *(figures or (MofNCompleteColumn(),)))
    hidden = console is None or not console.is_terminal
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=transient, disable=hidden)
