"""Which classes a setting may name: an import runs code, so only the command line may name foreign classes.

A file (a config, a run's config.yaml, a trial's) names Crosslevel's own methods, and others only where the command line
names the same. A method is the only class that any setting names: nothing else is looked up or imported by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from crosslevel.settings.signature import methods
from crosslevel.utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from crosslevel.methods import Method

_PREFIX = "crosslevel.methods."


def method_class(name: Any, named: Mapping[str, str] | None = None) -> str:
    """The import path of a method, from its name in upper or lower case, alone or after ``crosslevel.methods``.

    Args:
        name: the name, or the import path of a method that is not ours.
        named: the methods that the command line names, from `foreign_methods`.

    Raises:
        UserError: there is no such method, or only the command line may name it; the message says what to do.

    """
    paths = named or {}
    if not isinstance(name, str):
        raise UserError(f"method={name!r} is no name of a class")
    if _is_foreign(name):
        if name not in paths and name not in paths.values():
            raise UserError(refusal("method", name))
        return paths.get(name, name)
    ours = {title.lower(): path for title, path in methods().items()}
    short = name.rsplit(".", 1)[-1]
    if short.lower() not in ours:
        raise UserError(f"method={name!r} is unknown: {did_you_mean(short, methods())}")
    return ours[short.lower()]


def foreign_methods(names: Iterable[str]) -> dict[str, str]:
    """The methods that a command line names by import path, with the path of the class itself.

    Only methods are imported here; the path may name a module that re-exports one.

    Raises:
        UserError: a name is no subclass of `Method`.

    """
    paths = {}
    for name in names:
        if _is_foreign(name):
            method = imported(name)
            paths[name] = f"{method.__module__}.{method.__qualname__}"
    return paths


def method_of(settings: Mapping[str, Any]) -> type[Method]:
    """The class of the method in a checked tree of settings."""
    return imported(settings["method"]["class_path"])


def option_for(method: str) -> list[str]:
    """The options that a command line needs in addition to a config that names this method."""
    return [f"--method={method}"] if _is_foreign(method) else []


def refusal(part: str, name: Any) -> str:
    """The error about a foreign class that a file names."""
    option = f"--{part} {name}"
    return (
        f"{part}={name!r} is not Crosslevel's: it runs only if the command line names it; add {option} if you trust it"
    )


def imported(path: str) -> type[Method]:
    """The class of a method, by its import path.

    Raises:
        UserError: there is no such class, or it is no method.

    """
    base = import_module("crosslevel.methods").Method
    module, _, name = path.rpartition(".")
    try:
        method = getattr(import_module(module), name, None) if all(map(str.isidentifier, path.split("."))) else None
    except ImportError as error:
        raise UserError(f"method={path!r} cannot be imported: {error}") from error
    if not (isinstance(method, type) and issubclass(method, base)):
        raise UserError(f"method={path!r} is no subclass of crosslevel.methods.Method")
    return method


def _is_foreign(name: str) -> bool:
    return "." in name and not name.startswith(_PREFIX)
