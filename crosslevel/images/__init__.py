"""Images: where they come from, and how views of them are drawn."""

from __future__ import annotations

import difflib
import inspect
import os
import types
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from crosslevel.images.batches import Batch, EvalBatches, TrainBatches, fit, pack
from crosslevel.images.cifar import Cifar10, Cifar100
from crosslevel.images.health import BadFiles, BadImage
from crosslevel.images.packs import is_pack, open_pack
from crosslevel.images.sources import Files, Images, Packed, SourceError
from crosslevel.images.turntable import Turntable

__all__ = [
    "NAMED",
    "BadFiles",
    "BadImage",
    "Batch",
    "Cifar10",
    "Cifar100",
    "EvalBatches",
    "Files",
    "Images",
    "Packed",
    "SourceError",
    "TrainBatches",
    "Turntable",
    "fit",
    "open",
    "pack",
]

NAMED: dict[str, type[Packed]] = {"cifar10": Cifar10, "cifar100": Cifar100, "turntable": Turntable}

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def open(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, data_root: str | None = None) -> Images:
    """The images of ``source``.

    - a folder, searched recursively; class-per-folder layouts give labels;
    - a pack, made by ``crosslevel pack``;
    - a sequence of image files, or a ``.txt`` file that names one a line, relative to its own folder;
    - a data set by name, ``name[:split][,key=value...]``, such as ``cifar10:test`` (its files under
      ``data_root``) or ``turntable:test,classes=8,frames=30``, where the keys are the parameters of
      the data set's class.

    What exists as a path is taken as one, whatever its name.

    Raises:
        SourceError: there are no images; one line that says what is wrong and what to do.

    """
    if not isinstance(source, str | os.PathLike):
        return Files.from_list(source)
    source = os.fspath(source)
    if os.path.isdir(source):
        return open_pack(source) if is_pack(source) else Files.from_folder(source)
    if os.path.exists(source):
        if source.lower().endswith(".txt"):
            return Files.from_text(source)
        raise SourceError(f"{source}: a single file: give a folder, or a .txt file with one image path a line")
    return _named(source, data_root)


# Opened again by the same process, a named source is not rendered or read again.
@lru_cache(maxsize=2)
def _named(source: str, data_root: str | None) -> Images:
    head, *assignments = source.split(",")
    name, colon, split = head.partition(":")
    if name not in NAMED:
        near = difflib.get_close_matches(name.lower(), NAMED, 1)
        hint = f"did you mean {near[0]}?" if near else f"give a path, or one of {', '.join(NAMED)}"
        raise SourceError(f"{source!r}: no such folder, file or data set: {hint}")
    parameters = _parameters(NAMED[name])
    arguments: dict[str, Any] = {"data_root": data_root} if "data_root" in parameters else {}
    if colon:
        assignments.insert(0, f"split={split}")
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if key not in parameters or not equals:
            near = difflib.get_close_matches(key, parameters, 1)
            hint = f"did you mean {near[0]}={value or '...'}?" if near else f"keys: {', '.join(parameters)}"
            raise SourceError(f"{source}: {name} has no key={value or '...'} named {key!r}: {hint}")
        arguments[key] = _converted(source, key, value, parameters[key])
    try:
        images = NAMED[name](**arguments)
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(f"{source}: {error}") from error
    images.name = source
    return images


def _parameters(cls: type[Packed]) -> dict[str, Any]:
    """The constructor's parameters and their types."""
    hints = get_type_hints(cls.__init__)
    return {key: hints.get(key, str) for key in inspect.signature(cls).parameters}


def _converted(source: str, key: str, value: str, wanted: Any) -> object:
    """``value`` as the type that the parameter is annotated with."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value.lower() == "none" and type(None) in get_args(wanted):
            return None
        wanted = next(choice for choice in get_args(wanted) if choice is not type(None))
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise SourceError(f"{source}: {key}={value}: use {' or '.join(map(str, get_args(wanted)))}")
    if wanted is bool and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    try:
        if wanted in (int, float, str):
            return wanted(value)
    except ValueError:
        pass
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(wanted)
    raise SourceError(f"{source}: {key}={value}: " + (f"needs {kind}" if kind else "cannot be set in a source's name"))
