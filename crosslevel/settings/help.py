"""The output of ``--help``: the common options, all options, or those of one part."""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from crosslevel.settings import trust
from crosslevel.settings.command import Command
from crosslevel.settings.kinds import Kind, is_list, short
from crosslevel.settings.signature import REQUIRED, Argument, Choice, Group, Option, methods
from crosslevel.settings.signature import of_method as options_of
from crosslevel.utils.errors import UserError, did_you_mean

COLUMN = 26


def of_command(command: Command, topic: str = "") -> str:
    """The help of a command.

    Args:
        command: the command.
        topic: empty for the common options, ``all``, or the name of a part, such as encoder.

    Raises:
        UserError: there is no such part.

    """
    groups = [a.name for a in command.arguments if isinstance(a, Group)]
    if topic not in ("", "all", *groups):
        raise UserError(f"--help {topic}: {did_you_mean(topic, ['all', *groups])}")
    if topic in groups:
        return "\n".join(_group(next(a for a in command.arguments if a.name == topic)))
    marked = _marked(command)
    visible = marked if marked and topic != "all" else [name for name in command.options if "." not in name]
    positionals = [(o.name.upper() + ("..." if is_list(o.kind) else ""), o) for o in command.positional]
    lines = [
        f"usage: crosslevel {command.name} {' '.join(name for name, _ in positionals)} [options]".replace("  ", " "),
        "",
    ]
    text = command.signature.summary if topic == "all" or not marked else command.summary
    lines += [line for part in text.split("\n\n") for line in [*_wrapped(part), ""]]
    for name, option in positionals:
        lines += _entry(name, option.help)
    lines += ["", "options:"]
    for name in visible:
        lines += _option_named(command, name)
    if topic == "all" or not marked:
        for option in (*command.encoder_options, *command.reading):
            lines += _entry(f"--{option.name} {short(option.kind)}", option.help)
    if topic == "all":
        for option in command.files:
            lines += _entry(f"--{option.name} {short(option.kind)}", option.help)
        for part in command.arguments:
            if isinstance(part, Group):
                lines += ["", *_group(part)]
        lines += (
            ["", f"--method.help NAME: the settings of a method ({', '.join(methods())})"] if command.has_method else []
        )
    elif marked:
        lines += ["", f"crosslevel {command.name} --help all has the other options."]
    return "\n".join(lines)


def of_method(name: str) -> str:
    """The settings of a method, by its name in any case or its import path."""
    path = trust.method_class(name, trust.foreign_methods([name]))
    short_name = path.rpartition(".")[2]
    lines = [f"{short_name}: crosslevel train IMAGES --method {short_name} [options]", ""]
    return "\n".join(lines + _options("method", options_of(path)))


def usual_options(command: Command) -> list[str]:
    """The names of the common options, from the command's mark."""
    mark = command.signature.marks.get("verb")
    return [] if mark is None else [str(ast.literal_eval(argument)) for argument in mark.args]


_marked = usual_options


def _option_named(command: Command, name: str) -> list[str]:
    if name in command.options:
        option = command.options[name]
        default = command.defaults.get(name, option.default)
        return [] if option in command.positional else _option(name, option, default)
    for file in command.files:
        if file.name == name:
            return _entry(f"--{name} {short(file.kind)}", file.help)
    part = next(a for a in command.arguments if a.name == name)
    return _entry(_title(part), part.help)


def _title(part: Argument) -> str:
    return f"--{part.name} {'|'.join(methods())}" if isinstance(part, Choice) else f"--{part.name}"


def _group(part: Argument) -> list[str]:
    assert isinstance(part, Group)
    return [*_wrapped(f"{part.name}: {part.help}"), *_options(part.name, part.options)]


def _options(name: str, options: Iterable[Option]) -> list[str]:
    return [line for option in options for line in _option(f"{name}.{option.name}", option, option.default)]


def _option(name: str, option: Option, default: Any) -> list[str]:
    short_form = "-o, " if name == "output" else f"-{name}, " if len(name) == 1 else ""
    suffix = "" if default in (REQUIRED, None) else f" (default: {_value(default)})"
    return _entry(f"{short_form}--{name} {_kind(option.kind)}", option.help.rstrip(".") + suffix)


def _kind(kind: Kind) -> str:
    return short(kind)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(_value, value))}]" if isinstance(value, list | tuple) else str(value)


def _entry(name: str, text: str) -> list[str]:
    body = _wrapped(text, " " * (COLUMN + 2)) or [""]
    if len(name) >= COLUMN:
        return [f"  {name}", *body]
    return [f"  {name:<{COLUMN}}{body[0].lstrip()}", *body[1:]]


def _wrapped(text: str, indent: str = "") -> list[str]:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
