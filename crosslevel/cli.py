"""The command ``crosslevel``: one verb each, and what it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS = {
    "train": "crosslevel.train",
    "evaluate": "crosslevel.evaluate",
    "embed": "crosslevel.embed",
    "demo": "crosslevel.demo",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command: ``crosslevel VERB ...``."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == "--version":
        from crosslevel import __version__  # noqa: PLC0415

        print(f"crosslevel {__version__}")
        return
    verb = given[0] if given else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
        return
    if verb not in COMMANDS:
        print(f"crosslevel: there is no command {verb!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    # Each verb is imported when it is used: --help of one need not wait for the rest.
    function: Callable[..., Any] = getattr(import_module(COMMANDS[verb]), verb)
    import_module("crosslevel.commands").run(function, given[1:])
