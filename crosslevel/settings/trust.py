"""Which classes a setting may name: an import runs code, so only the command line may name one that is not ours.

A file (a config, a run's config.yaml, a trial's) names Crosslevel's own methods, and others only where the command line
names the same. jsonargparse enforces it as well, by its list of import paths, whatever way a name takes to it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import set_parsing_settings

from crosslevel.methods import METHODS, Method

_PREFIX = "crosslevel.methods."
_OURS = {f"{method.__module__}.{method.__name__}": method for method in METHODS.values()}
_OURS |= {f"{_PREFIX}{method.__name__}": method for method in METHODS.values()}
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(_OURS))


def method_class(name: str, named: Mapping[str, str] | None = None) -> str:
    """The import path of a method, by its name in any case, alone or after ``crosslevel.methods``.

    Args:
        name: the name, or the import path of a method that is not ours.
        named: what the command line names, from `named_on`.

    Raises:
        ValueError: there is no such method, or only the command line may name it; the message says what to do.

    """
    paths = named or {}
    if "." in name and not name.startswith(_PREFIX):
        if name not in paths and name not in paths.values():
            raise ValueError(_refusal("method", name))
        return paths.get(name, name)
    short = name.rsplit(".", 1)[-1].lower()
    found = METHODS.get(short)
    if found is None:
        known = [method.__name__ for method in METHODS.values()]
        near = difflib.get_close_matches(short, METHODS, n=1)
        hint = f"did you mean {METHODS[near[0]].__name__}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"method={name!r} is unknown: {hint}")
    return f"{found.__module__}.{found.__name__}"


def named_on(arguments: Sequence[str]) -> dict[str, str]:
    """What a command line names: the import paths after ``--method`` and its settings, and what each one is.

    A method is imported here, and it alone; its path may be that of a module that only passes it on.

    Raises:
        ValueError: ``--method`` names no subclass of `Method`.

    """
    named: dict[str, str] = {}
    for i, argument in enumerate(arguments):
        option, folded, value = argument.partition("=")
        if not re.fullmatch(r"--method(\.[\w.]+)?", option):
            continue
        value = value if folded else next(iter(arguments[i + 1 : i + 2]), "")
        if "." not in value or value.startswith(_PREFIX) or not all(map(str.isidentifier, value.split("."))):
            continue
        method = option in ("--method", "--method.class_path", "--method.help")
        named[value] = _path(_imported(value)) if method else value
    if named:
        set_parsing_settings(import_path_allowlist=[*named, *named.values()])
    return named


def check(tree: Any, where: str, named: Collection[str], at: str = "") -> None:
    """Refuse settings of a file that name a class which only the command line may name; nothing is imported.

    Raises:
        ValueError: with the place in the tree, and what to do.

    """
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        here = f"{at}.{key}".lstrip(".")
        *_, last = here.split(".")
        if last.startswith("__"):
            raise ValueError(f"{where}: {here} is no setting: take it out")
        if last == "class_path" or (here == "method" and isinstance(value, str)):
            _check_name(value, where, here, named)
        check(value, where, named, here)


def chosen(settings: Mapping[str, Any]) -> type[Method]:
    """The class of the method in a tree of settings that was checked."""
    path = settings["method"]["class_path"]
    return _OURS.get(path) or _imported(path)


def option_for(method: str) -> list[str]:
    """What a command line needs besides a config that names this method."""
    return [] if method in _OURS else [f"--method={method}"]


def _check_name(name: Any, where: str, at: str, named: Collection[str]) -> None:
    part = at.removesuffix(".class_path")
    if not isinstance(name, str):
        raise ValueError(f"{where}: {at}={name!r} is no name of a class")
    if part == "method" and ("." not in name or name.startswith(_PREFIX)):
        method_class(name)
    elif name not in named:
        raise ValueError(f"{where}: {_refusal(part, name)}")


def _refusal(part: str, name: str) -> str:
    option = f"--{part.replace('.init_args', '')} {name}"
    return (
        f"{part}={name!r} is not Crosslevel's: it runs only if the command line names it; add {option} if you trust it"
    )


def _imported(path: str) -> type[Method]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"method={path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"method={path!r} is no subclass of crosslevel.methods.Method")
    return found


def _path(method: type[Method]) -> str:
    return f"{method.__module__}.{method.__qualname__}"
