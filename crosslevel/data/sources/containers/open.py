"""Containers of images: shards, Parquet files, and data sets of the hub."""

from __future__ import annotations

import glob
import os

from crosslevel.data.decoding.formats import EXTENSIONS
from crosslevel.data.images import Images
from crosslevel.data.sources.braces import expanded
from crosslevel.data.sources.containers.hub import Hub
from crosslevel.data.sources.containers.parquet import Parquet
from crosslevel.data.sources.containers.webdataset import Shards
from crosslevel.data.uri import CONTAINER, Source
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import SourceError, did_you_mean

_COMPRESSED = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "tbz2": "bunzip2", "xz": "unxz", "txz": "unxz"}
_COMPRESSED |= {"zst": "unzstd", "tzst": "unzstd"}
_KEYS = ("column", "label")


def open_container(source: Source) -> Images | None:
    """The images of ``source``, or None if it is no container.

    Containers are ``.tar`` and ``.parquet`` files: one, those that ``*`` or braces such as ``{000..009}`` name, or
    those of a folder without images. Parquet files take ``,column=NAME`` and ``,label=NAME``.

    Raises:
        SourceError: it is one, but cannot be read; one line that says what is wrong and what to do.

    """
    files = _files(source)
    if not files:
        return None
    images = _opened(source, files)
    if os.path.isdir(source.path):
        images.watch = Watch.of_files(files, source.path)  # a new file in it is a change
    return images


def open_hub(source: Source) -> Images:
    """The images of a data set of the hub, with the options ``,column=NAME`` and ``,label=NAME``.

    Raises:
        SourceError: as from `Hub`.

    """
    columns = _columns(source)
    images = Hub(source, column=columns.get("column"), label=columns.get("label"))
    images.name = source.base_text
    return images


def _opened(source: Source, files: list[str]) -> Images:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise SourceError(f"{source.base_text}: files of several kinds, {' and '.join(sorted(kinds))}: name one kind")
    if kinds == {"parquet"}:
        columns = _columns(source)
        return Parquet(files, source.base_text, column=columns.get("column"), label=columns.get("label"))
    if kinds != {"tar"}:
        tool = _COMPRESSED[kinds.pop()]
        raise SourceError(f"{files[0]}: a compressed tar file gives no access to single images: {tool} it first")
    if source.options:
        raise SourceError(f"{source.base_text}: shards take no {', '.join(f'{key}=' for key, _ in source.options)}")
    return Shards(files, source.base_text)


def _kind(file: str) -> str:
    return file.rpartition(".")[2].lower()


def _columns(source: Source) -> dict[str, str | None]:
    """The columns that the options name."""
    for key, value in source.options:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS, f"keys: {', '.join(_KEYS)}", value=f"={value or '...'}")
            raise SourceError(f"{source.base_text}: no key {key!r}: {hint}")
    return dict(source.options)


def _files(source: Source) -> list[str]:
    """The containers that ``source`` names; empty if it names something else, such as a folder of images.

    Raises:
        SourceError: a file that it names is not there.

    """
    if os.path.isdir(source.path):
        containers = _within(source.path)
        return [] if containers and _holds_images(source.path) else containers
    if source.kind == "path":
        return [source.path] if CONTAINER.search(source.path) else []
    names = list(expanded(source.path))
    if not all(CONTAINER.search(name) for name in names):
        return []
    files: list[str] = []
    for name in names:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            hint = f" (1 of {len(names):,} that {source.path} names)" if len(names) > 1 else ""
            raise SourceError(f"{name}: no such file{hint}")
        files += matches
    return files


def _within(folder: str) -> list[str]:
    """The containers that lie in a folder itself, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if CONTAINER.search(e.name) and e.name[0] != "." and e.is_file()]
    except OSError:
        return []  # the search for images will report that
    return [os.path.join(folder, name) for name in sorted(names)]


def _holds_images(folder: str) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any("." in name[1:] and name.rpartition(".")[2].lower() in EXTENSIONS for name in names):
            return True
    return False
