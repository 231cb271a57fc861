"""From a command line to a call: a function's signature and docstring are its options and its help.

Ours, on the standard library's argparse: jsonargparse and tyro need the imported function, and importing it loads
torch. Here help and refusals do without it (tests/settings/test_startup.py).
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from crosslevel.data.uri import read_as
from crosslevel.settings import help as texts
from crosslevel.settings import trust
from crosslevel.settings.command import SOURCES, Command, Settings, as_given, config_of, recipe_file
from crosslevel.settings.kinds import FALSE, NOTHING, TRUE, is_list, plain, takes
from crosslevel.settings.parts import as_argument
from crosslevel.settings.signature import Group
from crosslevel.settings.stores import at_hand
from crosslevel.settings.weights import RUNS, by_name
from crosslevel.utils.errors import CrosslevelError, Interrupted, NotFinite, UserError, near_hint, printable
from crosslevel.utils.processes import Stopped, output_is_broken, raising_stopped

SOFTWARE = 70  # sysexits.h: the program's own fault
REFUSED = 2


@dataclass
class Line:
    """A parsed command line: options in their order, and positional arguments."""

    options: list[tuple[str, str]] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    help: str | None = None
    method_help: str | None = None
    print_config: bool = False

    def values(self, *names: str) -> list[str]:
        """All values of these options."""
        return [text for name, text in self.options if name in names]


class _Note(argparse.Action):
    """Records an option in its position, as the order matters."""

    def __call__(self, parser: Any, line: Any, text: Any, option: str | None = None) -> None:
        line.options.append((self.dest, text))


class _NoteFlag(argparse.Action):
    """Record an option whose value may be left out; a word after it that is no value is a positional argument."""

    def __call__(self, parser: Any, line: Any, text: Any, option: str | None = None) -> None:
        if text is not None and text.lower() not in TRUE + FALSE + NOTHING and text[:1] != "{":
            line.alone.append(text)
            text = None
        line.options.append((self.dest, "true" if text is None else text))


class _NoteHelp(argparse.Action):
    """Record which help is requested: the common options, all options, or those of one part."""

    def __call__(self, parser: Any, line: Any, text: Any, option: str | None = None) -> None:
        line.help = text or ""


class Words(argparse.ArgumentParser):
    """The options of a command, each under every spelling; errors are exceptions, in the user's words."""

    def __init__(self, command: Command, line: Sequence[str] = ()) -> None:
        super().__init__(prog=f"crosslevel {command.name}", add_help=False, allow_abbrev=False, exit_on_error=False)
        self.spellings: list[str] = []
        for name, option in command.options.items():
            if option not in command.positional:
                self.take(name, option.help, takes(option.kind, "bool") and not takes(option.kind, "str"))
        for option in (*command.files, *command.reading, *command.encoder_options):
            self.take(option.name, option.help)
        for argument in command.arguments:
            if isinstance(argument, Group) and argument.optional:
                self.take(argument.name, argument.help, alone=True)
        if command.has_method:
            self.take("method", "the instance branch, by its name")
            self.add_argument("--method.help", dest="method_help", metavar="METHOD", nargs="?", const="")
            # A method's settings are known only when the method is: any name is accepted here, and checked then.
            for word in dict.fromkeys(word.partition("=")[0] for word in line if word.startswith("--method.")):
                if word != "--method.help":
                    self.take(word[2:].replace("-", "_"), "")
        self.add_argument("--print_config", "--print-config", dest="print_config", action="store_true")
        self.add_argument("-h", "--help", nargs="?", metavar="all", action=_NoteHelp, help="all: every option")

    def take(self, name: str, text: str, alone: bool = False) -> None:
        """Accept an option; ``alone`` if its value may be left out."""
        spellings = [
            *(["-o"] if name == "output" else [f"-{name}"] if len(name) == 1 else []),
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
        ]
        more: dict[str, Any] = {"action": _NoteFlag, "nargs": "?"} if alone else {"action": _Note}
        self.add_argument(*spellings, dest=name, help=text.replace("%", "%%"), metavar="VALUE", **more)
        self.spellings += spellings

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(message)


def read_line(command: Command, arguments: Sequence[str]) -> Line:
    """Parse the command line into options and positional arguments.

    Raises:
        UserError: an unknown option (the message has the nearest name), or one that lacks its value.

    """
    words, after = _joined(list(map(str, arguments))), []
    if "--" in words:
        separator = words.index("--")
        words, after = words[:separator], words[separator + 1 :]
    parser, line = Words(command, words), Line()
    try:
        _, unparsed = parser.parse_known_args(words, line)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise UserError(
            f"{name}: give a value" if "expected" in error.message else f"{name}: {error.message}"
        ) from error
    for word in unparsed:
        if word.startswith("-") and len(word) > 1:
            raise UserError(f"there is no option {word}{near_hint(word.partition('=')[0], parser.spellings, 0.7)}")
    line.alone = [*unparsed, *line.alone, *after]
    return line


def _joined(words: list[str]) -> list[str]:
    """The words, with a range that begins below zero joined to its option, as it would look like another option."""
    joined: list[str] = []
    for word in words:
        if joined and re.match(r"-\d[\d.]*:", word) and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def settings_of(command: Command, line: Line) -> dict[str, Any]:
    """The settings, applied in order: those of a continued run, a recipe, files and options, and positional arguments.

    Raises:
        UserError: one line that names the setting, its value and what it needs.

    """
    settings = Settings(command, trust.foreign_methods(line.values("method", "method.class_path")))
    for run in line.values("resume")[-1:]:
        settings.add_file(config_of(run), f"--resume {run}")
    for name in line.values("recipe")[-1:]:
        settings.add_file(recipe_file(name), f"--recipe {name}")
    for name, text in line.options:
        if name == "config":
            settings.add_file(text, as_given("config", text))
        elif name == "method":
            settings.choose(text)
        elif name not in ("recipe", *(option.name for option in (*command.reading, *command.encoder_options))):
            settings.add_option(name, text)
    _add_positionals(command, line, settings)
    return _read_as(settings.complete(), {option.name: line.values(option.name)[-1:] for option in command.reading})


def _read_as(settings: dict[str, Any], reading: dict[str, list[str]]) -> dict[str, Any]:
    """The settings with the reading options of ``reading`` written after each source, for all verbs."""
    values_by_name = {name: value for name, values in reading.items() for value in values}
    for name in SOURCES:
        if values_by_name and isinstance(settings.get(name), str):
            settings[name] = read_as(settings[name], values_by_name)
    return settings


def _add_positionals(command: Command, line: Line, settings: Settings) -> None:
    """Assign positional words to the arguments without a default, in order; a list takes all remaining words."""
    remaining, encoder = list(line.alone), by_name({o.name: line.values(o.name)[-1:] for o in command.encoder_options})
    for option in command.positional:
        if encoder is not None and option.name in RUNS and len(remaining) < len(command.positional):
            settings.tree[option.name], encoder = encoder, None
        elif is_list(option.kind) and remaining:
            settings.tree[option.name], remaining = remaining, []
        elif remaining:
            settings.tree[option.name] = remaining.pop(0)
        elif option.name not in settings.tree:
            raise UserError(f"{option.name.upper()} is missing: {option.help.partition(';')[0] or 'give it'}")
    if remaining:
        last = next((o.name.upper() for o in reversed(command.positional)), f"crosslevel {command.name}")
        raise UserError(f"there is no argument after {last}: {remaining[0]!r} is one too many")
    if encoder is not None:
        second = next((settings.tree[name] for name in RUNS if settings.tree.get(name) is not None), None)
        if "run" not in command.names or settings.tree.get("run") is not None:
            raise UserError(f"--encoder.name is one encoder, {second} another: leave one of them out")
        settings.tree["run"] = encoder


def prepared(command: Command, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The settings of a command line; None if it only requested help or its settings, which were printed."""
    line = read_line(command, arguments)
    if line.help is not None:
        print(texts.of_command(command, line.help))
        return None
    if line.method_help is not None:
        print(texts.of_method(line.method_help or (line.values("method") or ["MoCo"])[-1]))
        return None
    settings = settings_of(command, line)
    if line.print_config:
        import yaml  # noqa: PLC0415

        print(yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True), end="")
        return None
    return settings


def run(function: Callable[..., Any], arguments: Sequence[str], **more: Any) -> Any:
    """Parse ``arguments`` for ``function`` and call it; ``more`` are keyword-only arguments without an option.

    ``--config FILE`` reads any part of the tree, and later options override it; ``--recipe NAME`` reads a file of the
    package; ``--resume RUN`` continues a run with the settings in its ``config.yaml``. With a different ``--method``,
    the files' settings of their own method are dropped.

    Raises:
        SystemExit: 2 for an error that the user can fix, 1 for a loss that is no number, 70 for a bug in this program.

    """
    command = Command.of_function(function)
    with exit_on_error(f"crosslevel {command.name}"):
        settings = prepared(command, arguments)
        if settings is None:
            sys.exit(0)
        return call(command, function, settings, **more)


def call(command: Command, function: Callable[..., Any], settings: dict[str, Any], **more: Any) -> Any:
    """Call a verb with its settings; those of another verb are passed as one argument, a tree."""
    inherited = {argument.name: plain(settings[argument.name]) for argument in command.inherited}
    keywords = {a.name: as_argument(a, settings[a.name]) for a in command.signature.arguments if a.name in settings}
    with at_hand(command.name, keywords):
        return function(**keywords, **({"settings": inherited} if inherited else {}), **more)


@contextmanager
def exit_on_error(prog: str) -> Iterator[None]:
    """Exit with one line for an error that the user can fix, and with a traceback for a bug."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *location, **line: f"{prog}: warning: {_one_line(message)}\n"
    with raising_stopped():
        try:
            with _exit_with_message(prog):
                yield
        finally:
            warnings.formatwarning = before


@contextmanager
def _exit_with_message(prog: str) -> Iterator[None]:
    """End the process with the message of an error."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stopped = stop if isinstance(stop, Stopped) else Stopped()
        _end(f"{prog}: {_one_line(stopped)}", 128 + stopped.number)
    except Interrupted as error:  # the command has printed this already, with advice
        sys.exit(error.status)
    except CrosslevelError as error:
        _raise_if_debugging()
        _end(f"{prog}: {_one_line(error)}", 1 if isinstance(error, NotFinite) else REFUSED)
    except OSError as error:  # an error of the machine, not a bug: a full disk, a lost network, a folder without access
        _raise_if_debugging()
        if isinstance(error, BrokenPipeError) and output_is_broken():
            raise
        hint = _HINTS.get(error.errno or 0, "")
        _end(f"{prog}: {_one_line(error)}{hint and f': {hint}'}", REFUSED)
    except Exception as error:
        _raise_if_debugging()
        trouble = _of_workers(error)
        if trouble:
            _end(f"{prog}: {trouble}", REFUSED)
        _fault(prog, error)


def _raise_if_debugging() -> None:
    if os.environ.get("CROSSLEVEL_TRACEBACK"):
        raise  # noqa: PLE0704


def _fault(prog: str, error: BaseException) -> NoReturn:
    """Print that the error is a bug, with its traceback, for a report."""
    print(printable("".join(traceback.format_exception(error)), lines=True), end="", file=sys.stderr)
    _end(
        f"{prog}: {type(error).__name__}: {_one_line(error)}: this is a fault of Crosslevel's: please report it",
        SOFTWARE,
    )


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


_HINTS = {
    errno.ENOSPC: "free some space there, or write elsewhere",
    errno.EDQUOT: "free some of your space there, or write elsewhere",
    errno.EROFS: "nothing can be written there: give a folder of your own",
    errno.EACCES: "ask for leave to read and write there, or give a folder of your own",
}
_OF_WORKER = re.compile(r"Caught \w+ in .*\nOriginal Traceback .*\n[\w.]+: (.+)", re.DOTALL)


def _of_workers(error: Exception) -> str:
    """Why a decoding process died, if that was the error; if such processes were started, the module is loaded."""
    if not isinstance(error, RuntimeError):
        return ""
    from crosslevel.data.loaders.workers import trouble  # noqa: PLC0415

    return trouble(error)


def _one_line(error: BaseException | str) -> str:
    text = str(error)
    match = _OF_WORKER.match(text)  # a decoding process sends its whole traceback
    return printable(" ".join((match[1] if match else text).split()) or type(error).__name__)
