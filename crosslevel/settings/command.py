"""The settings of a command, and their values from defaults, files and command line; each overrides the former."""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from crosslevel.data.uri import is_remote
from crosslevel.settings import signature, trust, weights
from crosslevel.settings.kinds import is_list, read
from crosslevel.settings.recipes import find
from crosslevel.settings.signature import REQUIRED, Argument, Choice, Group, Option, Signature
from crosslevel.utils.errors import NotThere, UserError, did_you_mean, near_hint, near_names
from crosslevel.utils.trees import regular, yaml_tree

FILES = (
    Option("config", ("str",), None, "YAML file with any of these settings; those after it count more"),
    Option("recipe", ("None", "str"), None, "settings by name, such as cifar10-moco-cld; crosslevel recipes lists "
           "them, with the published figure where one is recorded"),
)  # fmt: skip
READING = (
    Option("damaged", ("str",), None, "refuse leaves out images that their decoder reports as damaged; keep uses "
           "what the decoder recovers of them (default: refuse)"),
    Option("pages", ("str",), None, "of an image file with several frames or pages: first takes the first of them, "
           "all takes each as an image, and those of one file as a track (default: first)"),
    Option("channels", ("int",), None, "of an image: 1 is its brightness, 3 its colours, 4 colours and transparency; "
           "another number is that of the bands of a TIFF or of an array (.npy) (default: 3, or those of a run)"),
    Option("range", ("str",), None, "LOW:HIGH, such as 0:10000 or -160:240: for values of more than 8 bits, the one "
           "that becomes black and the one that becomes white. Unless given: for a run as in its training; for DICOM "
           "the file's own window; otherwise all 16 bits"),
)  # fmt: skip
"""The reading settings of images, for any source; they can also be written after a source, as photos/,damaged=keep."""
SOURCES = ("images", "test", "beside", "labelled")
"""The settings that name a source."""


class Command:
    """The settings of a verb, from its signature."""

    def __init__(self, name: str, declared: Signature, inherited: tuple[Argument, ...] = ()) -> None:
        self.name, self.signature, self.inherited = name, declared, inherited
        self.arguments = (*declared.arguments, *inherited)
        self.names = {argument.name for argument in self.arguments}
        self.positional = tuple(a for a in declared.arguments if isinstance(a, Option) and a.default is REQUIRED)
        self.defaults = _literals(declared.marks.get("verb"))

    @classmethod
    def of(cls, module: str, name: str) -> Command:
        """The command for a function of a module, without importing the module."""
        return cls._with_others(name, signature.of_command(module, name), module)

    @classmethod
    def of_function(cls, function: Callable[..., Any]) -> Command:
        """The command for this function."""
        return cls._with_others(function.__name__, signature.of_function(function), function.__module__)

    @classmethod
    def _with_others(cls, name: str, declared: Signature, module: str) -> Command:
        mark = declared.marks.get("with_options_of")
        if mark is None:
            return cls(name, declared)
        scope = signature.scope(module)
        assert scope is not None
        assert isinstance(mark.args[0], ast.Name)
        definition = scope.find(mark.args[0].id)
        assert definition is not None
        but = _literals(mark)["but"]
        inherited = signature.of_command(definition[0].module, mark.args[0].id)
        return cls(name, declared, tuple(a for a in inherited.arguments if a.name not in but))

    @property
    def summary(self) -> str:
        """The first line of the command's docstring."""
        return self.signature.summary.split("\n\n")[0]

    @cached_property
    def options(self) -> dict[str, Option]:
        """Every setting by its full name, including those of parts, but not those of a method."""
        options: dict[str, Option] = {}
        for argument in self.arguments:
            if isinstance(argument, Option):
                options[argument.name] = argument
            elif isinstance(argument, Group):
                options |= {f"{argument.name}.{option.name}": option for option in argument.options}
        return options

    @property
    def has_method(self) -> bool:
        """Whether it has a part that is chosen by name."""
        return any(isinstance(argument, Choice) for argument in self.arguments)

    @property
    def has_recipes(self) -> bool:
        """Whether it takes recipes."""
        return {"encoder", "cld"} <= self.names

    @property
    def files(self) -> tuple[Option, ...]:
        """The options that name a file of settings."""
        return FILES if self.has_recipes else FILES[:1]

    @property
    def reading(self) -> tuple[Option, ...]:
        """The reading options, if the command reads images."""
        return READING if "images" in self.names else ()

    @property
    def encoder_options(self) -> tuple[Option, ...]:
        """The options that name an encoder, if the command uses one."""
        return weights.OPTIONS if self.name in weights.VERBS else ()


class Settings:
    """The settings of one call, while files and options are applied to it in order."""

    def __init__(self, command: Command, foreign: Mapping[str, str]) -> None:
        self.command, self.foreign = command, foreign
        self.tree: dict[str, Any] = {}
        self.method: str | None = None
        self.of_method: dict[str, Any] = {}
        self.gathered: set[str] = set()

    def add_file(self, file: str, context: str) -> None:
        """Apply a file of settings, over the former ones.

        Raises:
            UserError: the file cannot be read, or has an unknown setting; the message names the file and the setting.

        """
        self.add(loaded(file, context), context)

    def add(self, values: Mapping[str, Any], context: str) -> None:
        """Apply a tree of settings, over the former ones."""
        for name, value in values.items():
            self._add(str(name), value, context)

    def _add(self, name: str, value: Any, context: str) -> None:
        part = next((a for a in self.command.arguments if a.name == name), None)
        if part is None:
            raise UserError(f"{context}: there is no setting {name!r}{near_hint(name, self.command.names, 0.7)}")
        if isinstance(part, Choice):
            self._add_method(value, context)
        elif isinstance(part, Group):
            self._add_part(part, value, context)
        else:
            self.tree[name] = read(part.kind, value, f"{context}: {name}: {_shortened(value)}")

    def _add_part(self, part: Group, value: Any, context: str) -> None:
        if part.optional and (value is None or value is False):
            self.tree[part.name] = None
            return
        if value is True and part.optional:
            value = {}
        if not isinstance(value, Mapping):
            raise UserError(f"{context}: {part.name}: {_shortened(value)}: needs its settings, a name and a value each")
        options = {option.name: option for option in part.options}
        into = self._part(part.name)
        for name, inner in value.items():
            if name not in options:
                if name == "class_path":
                    raise UserError(f"{context}: {trust.refusal(part.name, inner)}")
                raise UserError(f"{context}: {part.name} has no setting {name!r}: {did_you_mean(str(name), options)}")
            into[name] = read(options[name].kind, inner, f"{context}: {part.name}.{name}: {_shortened(inner)}")

    def _add_method(self, value: Any, context: str) -> None:
        tree = value if isinstance(value, Mapping) else {"class_path": value}
        for key in tree:
            if key not in ("class_path", "init_args"):
                raise UserError(f"{context}: method has no setting {key!r}: give class_path and init_args")
        self.choose(tree.get("class_path"), context)
        inner = tree.get("init_args") or {}
        if not isinstance(inner, Mapping):
            raise UserError(f"{context}: method.init_args: {_shortened(inner)}: needs a name and a value each")
        for name, setting in inner.items():
            self.of_method[str(name)] = (setting, f"{context}: method.{name}")

    def choose(self, name: Any, context: str = "") -> None:
        """Choose a method by its name; this drops the settings of a method chosen before."""
        if name is None:
            return
        try:
            path = trust.method_class(name, self.foreign)
        except UserError as error:
            raise UserError(f"{context}: {error}" if context else str(error)) from error
        if self.method not in (None, path):
            self.of_method = {}
        self.method = path

    def add_option(self, name: str, text: str) -> None:
        """Apply one option of the command line, over the former settings."""
        context = as_given(name, text)
        if name.startswith("method."):
            self.of_method[name.removeprefix("method.")] = (text, f"--{name}")
            return
        part = next((a for a in self.command.arguments if a.name == name), None)
        if isinstance(part, Group):
            self._add_part(part, _flag(text), f"--{name}")
            return
        option = self.command.options[name]
        value = read(option.kind, text, context)
        group, _, last = name.rpartition(".")
        into = self._part(group) if group else self.tree
        if is_list(option.kind) and isinstance(value, list) and name in self.gathered:
            value = [*into[last], *value]
        self.gathered.add(name)
        into[last] = value

    def _part(self, name: str) -> dict[str, Any]:
        if self.tree.get(name) is None:
            self.tree[name] = {}
        part: dict[str, Any] = self.tree[name]
        return part

    def complete(self) -> dict[str, Any]:
        """All settings, with defaults for those not given."""
        out: dict[str, Any] = {}
        for argument in self.command.arguments:
            name = argument.name
            if isinstance(argument, Choice):
                path = self.method or trust.method_class(signature.usual_method())
                out[name] = {"class_path": path, "init_args": self._method_settings(path)}
            elif isinstance(argument, Group):
                settings = self.tree.get(name)
                none = argument.optional and settings is None
                out[name] = None if none else {o.name: o.default for o in argument.options} | (settings or {})
            elif name in self.tree:
                out[name] = self.tree[name]
            elif argument.default is not REQUIRED:
                out[name] = self.command.defaults.get(name, argument.default)
        return out

    def _method_settings(self, path: str) -> dict[str, Any]:
        options = {option.name: option for option in signature.of_method(path)}
        values = {name: option.default for name, option in options.items()}
        for name, (value, context) in self.of_method.items():
            if name not in options:
                raise UserError(
                    f"{context}: {path.rpartition('.')[2]} has no setting {name!r}: {did_you_mean(name, options)}"
                )
            words = f"{context} is empty" if value == "" else f"{context} {_shortened(value)}"
            values[name] = read(options[name].kind, value, words)
        return values


def config_of(run: str) -> str:
    """The settings of a run to continue.

    Raises:
        UserError: there is no such run.

    """
    from crosslevel.utils.files import CONFIG  # noqa: PLC0415 - it needs torch

    folder = Path(run)
    if is_remote(run):
        from crosslevel.data.sources.containers.folders import StoredFolder  # noqa: PLC0415

        stored = StoredFolder(run, "settings")
        stored.fetch(lambda name: name == CONFIG)
        folder = stored.folder
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(f"--resume {run}: there is no run here (it has no {CONFIG})")
    return str(config)


def recipe_file(name: str) -> str:
    """The file of a recipe, by its name."""
    return str(find(name).file)


def _literals(call: ast.Call | None) -> dict[str, Any]:
    return {} if call is None else {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}


def _flag(text: str) -> Any:
    """Parse the value of an option whose value may be left out: true, false, or settings as YAML."""
    import yaml  # noqa: PLC0415

    try:
        value = yaml_tree(text)
    except yaml.YAMLError:
        return text
    return None if text.lower() in ("none", "null", "no", "false") else value


def loaded(file: str, context: str) -> dict[str, Any]:
    """The tree of a file of settings; ``context`` begins the message of an error.

    Raises:
        UserError: the file cannot be read, or holds no settings.

    """
    import yaml  # noqa: PLC0415

    try:
        tree = yaml_tree(regular(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotThere(f"{context}: there is no such file{_near_file(Path(file))}") from error
    except IsADirectoryError as error:
        raise UserError(f"{context}: this is a folder: give a YAML file") from error
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"{context}: {' '.join(reason.split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{context}: it holds no settings")
    return tree


def _near_file(file: Path) -> str:
    """The end of an error about a file that is not there: the nearest of its folder's YAML files, if any is near."""
    files = [other.name for other in file.parent.glob("*.y*ml")]
    near = near_names(file.name, files)
    return f": did you mean {file.with_name(near[0])}?" if near else ""


def as_given(name: str, text: str) -> str:
    """An option with its value, as the beginning of an error."""
    return f"--{name} {text}" if text.strip() else f"--{name} is empty"


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
