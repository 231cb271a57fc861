"""The text of a source of images: parsed once into a `Source`, which is passed on from there.

An existing path is taken as a path, whatever characters it has; only the text after it is parsed.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from crosslevel.data.decoding.reading import USUAL, Reading, split_reading
from crosslevel.data.sources.braces import BRACES
from crosslevel.utils.errors import SourceError, did_you_mean, near_names

FILES = ("list", "classes", "unique", "bursts")
"""Suffixes whose value is a file: the whole text after the ``=``, commas included."""

PICKS = ("imbalance", "pareto", "frames", "tracks", "unique")
"""Suffixes that only leave images out, so that a list of the remaining images can replace them."""

BY_LABEL = ("imbalance", "pareto", "classes")
"""Suffixes that choose images by their labels."""

KEYS = ("imbalance", "pareto", "list", "classes", "repeat", "frames", "tracks", "unique", "bursts")
"""All suffixes."""

ALONE = ("unique", "bursts")
"""Suffixes that need no value: ``@unique``."""

VIDEOS = frozenset(
    ("3gp", "avi", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "webm", "wmv")
)  # not ts: those are mostly TypeScript
"""Extensions of video files."""

STREAM = "stream:"
CONTAINER = re.compile(r"\.(?:tar|parquet|tar\.(?:gz|bz2|xz|zst)|tgz|tbz2|txz|tzst)$", re.IGNORECASE)
"""The end of the name of a file of several images."""

TAR = re.compile(r"\.(?:tar|tar\.gz|tgz)$", re.IGNORECASE)
"""The end of the name of a shard that can be streamed."""

_OPTION = re.compile(r"(?s)(?P<path>.*),\s*(?P<key>\w+)=(?P<value>[^,]*)")
_HUB = re.compile(r"(?P<path>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")

Kind = Literal["path", "pattern", "annotated", "hub", "stream", "name"]


class Suffix(NamedTuple):
    """``@key=value``; ``value`` may hold more keys."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"@{self.key}={self.value}" if self.value or self.key not in ALONE else f"@{self.key}"

    def parts(self) -> tuple[str, tuple[Option, ...]]:
        """The value up to its first comma, and the ``key=value`` options after it."""
        first, *options = self.value.split(",")
        return first, _options(options)


class Option(NamedTuple):
    """``,key=value``; the value is None where there is no ``=``."""

    key: str
    value: str | None

    def __str__(self) -> str:
        return f",{self.key}" if self.value is None else f",{self.key}={self.value}"


class Part(NamedTuple):
    """One of several sources joined by ``+``: a path, and what follows its last colon (empty if there is none)."""

    path: str
    split: str

    def __str__(self) -> str:
        return f"{self.path}:{self.split}" if self.split else self.path

    @property
    def annotated(self) -> bool:
        """Whether the path is a folder in the layout of Pascal VOC, a JSON file such as COCO's, or YOLO's YAML."""
        if os.path.isdir(os.path.join(self.path, "ImageSets", "Main")):
            return True
        return os.path.isfile(self.path) and self.path.lower().endswith((".json", ".yaml", ".yml"))


@dataclass(frozen=True)
class Source:
    """A source of images, parsed.

    Args:
        base_text: the text of the source, without its suffixes.
        kind: ``path``: an existing path; ``pattern``: names with ``*``, ``?``, ``[...]`` or braces, and files of videos
            or containers that do not exist; ``annotated``: VOC folders or COCO files, with the text after their colons;
            ``hub``: a data set of the Hugging Face hub; ``stream``: shards that are read from beginning to end;
            ``name``: a data set by its name.
        path: the path, the pattern, the address without its protocol ``hf://`` or ``stream:``, or the name.
        options: the ``,key=value`` after the path, in order.
        subset: the ``@key=value`` at the end, in the order in which they are applied.
        split: the text after the colon of a name or of a data set of the hub.
        revision: the text after the ``@`` of a data set of the hub.
        parts: the sources that ``+`` joins.
        reading: how its images are read: ``,damaged=keep`` and the like, written after all but the suffixes.

    """

    base_text: str
    kind: Kind
    path: str
    options: tuple[Option, ...] = ()
    subset: tuple[Suffix, ...] = ()
    split: str | None = None
    revision: str | None = None
    parts: tuple[Part, ...] = ()
    reading: Reading = USUAL

    @property
    def text(self) -> str:
        """The source as it is written."""
        return self.base_text + self.reading.text + "".join(map(str, self.subset))

    @property
    def is_stream(self) -> bool:
        """Whether its number of images is unknown before they have been read."""
        return self.kind == "stream"

    @property
    def is_annotated(self) -> bool:
        """Whether all its parts have annotated objects."""
        return all(part.annotated for part in self.parts)

    @property
    def has_subset(self) -> bool:
        """Whether it selects only a part of the images."""
        return bool(self.subset)

    @property
    def base(self) -> Source:
        """The source without its suffixes."""
        return dataclasses.replace(self, subset=())

    @property
    def short(self) -> str:
        """One word for it, used in the name of a run."""
        if self.is_stream:
            word = _common_word(self.path)
        elif os.path.exists(self.path):
            word = Path(self.path).resolve().stem
        else:
            word = _common_word(self.head)
        word += "".join(f"-{suffix.key}" + ("" if suffix.key in FILES else suffix.value) for suffix in self.subset)
        return re.sub(r"[^\w.-]+", "-", word).strip("-.") or "images"

    def read_as(self, reading: Mapping[str, str]) -> Source:
        """The source with reading settings such as ``{"damaged": "keep"}``.

        Raises:
            SourceError: an invalid setting.

        """
        _, settings = split_reading("".join(f",{name}={value}" for name, value in reading.items()))
        changes = {name: getattr(settings, name) for name in reading}
        return dataclasses.replace(self, reading=dataclasses.replace(self.reading, **changes))

    def absolute(self) -> Source:
        """The source independent of the working directory: paths are made absolute; names and addresses stay."""
        subset = tuple(
            s._replace(value=os.path.abspath(s.value)) if s.key in FILES and s.value else s for s in self.subset
        )
        result = dataclasses.replace(self, subset=subset)
        if self.kind in ("name", "hub") or (self.is_stream and is_remote(self.path)):
            return result
        parts = tuple(map(_absolute, self.parts))
        path = "+".join(map(str, parts)) if self.kind == "annotated" else os.path.abspath(self.path)
        result = dataclasses.replace(result, path=path, parts=parts)
        result = dataclasses.replace(result, base_text=result.head + "".join(map(str, self.options)))
        return dataclasses.replace(result, parts=(Part(result.base_text, ""),)) if self.is_stream else result

    def with_list(self, file: str, without: Sequence[str] = PICKS) -> Source:
        """The source with a list in place of the suffixes ``without``: it has the same images, labels and classes."""
        subset = (suffix for suffix in self.subset if suffix.key not in without)
        return dataclasses.replace(self, subset=(*subset, Suffix("list", file)))

    @property
    def head(self) -> str:
        """The source's text before its options."""
        if self.is_stream:
            return STREAM * self.base_text.startswith(STREAM) + self.path
        revision = "" if self.revision is None else f"@{self.revision}"
        split = "" if self.split is None else f":{self.split}"
        return f"{'hf://' if self.kind == 'hub' else ''}{self.path}{revision}{split}"


def parse(text: str | os.PathLike[str] | Source) -> Source:
    """Parse ``text`` as a source of images; a `Source` is returned unchanged.

    Raises:
        SourceError: a misspelled key of a suffix, or an invalid address of the hub.

    """
    if isinstance(text, Source):
        return text
    source_text, subset = _split_subset(os.fspath(text))
    source_text, reading = (source_text, USUAL) if os.path.lexists(source_text) else split_reading(source_text)
    if source_text.startswith("hf://") and not CONTAINER.search(source_text.partition(",")[0]):
        source = _on_hub(source_text)
    elif source_text.startswith(STREAM) or is_remote(source_text):
        source = Source(source_text, "stream", source_text.removeprefix(STREAM), parts=(Part(source_text, ""),))
    else:
        source = _local(source_text)
    return dataclasses.replace(source, subset=subset, reading=reading)


def read_as(text: str, reading: Mapping[str, str]) -> str:
    """The text of a source with these reading settings (`Source.read_as`); errors are those of `parse`."""
    return parse(text).read_as(reading).text


def is_remote(name: str) -> bool:
    """Whether ``name`` is an address, ``protocol://...``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", name, re.IGNORECASE) is not None


def is_video(file: str) -> bool:
    """Whether a file has the extension of a video."""
    return file.rpartition(".")[2].lower() in VIDEOS and "." in file


def _local(text: str) -> Source:
    """A path, a pattern, annotated images or a name, in this order."""
    path, options = _without_options(text)
    parts = (Part(text, ""),) if os.path.exists(text) else tuple(map(_part, text.split("+")))
    if os.path.lexists(path):
        return Source(text, "path", path, options, parts=parts)
    if glob.has_magic(path) or BRACES.search(path) or CONTAINER.search(path) or is_video(path):
        return Source(text, "pattern", path, options, parts=parts)
    if all(part.annotated for part in parts):
        return Source(text, "annotated", text, parts=parts)
    head, *settings = text.split(",")
    name, colon, split = head.partition(":")
    return Source(text, "name", name, _options(settings), split=split if colon else None, parts=parts)


def _options(texts: Sequence[str]) -> tuple[Option, ...]:
    pairs = (text.partition("=") for text in texts)
    return tuple(Option(key, value if equals else None) for key, equals, value in pairs)


def _part(text: str) -> Part:
    """Split ``path:rest``; an existing path is not split."""
    path, _, split = (text, "", "") if os.path.exists(text) else text.rpartition(":")
    return Part(path, split) if path else Part(text, "")


def _without_options(text: str) -> tuple[str, tuple[Option, ...]]:
    """The path, and the options after it. Only after an existing path may options have slashes."""
    path, options = text, list[Option]()
    while not os.path.lexists(path) and (match := _OPTION.fullmatch(path)):
        if "/" in match["value"] and not (os.path.lexists(match["path"]) or CONTAINER.search(match["path"])):
            break
        path = match["path"]
        options.insert(0, Option(match["key"], match["value"]))
    return path, tuple(options)


def _on_hub(text: str) -> Source:
    """``hf://owner/name[/config][@revision][:split]``, or ``hf:///folder[:split]``, whose folder may have any name."""
    head, options = text, list[Option]()
    while match := _OPTION.fullmatch(head):
        head = match["path"]
        options.insert(0, Option(match["key"], match["value"]))
    address, parts = head.removeprefix("hf://"), (Part(text, ""),)
    if address.startswith("/"):
        ends = [len(address), *(colon.start() for colon in re.finditer(":", address))]
        end = max((end for end in ends if os.path.isdir(address[:end])), default=len(address))
        return Source(text, "hub", address[:end], tuple(options), split=address[end + 1 :] or None, parts=parts)
    match = _HUB.fullmatch(address)
    if not match or match["path"].strip("/").count("/") > 2:
        raise SourceError(f"{head}: write it as hf://owner/name[/config][@revision][:split]")
    path, revision, split = match["path"].strip("/"), match["revision"], match["split"]
    return Source(text, "hub", path, tuple(options), split=split, revision=revision, parts=parts)


def _absolute(part: Part) -> Part:
    """Make a part's paths absolute. Only after a JSON file is the rest a path, too: the folder of its images."""
    folder = part.split and os.path.isfile(part.path)
    return Part(os.path.abspath(part.path), os.path.abspath(part.split) if folder else part.split)


def _common_word(path: str) -> str:
    """The common prefix of files' names, or their folder."""
    *folders, last = path.partition("?")[0].split("/")
    word = re.split(r"[{*\[]", re.sub(r"(\.tar)?(\.gz)?$|\.tgz$", "", last), maxsplit=1)[0].strip("-_.")
    return word or (folders[-1] if folders else "") or "images"


def _split_subset(text: str) -> tuple[str, tuple[Suffix, ...]]:
    """Split a source's text into what precedes the suffixes, and the suffixes.

    An existing path is never split; an ``@`` without a known key after it belongs to the source.
    """
    if os.path.exists(text):
        return text, ()
    matches = list(re.finditer(rf"@(?:({'|'.join(KEYS)})=|({'|'.join(ALONE)})(?=@|$))", text))
    existing = [i for i, match in enumerate(matches) if os.path.exists(text[: match.start()])]
    matches = matches[existing[-1] if existing else 0 :]
    source_text = text[: matches[0].start()] if matches else text
    ends = [match.start() for match in matches[1:]] + [len(text)]
    suffixes = [
        Suffix(match[1] or match[2], text[match.end() : end]) for match, end in zip(matches, ends, strict=False)
    ]
    for part in (source_text, *(suffix.value for suffix in suffixes if suffix.key not in FILES)):
        _refuse_misspelled(text, part)
    return source_text, tuple(suffixes)


def _refuse_misspelled(text: str, part: str) -> None:
    """Refuse a misspelled ``@key=`` at the end of ``part``, unless it is in a path or an address."""
    at = re.search(r"@([^@=/]*)=[^@/]*$", part)
    if at is None or os.path.exists(part):
        return
    if near_names(at[1], KEYS) or "://" not in part:
        raise SourceError(f"{text}: no part of a source is called @{at[1]}: {did_you_mean(at[1], KEYS)}")
