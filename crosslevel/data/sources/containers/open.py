"""Which sources are containers of images, by what is written in their name: shards, Parquet files, the hub."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator

from crosslevel.data.images import Images
from crosslevel.data.sources.containers.hub import Hub
from crosslevel.data.sources.containers.parquet import Parquet
from crosslevel.data.sources.containers.webdataset import Shards
from crosslevel.data.sources.folder import EXTENSIONS
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import SourceError

_COMPRESSED = {"gz": "gunzip", "tgz": "gunzip", "bz2": "bunzip2", "tbz2": "bunzip2", "xz": "unxz", "txz": "unxz"}
_COMPRESSED |= {"zst": "unzstd", "tzst": "unzstd"}
_CONTAINER = re.compile(r"\.(?:tar|parquet|tar\.(?:gz|bz2|xz|zst)|tgz|tbz2|txz|tzst)$", re.IGNORECASE)
_OPTION = re.compile(r",(?P<key>\w+)=(?P<value>[^,]*)$")
_KEYS = ("column", "label")


def open_container(source: str) -> Images | None:
    """The images of ``source``, or None if it is no container.

    Containers are ``.tar`` and ``.parquet`` files: one, those that ``*`` or braces such as ``{000..009}`` name, or
    those of a folder without images; and what begins with ``hf://``. Parquet files and the hub take ``,column=NAME``
    and ``,label=NAME`` after the name.

    Raises:
        SourceError: it is one, but cannot be read; one line that says what is wrong and what to do.

    """
    if source.startswith("hf://"):
        place, options = _options(source)
        _check(source, options)
        images = Hub(place, column=options.get("column"), label=options.get("label"))
        images.name = source
        return images
    if "://" in source:
        return None
    place, options = (source, {}) if os.path.lexists(source) else _options(source)
    files = _files(place)
    if not files:
        return None
    found = _opened(source, files, options)
    if os.path.isdir(place):
        found.watch = Watch.of_files(files, place)  # one that comes later is a change
    return found


def absolute(source: str) -> str:
    """``source`` as it can be opened from any folder: paths made absolute, names of data sets as they are."""
    if "://" in source:
        return source
    place, options = _options(source)
    folder = os.path.isdir(place) and set(options) <= set(_KEYS)
    return os.path.abspath(source) if folder or os.path.lexists(source) or _CONTAINER.search(place) else source


def _opened(source: str, files: list[str], options: dict[str, str]) -> Images:
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise SourceError(f"{source}: files of several kinds, {' and '.join(sorted(kinds))}: name one kind")
    if kinds == {"parquet"}:
        _check(source, options)
        return Parquet(files, source, column=options.get("column"), label=options.get("label"))
    if kinds != {"tar"}:
        tool = _COMPRESSED[kinds.pop()]
        raise SourceError(f"{files[0]}: a compressed tar file gives no access to single images: {tool} it first")
    if options:
        raise SourceError(f"{source}: shards take no {', '.join(f'{key}=' for key in options)}")
    return Shards(files, source)


def _kind(file: str) -> str:
    return file.rpartition(".")[2].lower()


def _options(source: str) -> tuple[str, dict[str, str]]:
    """What stands before the trailing ``,key=value``, and these."""
    options: dict[str, str] = {}
    while found := _OPTION.search(source):
        options = {found["key"]: found["value"], **options}
        source = source[: found.start()]
    return source, options


def _check(source: str, options: dict[str, str]) -> None:
    for key, value in options.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]}={value or '...'}?" if near else f"keys: {', '.join(_KEYS)}"
            raise SourceError(f"{source}: no key {key!r}: {hint}")


def _files(place: str) -> list[str]:
    """The containers that ``place`` names; none if it names none, or a folder of images.

    Raises:
        SourceError: a file that it names is not there.

    """
    if os.path.isdir(place):
        found = _within(place)
        return [] if found and _holds_images(place) else found
    if os.path.lexists(place):
        return [place] if _CONTAINER.search(place) else []
    names = list(expanded(place))
    if not all(_CONTAINER.search(name) for name in names):
        return []
    files: list[str] = []
    for name in names:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            others = f" (1 of {len(names):,} that {place} names)" if len(names) > 1 else ""
            raise SourceError(f"{name}: no such file{others}")
        files += matches
    return files


def _within(folder: str) -> list[str]:
    """The containers that lie in a folder itself, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if _CONTAINER.search(e.name) and e.name[0] != "." and e.is_file()]
    except OSError:
        return []  # whoever searches it for images says so
    return [os.path.join(folder, name) for name in sorted(names)]


def _holds_images(folder: str) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any("." in name[1:] and name.rpartition(".")[2].lower() in EXTENSIONS for name in names):
            return True
    return False


_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choices>[^{}]*,[^{}]*))\}")


def expanded(pattern: str) -> Iterator[str]:
    """The names that ``{000..009}`` and ``{a,b}`` in a name stand for, as shells and WebDataset expand them."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    head, tail = pattern[: found.start()], pattern[found.end() :]
    for choice in _choices(found):
        yield from (f"{head}{choice}{rest}" for rest in expanded(tail))


def _choices(braces: re.Match[str]) -> Iterator[str]:
    if braces["choices"] is not None:
        yield from braces["choices"].split(",")
        return
    first, last = int(braces["first"]), int(braces["last"])
    padded = any(len(end) > 1 and end.startswith("0") for end in (braces["first"], braces["last"]))
    width = max(len(braces["first"]), len(braces["last"])) if padded else 0
    step = 1 if first <= last else -1
    yield from (f"{number:0{width}}" for number in range(first, last + step, step))
