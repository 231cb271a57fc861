"""Verbs called from Python: arguments are checked as on the command line, and parts accepted in several forms."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from typing import Any, TypeVar, cast

from crosslevel.settings import trust
from crosslevel.settings.command import Command, Settings
from crosslevel.settings.kinds import plain, read
from crosslevel.settings.signature import Argument, Choice, Option, of_method
from crosslevel.settings.stores import at_hand
from crosslevel.utils.errors import UserError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """A verb for Python, with the same names, defaults and errors as on the command line.

    A part may be given as an object, as a dictionary of its settings or as a factory; a method by its name; a path as
    an object. A value that does not fit is refused as on the command line.
    """

    @wraps(function)
    def called(*positional: Any, **keywords: Any) -> Any:
        arguments = completed(function, positional, keywords)
        devices, launcher = arguments.get("devices", 1), arguments.get("launcher", "local")
        if launcher != "local":
            raise UserError(
                f"launcher={launcher}: from Python a training has one process: run crosslevel {function.__name__} "
                f"IMAGES --launcher {launcher}"
            )
        if devices > 1:
            raise UserError(
                f"devices={devices}: from Python a training has one device, because each further one starts the whole "
                f"program anew: run crosslevel {function.__name__} IMAGES --devices {devices}"
            )
        with at_hand(function.__name__, arguments):
            return function(**arguments)

    return cast(F, called)


def completed(function: Callable[..., Any], positional: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, converted for ``function``.

    Raises:
        TypeError: an unknown or a missing argument, as for any function.
        UserError: a value that does not fit, or an unknown setting of a part.

    """
    command = Command.of(function.__module__, function.__name__)
    if command.inherited and "settings" not in keywords:
        keywords = _gathered(command, keywords)
    bound = inspect.signature(function).bind(*positional, **keywords)
    arguments = {argument.name: argument for argument in command.signature.arguments}
    return {
        name: as_argument(arguments[name], value) if name in arguments else value
        for name, value in bound.arguments.items()
    }


def _gathered(command: Command, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with those of another verb joined to one, ``settings``: a tree, defaults included."""
    inherited_names = {argument.name for argument in command.inherited}
    inherited = {name: value for name, value in keywords.items() if name in inherited_names}
    method = inherited.get("method")
    settings = Settings(command, trust.foreign_methods([method] if isinstance(method, str) else []))
    settings.add(inherited, f"{command.name}()")
    complete = settings.complete()
    direct = {name: value for name, value in keywords.items() if name not in inherited_names}
    return {**direct, "settings": {name: plain(complete[name]) for name in complete if name in inherited_names}}


def as_argument(argument: Argument, value: Any) -> Any:
    """Convert one argument for the verb."""
    if isinstance(argument, Option):
        return _value(argument, value)
    if isinstance(argument, Choice):
        return _method(value)
    if isinstance(value, bool) and argument.optional:
        value = {} if value else None
    if not isinstance(value, Mapping):
        return value
    module, name = argument.made_of
    kind, settings = getattr(import_module(module), name), _checked(argument.name, argument.options, value)
    return partial(kind, **settings) if argument.later else kind(**settings)


def _value(option: Option, value: Any) -> Any:
    plain_value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return read(option.kind, plain_value, f"{option.name}={plain_value!r}")


def _method(value: Any) -> Any:
    """Return a factory of a method, from its name, its name and settings, or a factory."""
    if not isinstance(value, str | Mapping):
        return value
    tree: Mapping[str, Any] = {"class_path": value} if isinstance(value, str) else value
    name, settings = tree.get("class_path"), tree.get("init_args", {})
    if set(tree) - {"class_path", "init_args"} or name is None:
        raise UserError(f"method={value!r}: give a name, or {{'class_path': name, 'init_args': its settings}}")
    path = trust.method_class(name, trust.foreign_methods([str(name)]))
    return partial(trust.imported(path), **_checked("method", of_method(path), settings))


def _checked(part: str, options: tuple[Option, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    known_options = {option.name: option for option in options}
    for name in settings:
        if name not in known_options:
            raise UserError(f"{part} has no setting {name!r}: {did_you_mean(str(name), known_options)}")
    return {name: read(known_options[name].kind, value, f"{part}.{name}={value!r}") for name, value in settings.items()}
