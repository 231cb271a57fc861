"""The console that all verbs print to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from crosslevel.utils.console import printable


class Terminal(Console):
    """Rich's console, on which no text steers the terminal: not in lines, tables or bars, whoever made the name in it.

    Args:
        quiet: print nothing.

    """

    def __init__(self, quiet: bool = False, **options: Any) -> None:
        usual = {"soft_wrap": True, "quiet": quiet, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(**(usual | options))

    def render_str(self, text: str, **options: Any) -> Text:
        """Text before it is measured."""
        return super().render_str(printable(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What others have made of text: all but the console's own codes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))
