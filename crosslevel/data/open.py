"""Images: where they come from, and how views of them are drawn."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import types
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, overload

from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.streams import ImageStream, is_stream
from crosslevel.data.sources.annotated.object_crops import Crops, is_annotated, object_crops
from crosslevel.data.sources.cifar import Cifar10, Cifar100
from crosslevel.data.sources.containers import open as containers
from crosslevel.data.sources.containers.open import open_container
from crosslevel.data.sources.containers.remote import lasting
from crosslevel.data.sources.folder import Files
from crosslevel.data.sources.packed import is_pack, open_pack
from crosslevel.data.sources.stl10 import Stl10
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.sources.video.frames import open_videos
from crosslevel.data.subsets.select import unlabelled
from crosslevel.data.subsets.suffixes import BY_LABEL, PICKS, Suffix, applied, located, split, with_list
from crosslevel.utils.errors import SourceError

NAMED: dict[str, type[InMemoryImages]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "turntable": Turntable,
    "stl10": Stl10,
}

_ANNOTATED = "--crops takes the objects of annotated images"
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@overload
def open_images(source: Source, *, data_root: str | None = None, crops: Crops | None = None) -> Images: ...


@overload
def open_images(
    source: Source, *, data_root: str | None = None, crops: Crops | None = None, streams: bool
) -> Images | ImageStream: ...


def open_images(
    source: Source, *, data_root: str | None = None, crops: Crops | None = None, streams: bool = False
) -> Images | ImageStream:
    """The images of ``source``.

    - a folder, searched recursively; class-per-folder layouts give labels;
    - a pack, made by ``crosslevel pack``;
    - a sequence of image files, or a ``.txt`` file that names one a line, relative to its own folder;
    - a video, a folder of videos, a pattern such as ``films/*.mp4``, or a list of videos: their frames, one a second
      unless ``,fps=2`` or ``,stride=10`` (every tenth) follows; each video is a track;
    - with ``crops``, annotated images in the layout of Pascal VOC or COCO: one image for each object;
    - WebDataset shards: a ``.tar`` file, ``train-{000..009}.tar``, ``data/*.tar``, or a folder of them;
    - Parquet files with a column of images, likewise: ``x.parquet[,column=NAME][,label=NAME]``;
    - a data set of the Hugging Face hub, ``hf://owner/name[/config][@revision][:split]``, or a folder that the
      ``datasets`` library saved, ``hf:///folder[:split]``;
    - a data set by name, ``name[:split][,key=value...]``, such as ``cifar10:test`` (its files under
      ``data_root``) or ``turntable:test,classes=8,frames=30``, where the keys are the parameters of
      the data set's class;
    - a part of any of these, by suffixes such as ``@imbalance=100``, one after the other (`suffixes.SUFFIXES`);
    - with ``streams``, tar shards (WebDataset) that are read from beginning to end, without a known number of images:
      an address with ``{000..009}`` or ``*``, such as ``https://host/train-{000..009}.tar``, or ``stream:`` and a path.

    What exists as a path is taken as one, whatever its name. A folder that has images is one of images: its videos are
    left out, with a warning, unless ``,fps=`` or ``,stride=`` asks for them.

    Raises:
        SourceError: there are no images; one line that says what is wrong and what to do.

    """
    if not isinstance(source, str | os.PathLike):
        return _listed(source, crops)
    source = os.fspath(source)
    whole, parts = split(source)
    if parts and is_stream(whole):
        raise SourceError(
            f"{source}: a stream has no known images to take a part of: leave {parts[0]} out, or give files"
        )
    if parts:
        return _part(open_images(whole, data_root=data_root, crops=crops), parts, source)
    if crops is not None:
        return object_crops(source, crops)
    if is_stream(source):
        if not streams:
            raise SourceError(f"{source}: a stream has no known number of images, only train can use one: give files")
        return ImageStream.open(source)
    for known in (_pack, open_videos, open_container, _folder_or_list):
        found = known(source)
        if found is not None:
            return found
    return _named(source, data_root)


def open_unlabelled(source: str, *, data_root: str | None = None, crops: Crops | None = None) -> Images:
    """`open_images` without labels: they are dropped before any part is taken, those in a file of ``@list`` too.

    Raises:
        SourceError: as from `open_images`, or a part that is chosen by labels.

    """
    whole, parts = split(source)
    for part in parts:
        if part.key in BY_LABEL:
            raise SourceError(
                f"{source}: no label is read here, and {part} chooses images by labels: write a list with crosslevel "
                f"subset '{source}' -o part.txt, and give {with_list(source, 'part.txt', (*PICKS, *BY_LABEL))}"
            )
    images = unlabelled(open_images(whole, data_root=data_root, crops=crops))
    return unlabelled(_part(images, parts, source)) if parts else images


def _part(images: Images, parts: list[Suffix], name: str) -> Images:
    part = applied(images, parts, name)
    part.left_out, part.watch = images.left_out, images.watch
    return part


def _listed(files: Sequence[str | os.PathLike[str]], crops: Crops | None) -> Images:
    if crops is not None:
        raise SourceError(f"a list of {len(files)} files has no annotated objects to crop: leave crops out")
    return open_videos(files) or Files.from_list(files)


def _pack(source: str) -> Images | None:
    return open_pack(source) if is_pack(source) else None


def _folder_or_list(source: str) -> Images | None:
    if os.path.isdir(source):
        return Files.from_folder(source)
    if source.lower().endswith(".txt") and os.path.exists(source):
        return Files.from_text(source)
    if os.path.exists(source):
        hint = _ANNOTATED if is_annotated(source) else "give a folder, or a .txt file with one image path a line"
        raise SourceError(f"{source}: a single file: {hint}")
    return None


def absolute(source: str) -> str:
    """``source`` as any working directory finds it: its paths made absolute, the name of a data set as it is."""
    return located(source, _absolute)


def _absolute(source: str) -> str:
    if is_stream(source) or "://" in source:
        return lasting(source)
    if os.path.exists(source) or glob.glob(source):
        return os.path.abspath(source)
    if (contained := containers.absolute(source)) != source:
        return contained
    if source.partition(",")[0].partition(":")[0] in NAMED:
        return source
    for mark in ("+", ",", ":"):
        head, found, tail = source.rpartition(mark)
        if found and (made := _absolute(head)) != head:
            return f"{made}{mark}{tail if mark == ',' else _absolute(tail)}"
    return source


# Opened again by the same process, a named source is not rendered or read again.
@lru_cache(maxsize=2)
def _named(source: str, data_root: str | None) -> Images:
    head, *assignments = source.split(",")
    name, colon, split = head.partition(":")
    if name not in NAMED:
        near = difflib.get_close_matches(name.lower(), NAMED, 1)
        hint = f"did you mean {near[0]}?" if near else f"give a path, or one of {', '.join(NAMED)}"
        hint = _ANNOTATED if is_annotated(source) else hint
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


def _parameters(cls: type[InMemoryImages]) -> dict[str, Any]:
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
