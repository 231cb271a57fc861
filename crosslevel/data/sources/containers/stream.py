"""Tar shards (WebDataset), local or remote, whose number of images is unknown before they have been read.

A shard is read from its beginning to its end, without an index. Every member with an image's extension is an image, and
so is one of an unknown extension that begins like an image; the others, such as labels and captions, are passed over.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import IterableDataset

from crosslevel.data.decode import PIXEL_LIMIT, decode
from crosslevel.data.decoding.formats import EXTENSIONS, HEAD, can_be_image, format_of
from crosslevel.data.decoding.memory import too_many_bytes
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.images import Images
from crosslevel.data.sources.containers.remote import Damage, Tape, expand, sizes_of
from crosslevel.data.sources.containers.tar import BadTar, tar_members
from crosslevel.data.uri import Source, is_remote
from crosslevel.utils.errors import BadImage, SourceError
from crosslevel.utils.rng import generator

OPEN, CHUNK = 4, 16
"""Shards that are read at the same time, and images taken from one before the next."""
_SHARDS = (".tar", ".tar.gz", ".tgz")


class ImageStream(IterableDataset[tuple[Tensor, int]]):
    """The images of tar shards, which can only be read from beginning to end.

    A stream has no length and no image i. Iterating yields (C, H, W) uint8 and the label -1, shard after shard, without
    unreadable images. ``shards`` are the files' paths and addresses, ``titles`` their short names.

    Args:
        shards: the files' paths and addresses.
        name: the source as the user wrote it.

    """

    labels: None = None
    classes: None = None
    tracks: None = None
    reading: Reading = USUAL

    def __init__(self, shards: list[str], name: str) -> None:
        self.shards, self.name = shards, name
        short = [os.path.basename(shard.partition("?")[0] if is_remote(shard) else shard) for shard in shards]
        duplicated = {title for title, count in Counter(short).items() if count > 1}
        self.titles = [shard if title in duplicated else title for shard, title in zip(shards, short, strict=True)]

    @classmethod
    def open(cls, source: Source) -> ImageStream:
        """The stream of ``https://host/train-{000..009}.tar``, ``s3://bucket/train-*.tar``, ``stream:data/*.tar``.

        Raises:
            SourceError: no shard has such a name, or a package is missing.

        """
        shards = expand(source.path)
        for shard in shards:
            if not shard.partition("?")[0].lower().endswith(_SHARDS):
                raise SourceError(f"{shard}: only tar shards can be streamed ({', '.join(_SHARDS)})")
        if len(set(shards)) < len(shards):
            raise SourceError(f"{source.base_text}: it names a shard more than once")
        stream = cls(shards, source.base_text)
        stream.reading = source.reading
        return stream

    @property
    def channels(self) -> int:
        """C, the channels of every image."""
        return self.reading.channels

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "C H W"], int]]:
        for shard in range(len(self.shards)):
            for path, data in self.read([shard], []):
                try:
                    yield decode(bytearray(data), path, reading=self.reading), -1
                except BadImage:
                    continue

    def sizes(self) -> list[int]:
        """The shards' bytes, 0 for a missing one; 1 each on a web server, which would need a request for each."""
        return sizes_of(self.shards)

    def read(
        self,
        shards: Iterable[int],
        troubles: list[tuple[str, str]],
        closing: threading.Event | None = None,
        pool: ThreadPoolExecutor | None = None,
        at_once: int = OPEN,
        chunk: int = CHUNK,
    ) -> Iterator[tuple[str, bytes]]:
        """Yield name and encoded data of the images of ``shards``, from several in turn; threads read ahead.

        The order does not depend on how fast a shard is read.

        Args:
            shards: the numbers of the shards to read.
            troubles: collects each unreadable shard or member, with the reason.
            closing: when set, ends all waiting for the network.
            pool: the threads; a new pool unless given.
            at_once: shards that are read at the same time.
            chunk: images taken from one shard before the next.

        """
        ended, waiting = closing or threading.Event(), iter(shards)
        with nullcontext(pool) if pool else ThreadPoolExecutor(at_once, "crosslevel-read") as threads:

            def begin(shard: int) -> _Slot:
                images = _images(self.shards[shard], self.titles[shard], troubles, ended)
                return images, threads.submit(_chunk, images, chunk)

            slots = deque(begin(shard) for shard in islice(waiting, at_once))
            try:
                while slots:
                    images, future = slots.popleft()
                    samples = future.result()
                    if samples:
                        slots.append((images, threads.submit(_chunk, images, chunk)))
                    else:
                        slots += map(begin, islice(waiting, 1))
                    yield from samples
            finally:
                if closing is None:
                    ended.set()
                for _, future in slots:
                    future.cancel()

    def sample(self, count: int) -> Images:
        """The first ``count`` images of a few shards, always the same ones, as a sample.

        Raises:
            SourceError: no image is found, even in the first 16 of these shards.

        """
        order = torch.randperm(len(self.shards), generator=generator(0)).tolist()
        troubles: list[tuple[str, str]] = []
        for few in (order[:OPEN], order[OPEN : 4 * OPEN]):
            samples = list(islice(self.read(few, troubles), count))
            if samples:
                return _ScannedShard(samples, self.name, self.reading)
        raise self.unreadable(troubles, 4 * OPEN)

    def unreadable(self, troubles: list[tuple[str, str]], read_count: int | None = None) -> SourceError:
        """The error to raise when no image was found in the first ``read_count`` shards (all unless given)."""
        reason = f" (the first: {': '.join(troubles[0])})" if troubles else ""
        which = "its" if read_count is None or read_count >= len(self.shards) else f"{read_count} of its"
        return SourceError(f"{self.name}: none of {which} {len(self.shards):,} shards can be read{reason}")


class _ScannedShard(Images):
    """Encoded images in memory."""

    def __init__(self, images: list[tuple[str, bytes]], name: str, reading: Reading) -> None:
        self.name, self.reading = name, reading
        self.paths, self._data = [path for path, _ in images], [data for _, data in images]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        return decode(bytearray(self._data[i]), self.paths[i], reading=self.reading), -1

    def content(self) -> Iterable[bytes]:
        """The encoded images."""
        yield from self._data


_Slot = tuple[Iterator[tuple[str, bytes]], Future[list[tuple[str, bytes]]]]


def _chunk(images: Iterator[tuple[str, bytes]], count: int) -> list[tuple[str, bytes]]:
    return list(islice(images, count))


def _images(
    shard: str, title: str, troubles: list[tuple[str, str]], closing: threading.Event
) -> Iterator[tuple[str, bytes]]:
    """Name and encoded data of the images of one shard, until its end or the damage that ends it."""
    tape, count = Tape(shard, closing), 0
    try:
        for name, size, head in _members(tape):
            path = f"{title}/{name}"
            if too_large := too_many_bytes(size, PIXEL_LIMIT, "it"):
                troubles.append((path, too_large))
                continue
            data = head + tape.read(size - len(head))
            if len(data) < size:
                raise Damage(f"truncated inside {name}")
            count += 1
            yield path, data
        if not count:
            troubles.append((title, f"no image in it (looked for {', '.join(sorted(EXTENSIONS))})"))
    except Exception as error:
        # A malicious or damaged shard loses its own images at most, and never ends the run.
        damage = str(error) if isinstance(error, Damage) else f"damaged: {_in_a_line(error)}"
        if not closing.is_set():
            troubles.append((title, f"{damage}; the {count:,} images before are used" if count else damage))
    finally:
        tape.close()


def _members(tape: Tape) -> Iterator[tuple[str, int, bytes]]:
    """Yield each image's name, size and the bytes already read to recognize it; the tape is at its data."""
    try:
        for member in tar_members(tape):
            name = member.name.decode("utf-8", "surrogateescape")
            by_name = False if name.rpartition("/")[2].startswith(".") else can_be_image(name)
            head = tape.read(min(HEAD, member.size)) if by_name is None else b""
            if by_name or format_of(head) is not None:
                yield name, member.size, head
    except BadTar as error:
        path = error.member.decode("utf-8", "surrogateescape")
        raise Damage(
            {
                "header": f"damaged: no member begins at byte {error.at:,}",
                "end": f"truncated inside {path}" if path else "truncated: the end of the archive is missing",
                "pax": "damaged: a broken pax header",
                "long": "damaged: a header that is too long",
                "size": f"damaged: {path} is said to have more bytes than any shard",
                "sparse": f"{path} is sparse and cannot be read: make the shard without --sparse",
            }[error.damage]
        ) from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}".rstrip()
