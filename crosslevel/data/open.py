"""From a source to its images: the one place that knows every kind of source."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, overload

from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.sources.annotated.object_crops import Crops, object_crops
from crosslevel.data.sources.cifar import Cifar10, Cifar100
from crosslevel.data.sources.containers.copies import local
from crosslevel.data.sources.containers.open import open_container, open_hub
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.sources.folder import Files
from crosslevel.data.sources.packed import is_pack, open_pack
from crosslevel.data.sources.pages import Pages
from crosslevel.data.sources.stl10 import Stl10
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.sources.video.frames import listed_videos, open_videos
from crosslevel.data.subsets.select import unlabelled
from crosslevel.data.subsets.suffixes import applied
from crosslevel.data.uri import BY_LABEL, PICKS, TAR, Option, Source, is_remote, parse
from crosslevel.utils.errors import SourceError, UserError, did_you_mean

NAMED: dict[str, type[InMemoryImages]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "turntable": Turntable,
    "stl10": Stl10,
}

_ANNOTATED = "--crops takes the objects of annotated images"
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


SourceLike = Source | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@overload
def open_images(source: SourceLike, *, data_root: str | None = None, crops: Crops | None = None) -> Images: ...


@overload
def open_images(
    source: SourceLike, *, data_root: str | None = None, crops: Crops | None = None, streams: bool
) -> Images | ImageStream: ...


def open_images(
    source: SourceLike, *, data_root: str | None = None, crops: Crops | None = None, streams: bool = False
) -> Images | ImageStream:
    """The images of ``source``.

    - a folder, searched recursively; class-per-folder layouts give labels;
    - a pack, made by ``crosslevel pack``;
    - a sequence of image files, or a ``.txt`` file that names one a line, relative to its own folder;
    - a video, a folder of videos, a pattern such as ``videos/*.mp4``, or a list of videos: their frames, one a second
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

    An existing path is always taken as a path, whatever its name. A folder that has images counts as one of images: its
    videos are left out, with a warning, unless ``,fps=`` or ``,stride=`` requests them.

    Raises:
        SourceError: there are no images; one line that says what is wrong and what to do.

    """
    if not isinstance(source, Source | str | os.PathLike):
        return _listed(source, crops)
    source = parse(source)
    if source.subset:
        if source.is_stream and streams and _is_tar(source):
            raise SourceError(
                f"{source.text}: a stream has no known images to take a part of: leave {source.subset[0]} out, "
                "or give files"
            )
        return applied(open_images(source.base, data_root=data_root, crops=crops), source.subset, source.text)
    if crops is not None:
        return _read_as(object_crops(source, crops), source)
    if source.is_stream:
        return _stream_or_copy(source, data_root, streams)
    return _read_as(_opened(source, data_root), source)


def _stream_or_copy(source: Source, data_root: str | None, streams: bool) -> Images | ImageStream:
    """Open tar shards as a stream if the caller accepts one; otherwise copy the files at an address once."""
    if streams and (_is_tar(source) or not is_remote(source.path)):
        return ImageStream.open(source)
    if not is_remote(source.path):
        raise SourceError(f"{source.text}: a stream has no known number of images, only train can use one: give files")
    images = _read_as(_opened(local(source), data_root), source)
    images.name = source.base_text + source.reading.text
    return images


def _is_tar(source: Source) -> bool:
    return TAR.search(source.path.partition("?")[0]) is not None


def _read_as(images: Images, source: Source) -> Images:
    """Set how a source decodes its images; no other function does."""
    if source.reading == images.reading:
        return images
    if source.reading.channels != images.channels and not images.decodes:
        raise SourceError(
            f"{source.text}: images of files are read in {source.reading.channels} channels, not those of "
            f"{source.base_text}, which has {images.channels}: leave channels out"
        )
    if isinstance(images, InMemoryImages):
        return images
    images.reading = source.reading
    images.name += source.reading.text
    if source.reading.pages == "all":
        if not isinstance(images, Files):
            raise SourceError(f"{source.text}: pages=all is for folders and lists of image files: leave it out")
        return Pages(images)
    return images


def open_unlabelled(
    source: Source | str | os.PathLike[str], *, data_root: str | None = None, crops: Crops | None = None
) -> Images:
    """`open_images` without labels: they are dropped before a part is taken, including those of an ``@list`` file.

    Raises:
        SourceError: as from `open_images`, or for a part that is selected by labels.

    """
    source = parse(source)
    for suffix in source.subset:
        if suffix.key in BY_LABEL:
            instead = source.with_list("part.txt", (*PICKS, *BY_LABEL))
            raise SourceError(
                f"{source.text}: no label is read here, and {suffix} chooses images by labels: write a list with "
                f"crosslevel subset '{source.text}' -o part.txt, and give {instead.text}"
            )
    images = unlabelled(open_images(source.base, data_root=data_root, crops=crops))
    return unlabelled(applied(images, source.subset, source.text)) if source.subset else images


def _opened(source: Source, data_root: str | None) -> Images:
    if source.kind == "name":
        return open_by_name(source, data_root)
    if source.kind == "hub":
        return open_hub(source)
    for opener in (_pack, open_videos, open_container, _folder_or_list):
        images = opener(source)
        if images is not None:
            return images
    raise _unknown(source)


def _listed(files: Sequence[str | os.PathLike[str]], crops: Crops | None) -> Images:
    if crops is not None:
        raise SourceError(f"a list of {len(files)} files has no annotated objects to crop: leave crops out")
    paths = [os.fspath(file) for file in files]
    return listed_videos(paths) or Files.from_list(paths)


def _pack(source: Source) -> Images | None:
    return open_pack(source.path) if is_pack(source.base_text) else None


def _folder_or_list(source: Source) -> Images | None:
    if source.options:
        return None
    if os.path.isdir(source.path):
        return Files.from_folder(source.path, source.reading.takes_arrays)
    if source.path.lower().endswith(".txt") and os.path.exists(source.path):
        return Files.from_text(source.path)
    if os.path.exists(source.path):
        hint = _ANNOTATED if source.is_annotated else "give a folder, or a .txt file with one image path a line"
        raise SourceError(f"{source.text}: a single file: {hint}")
    return None


def _unknown(source: Source) -> SourceError:
    hint = did_you_mean(source.path, NAMED, f"give a path, or one of {', '.join(NAMED)}")
    hint = _ANNOTATED if source.is_annotated else hint
    return SourceError(f"{source.text!r}: no such folder, file or data set: {hint}")


# Opened again by the same process, a named source is not rendered or read again.
@lru_cache(maxsize=2)
def open_by_name(source: Source, data_root: str | None) -> Images:
    """The images of a source of kind ``name``; the last two are cached, and ``cache_clear`` forgets them.

    Raises:
        SourceError: no data set has this name, or as from `open_class`.

    """
    if source.path not in NAMED:
        raise _unknown(source)
    return open_class(NAMED[source.path], source, data_root)


def open_class(kind: type[InMemoryImages], source: Source, data_root: str | None = None) -> Images:
    """The images of a data set's class; its parameters are the split and the ``key=value`` options of ``source``.

    Raises:
        SourceError: there is no such parameter, its value is of another type, or the class refuses it.

    """
    name, parameters = source.path, _parameters(kind)
    arguments: dict[str, Any] = {"data_root": data_root} if "data_root" in parameters else {}
    split = () if source.split is None else (Option("split", source.split),)
    for key, value in (*split, *source.options):
        if key not in parameters or value is None:
            hint = did_you_mean(key, parameters, f"keys: {', '.join(parameters)}", value=f"={value or '...'}")
            raise SourceError(f"{source.text}: {name} has no key={value or '...'} named {key!r}: {hint}")
        arguments[key] = _converted(source.text, key, value, parameters[key])
    try:
        images = kind(**arguments)
    except SourceError:
        raise
    except UserError as error:
        raise SourceError(f"{source.text}: {error}") from error
    images.name = source.text
    return images


def _parameters(cls: type[InMemoryImages]) -> dict[str, Any]:
    """The constructor's parameters and their types."""
    hints = get_type_hints(cls.__init__)
    return {key: hints.get(key, str) for key in inspect.signature(cls).parameters}


def _converted(source: str, key: str, value: str, annotation: Any) -> object:
    """``value`` as the type that the parameter is annotated with."""
    if get_origin(annotation) in (Union, types.UnionType):
        if value.lower() == "none" and type(None) in get_args(annotation):
            return None
        annotation = next(choice for choice in get_args(annotation) if choice is not type(None))
    if get_origin(annotation) is Literal:
        if value in get_args(annotation):
            return value
        raise SourceError(f"{source}: {key}={value}: use {' or '.join(map(str, get_args(annotation)))}")
    if annotation is bool and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    try:
        if annotation in (int, float, str):
            return annotation(value)
    except ValueError:
        pass
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(annotation)
    raise SourceError(f"{source}: {key}={value}: " + (f"needs {kind}" if kind else "cannot be set in a source's name"))
