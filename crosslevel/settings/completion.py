"""Shell completion of verbs, options and their values; only shtab is imported."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from crosslevel.settings.command import Command
from crosslevel.settings.parser import Words
from crosslevel.utils.errors import MissingExtra, UserError

Shell = Literal["bash", "zsh", "fish"]

INSTALLATION = {
    "bash": "crosslevel completion bash > ~/.local/share/bash-completion/completions/crosslevel",
    "zsh": "crosslevel completion zsh > ~/.zfunc/_crosslevel  (a folder of $fpath)",
    "fish": "crosslevel completion fish > ~/.config/fish/completions/crosslevel.fish",
}


def script(shell: str, commands: Mapping[str, tuple[str, str]], plain: Iterable[str] = ()) -> str:
    """The script for a shell.

    Args:
        shell: bash, zsh or fish.
        commands: the verbs, each with its module and a description.
        plain: other words that can be given in place of a verb.

    Raises:
        UserError: another shell.
        MissingExtra: shtab is not installed.

    """
    if shell not in get_args(Shell):
        raise UserError(f"completion {shell}: give {', '.join(get_args(Shell))}, such as {INSTALLATION['bash']}")
    try:
        import shtab  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("completion needs shtab: pip install 'crosslevel[completion]'") from error
    parser = argparse.ArgumentParser(prog="crosslevel", add_help=False)
    verbs = parser.add_subparsers(dest="command")
    for name, (module, summary) in commands.items():
        verb = Words(Command.of(module, name))
        below = verbs.add_parser(name, help=summary, parents=[verb], add_help=False)
        below.add_argument("source", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]
    for name in plain:
        verbs.add_parser(name, add_help=False)
    text: str = shtab.complete(parser, shell)
    return text
