"""Images in local WebDataset shards: tar files in which the members of one sample share a key.

Ours, since `webdataset.WebDataset` reads shards in sequence, as an iterable dataset: here image i is one read at its
offset.
"""

from __future__ import annotations

import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT, decode
from crosslevel.data.decoding.formats import EXTENSIONS, HEAD, can_be_image, format_of
from crosslevel.data.decoding.memory import too_many_bytes
from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths, Table, remembered
from crosslevel.data.sources.containers.random_file import RandomFile
from crosslevel.data.sources.containers.tar import BLOCK, BadTar, Member, tar_members
from crosslevel.data.sources.labels import below_shared_folder, known_labels, one_line, state_of
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError

OPEN_SHARDS = 32  # shards kept open by a process
_LABEL = 2**24  # the most bytes of a member with a label
_FORMAT = "2"  # version of the cached index


class Shards(Images):
    """The images of tar files: reading image i is one read at its offset, in any order.

    The headers of a shard are read once and cached until the shard changes. Labels are those of the WebDataset
    convention: a member of the same key (the name up to the first dot) that ends in ``.cls`` and holds a whole number,
    or one that ends in ``.json`` and has such a "label". ``paths[i]`` is ``shard.tar/member``; ``blocks`` are the
    shards. The intact members before the damage of a shard are used; a warning and ``left_out`` name the shard.

    Args:
        files: the shards, in order.
        name: the source as the user wrote it.
        max_pixels: an image with more pixels is bad.

    Raises:
        SourceError: a shard cannot be opened, or there are fewer than 2 images.

    """

    def __init__(self, files: Sequence[str], name: str, *, max_pixels: int = PIXEL_LIMIT) -> None:
        self.name, self.max_pixels = name, max_pixels
        self.files = [os.path.abspath(file) for file in files]
        self._names, self.watch = below_shared_folder(self.files), Watch.of_files(self.files)
        indexes = [_indexed(file) for file in self.files]
        self._states, tables = [state for state, _ in indexes], [table for _, table in indexes]
        self.left_out = left_out = dict[str, str]()
        for name_of, table in zip(self._names, tables, strict=True):
            if len(table["damage"]):
                damage = table["damage"].numpy().tobytes().decode("utf-8", "replace")
                left_out[name_of] = f"{damage}: {len(table['offset']):,} images are left"
        self._ends = list(accumulate(len(table["offset"]) for table in tables))
        if self._ends[-1] < 2:
            raise _too_few(name, self._ends[-1], left_out)
        for file, name_of in zip(self.files, self._names, strict=True):
            if name_of in left_out:
                warnings.warn(f"{one_line(file)}: {left_out[name_of]}", stacklevel=3)
        # Reading a single number from an array is far faster than from a tensor.
        self._offset, self._size = (torch.cat([table[key] for table in tables]).numpy() for key in ("offset", "size"))
        self.paths = _prefixed(self._names, tables)
        self.labels, self.classes = known_labels(torch.cat([table["label"] for table in tables]), None, name)
        self.blocks = [range(*pair) for pair in pairwise((0, *self._ends)) if pair[0] < pair[1]]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be read or decoded.

        """
        path = self.paths[i]  # an IndexError ends loops over all images
        i %= len(self)
        size = int(self._size[i])
        if too_large := too_many_bytes(size, self.max_pixels, "the member"):
            raise BadImage(path, too_large)
        shard = bisect_right(self._ends, i)
        data = bytearray(size)
        try:
            got = opened_shard(self.files[shard], self._states[shard]).read_into(data, int(self._offset[i]))
        except OSError as error:
            raise BadImage(path, f"the shard cannot be read: {error.strerror or error}") from error
        if got < size:
            raise BadImage(path, f"truncated: the shard gave {got:,} of {size:,} bytes")
        return decode(data, path, self.max_pixels, self.reading), -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """Names, sizes and times of change of the shards: reading them would take as long as decoding."""
        for name, state in zip(self._names, self._states, strict=True):
            yield f"{name}\0{state}\0".encode(errors="surrogateescape")


# One cache a process. A worker that was forked may go on using the files of its parent: reads at an offset
# share no position.
@lru_cache(maxsize=OPEN_SHARDS)
def opened_shard(file: str, state: str) -> RandomFile:
    """A shard, open, if it is still in this ``state`` (`state_of`); the cache closes the one that was used longest ago.

    Raises:
        OSError: it is missing or has changed.

    """
    opened = RandomFile(file)
    if state_of(opened.number) != state:
        raise OSError("it has changed since this run began")
    return opened


def _too_few(name: str, count: int, left_out: dict[str, str]) -> SourceError:
    searched = f"looked for {', '.join(sorted(EXTENSIONS))}"
    damaged = "; ".join(f"{one_line(file)}: {reason}" for file, reason in list(left_out.items())[:1])
    return SourceError(f"{one_line(name)}: needs at least 2 images, found {count} ({damaged or searched})")


def _prefixed(names: Sequence[str], tables: Sequence[Table]) -> Paths:
    """The members' names, each prefixed with its shard's, without making Python strings."""
    texts, lengths = [], []
    for name, table in zip(names, tables, strict=True):
        prefix = np.frombuffer(f"{name}/".encode("utf-8", "surrogateescape"), np.uint8)
        length = np.diff(table["ends"].numpy(), prepend=0) + len(prefix)
        firsts = np.cumsum(length) - length
        text = np.empty(int(length.sum()), np.uint8)
        is_name = np.ones(len(text), bool)
        for k, letter in enumerate(prefix):
            text[firsts + k] = letter
            is_name[firsts + k] = False
        text[is_name] = table["text"].numpy()
        texts.append(torch.from_numpy(text))
        lengths.append(torch.from_numpy(length))
    return Paths(torch.cat(texts), torch.cat(lengths).cumsum(0))


def _indexed(file: str) -> tuple[str, Table]:
    """The state of a shard, and the result of `_index`, from the cache if possible."""
    try:
        state = state_of(file)
        return state, remembered("shard", file, f"{_FORMAT} {state}", partial(_index, file))
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}") from error


def _index(file: str) -> Table:
    """Offset, size, label (-1: none) and name of every image, and ``damage``, a text (empty for an intact shard)."""
    images: list[Member] = []
    labels: dict[bytes, int] = {}
    damage, last, opened = "", b"", RandomFile(file)
    try:
        for member in _members(opened):
            last, extension = _key(member.name)
            if extension in (b"cls", b"json"):
                label = _label(opened.read(min(member.size, _LABEL), member.offset), extension)
                if label is not None and (extension == b"cls" or last not in labels):
                    labels[last] = label
            elif _is_image(opened, member):
                images.append(member)
    except _Damage as error:
        damage = f"{error.reason} at byte {error.at:,}" if error.at else error.reason
        # The last sample's label may have been in the missing part.
        while labels and images and _key(images[-1].name)[0] == last and last not in labels:
            images.pop()
    names = Paths.of(member.name.decode("utf-8", "surrogateescape") for member in images)
    return {
        "offset": torch.tensor([member.offset for member in images], dtype=torch.int64),
        "size": torch.tensor([member.size for member in images], dtype=torch.int64),
        "label": torch.tensor([labels.get(_key(member.name)[0], -1) for member in images], dtype=torch.int64),
        "text": names.text,
        "ends": names.ends,
        "damage": torch.tensor(list(damage.encode()), dtype=torch.uint8),
    }


def _is_image(file: RandomFile, member: Member) -> bool:
    """Whether a member is an image, by its extension, or by its first bytes if the extension is unknown."""
    name = member.name.decode("utf-8", "surrogateescape")
    if name.rpartition("/")[2].startswith("."):
        return False
    by_name = can_be_image(name)
    return format_of(file.read(min(HEAD, member.size), member.offset)) is not None if by_name is None else by_name


def _key(name: bytes) -> tuple[bytes, bytes]:
    """The sample that a member belongs to, and its last extension in lower case, empty for hidden files."""
    folder, slash, base = name.rpartition(b"/")
    key, _, extensions = base.partition(b".")
    return folder + slash + key, extensions.rpartition(b".")[2].lower() if key else b""


def _label(data: bytes, extension: bytes) -> int | None:
    try:
        value = int(data) if extension == b"cls" else json.loads(data)["label"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return value if type(value) is int and 0 <= value < 2**63 else None


_REASONS = {
    "header": "damaged: no header of a member",
    "end": "truncated: it ends",
    "pax": "damaged: an extended header is broken",
    "long": "damaged: an extended header is too long",
    "size": "damaged: a member is said to have more bytes than any shard",
    "sparse": "sparse members cannot be read: make it without --sparse: one is",
}


class _Damage(Exception):
    def __init__(self, at: int, reason: str) -> None:
        super().__init__(at, reason)
        self.at, self.reason = at, reason


class _Headers:
    """A file as a tape whose skipped bytes are not read."""

    def __init__(self, file: RandomFile) -> None:
        self.file, self.at, self.length = file, 0, os.fstat(file.number).st_size

    def read(self, count: int) -> bytes:
        data = self.file.read(count, self.at)
        self.at += len(data)
        return data

    def skip(self, count: int) -> int:
        skipped = min(count, self.length - self.at)
        self.at += skipped
        return skipped


def _members(file: RandomFile) -> Iterator[Member]:
    """The regular files of a tar file, by its headers alone.

    Raises:
        _Damage: after all whole members; at byte 0 if this is no tar file at all.

    """
    tape = _Headers(file)
    if not tape.length:
        raise _Damage(0, "an empty file, not a tar file")
    try:
        for member in tar_members(tape):
            if member.offset + member.size > tape.length:
                raise BadTar("end", tape.length)
            yield member._replace(name=member.name.removeprefix(b"./"))
    except BadTar as error:
        if error.damage == "end" and tape.length >= BLOCK:
            raise _Damage(tape.length, _REASONS["end"]) from error
        at = 0 if error.damage == "end" else error.at
        raise _Damage(
            at, "not a tar file" if not at and error.damage in ("header", "end") else _REASONS[error.damage]
        ) from error
    except (ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        # A malicious header loses this shard's images at most.
        raise _Damage(tape.at, f"damaged: {type(error).__name__}") from error
