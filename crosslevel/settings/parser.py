"""From a command line to a call: a function's signature and docstring are its options and its help."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from crosslevel.methods import USUAL
from crosslevel.settings.recipes import find
from crosslevel.settings.trust import check, method_class, named_on
from crosslevel.utils.console import printable
from crosslevel.utils.errors import Interrupted, NotFinite

__all__ = ["Parser", "build", "method_class", "run", "with_options_of"]

BORROWED = "crosslevel_options"


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line, and where help is; exit status 2."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        hint = self._nearest(message)
        print(f"{self.prog}: {' '.join(lines)}{hint} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _nearest(self, message: str) -> str:
        """What an option that there is not was probably meant to be."""
        unknown = re.search(r"unrecognized arguments:.*?(--[\w.]+)", message, re.IGNORECASE | re.DOTALL)
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.7) if unknown else []
        return f": did you mean {near[0]}?" if near else ""


def with_options_of(other: Callable[..., Any], but: tuple[str, ...]) -> Callable[[Callable[..., Any]], Any]:
    """Mark a command that has ``other``'s options too, ``but`` for some: it gets them as ``settings``, a plain tree."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)[BORROWED] = (other, but)
        return function

    return mark


def run(function: Callable[..., Any], arguments: Sequence[str], **more: Any) -> Any:
    """Parse ``arguments`` for ``function`` and call it.

    ``--config FILE`` reads any part of the tree, options after it override it; ``--recipe NAME`` reads a file that
    comes with the package; ``--resume RUN`` continues a run with the settings in its ``config.yaml``. Another
    ``--method`` than theirs takes none of the settings that they have for theirs. ``seed`` is set before anything is
    built. ``more`` is what has no option: the function's keyword-only arguments. Warnings are one line each.

    Raises:
        SystemExit: status 2 for what the user can mend, 1 for a loss that is no number, one line on stderr; 128 and the
            number of a signal that ended a run which was saved.

    """
    parser = build(function)
    try:
        with _short_warnings(parser.prog):
            settings = parser.parse_args(_prepared(function, list(arguments), parser))
            if settings.get("seed") is not None:
                torch.manual_seed(settings.seed)
            if BORROWED in vars(function):
                return function(**_borrowed(function, parser, settings), **more)
            built = parser.instantiate(settings)
            built.pop("config", None)
            built.pop("recipe", None)
            for name, (kind, _) in factories(function).items():
                built[name] = partial(kind, **built[name].as_dict())
            return function(**built, **more)
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Interrupted as end:
        sys.exit(end.status)
    except (ValueError, OSError, NotFinite, ImportError) as error:
        if os.environ.get("CROSSLEVEL_TRACEBACK"):
            raise
        print(f"{parser.prog}: {_one_line(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NotFinite) else 2)


def build(function: Callable[..., Any]) -> Parser:
    """The parser of one command."""
    parser = Parser(prog=f"crosslevel {function.__name__}", description=(function.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with any part of these settings")
    _add(parser, function, as_positional=True)
    if BORROWED in vars(function):
        other, but = vars(function)[BORROWED]
        _add(parser, other, but=but)
    if {"encoder", "cld"} <= _names(function):
        parser.add_argument("--recipe", type=str, help="settings of a published result; crosslevel recipes lists them")
        # Alone, the add-on leaves the weight to the loop that it is added to; here it is the loop's.
        parser.set_defaults({"cld.weight": 0.25})
    return parser


def _add(parser: Parser, function: Callable[..., Any], but: Sequence[str] = (), as_positional: bool = False) -> None:
    """The function's options; those of a part that it makes itself are that part's own."""
    made = factories(function)
    skip = {*but, *_hidden(function), *made}
    parser.add_function_arguments(function, as_positional=as_positional, fail_untyped=True, skip=skip)
    for name, (kind, given) in made.items():
        parser.add_class_arguments(kind, name, fail_untyped=True, instantiate=False, skip=given)


def factories(function: Callable[..., Any]) -> dict[str, tuple[type, set[str | int]]]:
    """The parameters whose default is a class: it is what the function makes when it is time, and what of its arguments
    the function gives itself, by the parameter's type (``Callable[[int], CrossLevel]``: the first).
    """
    hints, out = get_type_hints(function), dict[str, tuple[type, set[str | int]]]()
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, type) and parameter.default is not parameter.empty:
            types = [hints[name], *get_args(hints[name])]
            arguments = next(get_args(kind)[0] for kind in types if get_origin(kind) is Callable)
            out[name] = parameter.default, set(list(inspect.signature(parameter.default).parameters)[: len(arguments)])
    return out


def _names(function: Callable[..., Any]) -> set[str]:
    """All arguments of a command, its own and those that it has of another."""
    other, but = vars(function).get(BORROWED, (None, ()))
    return set(function.__annotations__) | (set(other.__annotations__) - set(but) if other else set())


def _hidden(function: Callable[..., Any]) -> set[str | int]:
    """Keyword-only arguments are for callers, not for the command line."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _borrowed(function: Callable[..., Any], parser: Parser, settings: Namespace) -> dict[str, Any]:
    """The command's own arguments, and the other's as ``settings``."""
    tree = yaml.safe_load(parser.dump(settings, skip_unset=False))
    own = {name: tree.pop(name) for name in inspect.signature(function).parameters if name in tree}
    return {**own, "settings": {k: v for k, v in tree.items() if k not in ("config", "recipe")}}


def _prepared(function: Callable[..., Any], arguments: list[str], parser: Parser) -> list[str]:
    """What argparse cannot do: --resume as a config, method names in any case, a default method's options."""
    names = _names(function)
    arguments = given = _apart([_spelled(argument) for argument in arguments], ("--config", "--method"))
    if "crops" in names:
        arguments = _with_crops(arguments)
    if "search" in names:
        arguments = _gathered(arguments, "--search")
    if "resume" in names or BORROWED in vars(function):
        arguments = _with_images(_resumed(_with_recipe(arguments)))
    if "runs" in names:
        arguments = _as_list(arguments)
    named = named_on(given) if "method" in names else {}
    for file in (arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "--config"):
        check(_read(file), file, {*named, *named.values()})
    return _with_method(arguments, named) if "method" in names else arguments


def _with_method(arguments: list[str], known: dict[str, str]) -> list[str]:
    """One method, by its import path: of several the last one named, the usual one of none.

    A method that is not the last one goes with all of its settings: those would be inherited by their names.
    """
    places = [i for i, a in enumerate(arguments[:-1]) if a in ("--config", "--method")]
    trees = {i: _read(arguments[i + 1]) for i in places if arguments[i] == "--config"}
    named = {i: _named(trees[i], known) if i in trees else method_class(arguments[i + 1], known) for i in places}
    chosen = next((name for name in reversed(named.values()) if name), None)
    kept: dict[int, list[str]] = {}
    for i, name in named.items():
        if i not in trees:
            kept[i] = ["--method", name] if name == chosen and name else []
        elif name:
            told = _settings(trees[i]["method"], name) if name == chosen else {}
            tree = {**{k: v for k, v in trees[i].items() if k != "method"}, **told}
            kept[i] = ["--config", yaml.safe_dump(tree, allow_unicode=True)]
    out = [] if chosen else ["--method", method_class(USUAL)]
    for i, argument in enumerate(arguments):
        out += kept.get(i, [] if i - 1 in kept else [argument])
    return out


def _named(tree: dict[str, Any], known: dict[str, str]) -> str | None:
    """The import path of the method that a config names: ``method: NAME`` or ``method: {class_path: NAME, ...}``."""
    told = tree.get("method")
    name = told.get("class_path") if isinstance(told, dict) else told
    return method_class(name, known) if isinstance(name, str) else None


def _settings(told: str | dict[str, Any], name: str) -> dict[str, Any]:
    return {"method": {**(told if isinstance(told, dict) else {}), "class_path": name}}


def _apart(arguments: list[str], options: tuple[str, ...]) -> list[str]:
    """These ``options`` and their values as two arguments, however they are written."""
    out: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        out += [name, value] if equals and name in options else [argument]
    return out


def _spelled(argument: str) -> str:
    """An option as it is declared: -o is --output, --data-root is --data_root."""
    if argument == "-o":
        return "--output"
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") and name != "--" else argument


def _with_crops(arguments: list[str]) -> list[str]:
    """--crops alone takes every setting's default, or a config's; false takes back a config's crops."""
    values = {"true": "{}", "yes": "{}", "false": "null", "no": "null", "none": "null", "null": "null"}
    out: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if i and arguments[i - 1] == "--crops" and (argument.lower() in values or argument.startswith("{")):
            out[-1] = f"--crops={values.get(argument.lower(), argument)}"
        elif name == "--crops":
            out.append(f"--crops={values.get(value.lower(), value) if equals else '{}'}")
        else:
            out.append(argument)
    return out


def _with_recipe(arguments: list[str]) -> list[str]:
    """A recipe is the config that comes first."""
    name = _value(arguments, "--recipe")
    return arguments if name is None else ["--config", str(find(name).file), *arguments]


def _value(arguments: list[str], option: str) -> str | None:
    """What ``option`` is given, in either spelling."""
    apart = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == option]
    folded = [a.split("=", 1)[1] for a in arguments if a.startswith(f"{option}=")]
    return next(iter(apart + folded), None)


def _resumed(arguments: list[str]) -> list[str]:
    folder = _value(arguments, "--resume")
    if folder is None:
        return arguments
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        raise ValueError(f"--resume {folder}: there is no run here (it has no config.yaml)")
    return ["--config", str(config), *arguments]


def _with_images(arguments: list[str]) -> list[str]:
    """The images last: those of the command line, which a later config would replace, or else those of a config."""
    files = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a == "--config"]
    named = [images for images in (_read(file).get("images") for file in files) if images is not None]
    is_value = False
    for i, argument in enumerate(arguments):
        if argument == "--":
            return arguments
        if not (is_value or argument.startswith("-")):
            return [*arguments[:i], *arguments[i + 1 :], "--", argument]
        is_value = argument.startswith("-") and "=" not in argument
    return [*arguments, "--", str(named[-1])] if named else arguments


def _gathered(arguments: list[str], option: str) -> list[str]:
    """An option that is given several times, as one with a list."""
    arguments = _apart(arguments, (option,))
    places = [i for i, a in enumerate(arguments[:-1]) if a == option]
    values = [arguments[i + 1] for i in places]
    others = [a for i, a in enumerate(arguments) if i not in places and i - 1 not in places]
    return [f"{option}={json.dumps(values)}", *others] if values else others


def _as_list(arguments: list[str]) -> list[str]:
    """All positional arguments as one list, which is how the parser reads several."""
    named: list[str] = []
    others: list[str] = []
    for i, argument in enumerate(arguments):
        is_value = i > 0 and arguments[i - 1].startswith("--") and "=" not in arguments[i - 1]
        (others if argument.startswith("-") or is_value else named).append(argument)
    return [*others, json.dumps(named)] if named else others


def _read(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {_one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {file}: it holds no settings")
    return tree


@contextmanager
def _short_warnings(prog: str) -> Iterator[None]:
    """Warnings without the place in the code and the line that is there: who uses the command did not write it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **line: f"{prog}: warning: {_one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(error: BaseException | str) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)
