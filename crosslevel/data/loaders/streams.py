"""Images whose number nobody knows before they have been read: tar shards (WebDataset), local or remote.

A shard is read from its beginning to its end, without an index. Every member with an image's extension is an image;
the others, such as labels and captions, are passed over.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decode import PIXEL_LIMIT, decode
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import Batch, Crops, _ahead, _delivered, _Done, _generator, _Keys, _loader
from crosslevel.data.sources.containers.remote import PREFIX, Damage, Tape, expand, is_remote
from crosslevel.data.sources.containers.tar import BadTar, members
from crosslevel.data.sources.folder import EXTENSIONS
from crosslevel.utils.errors import BadImage, SourceError

BUFFER = 1024
"""Encoded images that wait on each rank to be drawn at random: about 100 MB at ImageNet's size."""

_OPEN, _CHUNK = 4, 16  # shards that are read at once, and images of one before the next one's turn
_SPARE = 16  # further images that a batch takes along, in case some of its own cannot be read
_PATIENCE = 100  # batches without a single readable image before an epoch is given up
_SHARDS = (".tar", ".tar.gz", ".tgz")


def is_stream(source: str) -> bool:
    """Whether ``source`` is read as a stream: ``stream:PATTERN``, or an address such as ``https://...``."""
    return source.startswith(PREFIX) or (is_remote(source) and not source.startswith("hf://"))


class ImageStream(IterableDataset[tuple[Tensor, int]]):
    """The images of tar shards, without a number, an order or labels known before they are read.

    It has no length and no image i: it is iterated, shard after shard, giving (3, H, W) uint8 and -1 for the label;
    what cannot be read is left out. ``shards`` are the files' paths and addresses, ``titles`` their short names.

    Args:
        shards: the files' paths and addresses.
        name: the source as the user wrote it.

    """

    labels: None = None
    classes: None = None
    tracks: None = None

    def __init__(self, shards: list[str], name: str) -> None:
        self.shards, self.name = shards, name
        short = [os.path.basename(shard.partition("?")[0] if is_remote(shard) else shard) for shard in shards]
        twice = {title for title, count in Counter(short).items() if count > 1}
        self.titles = [shard if title in twice else title for shard, title in zip(shards, short, strict=True)]

    @classmethod
    def open(cls, source: str) -> ImageStream:
        """The stream of ``https://host/train-{000..009}.tar``, ``s3://bucket/train-*.tar``, ``stream:data/*.tar``.

        Raises:
            SourceError: no shard has such a name, or a package is missing.

        """
        shards = expand(source.removeprefix(PREFIX))
        for shard in shards:
            if not shard.partition("?")[0].lower().endswith(_SHARDS):
                raise SourceError(f"{shard}: only tar shards can be streamed ({', '.join(_SHARDS)})")
        if len(set(shards)) < len(shards):
            raise SourceError(f"{source}: it names a shard more than once")
        return cls(shards, source)

    @property
    def short(self) -> str:
        """A word for the source: what its shards' names begin with, or their folder."""
        *folders, last = self.name.removeprefix(PREFIX).partition("?")[0].split("/")
        word = re.split(r"[{*\[]", re.sub(r"(\.tar)?(\.gz)?$|\.tgz$", "", last), maxsplit=1)[0].strip("-_.")
        return word or (folders[-1] if folders else "") or "stream"

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "3 H W"], int]]:
        for shard in range(len(self.shards)):
            for path, data in self.read([Part(shard)], []):
                try:
                    yield decode(bytearray(data), path), -1
                except BadImage:
                    continue

    def read(
        self, parts: Iterable[Part], troubles: list[tuple[str, str]], closing: threading.Event | None = None
    ) -> Iterator[tuple[str, bytes]]:
        """Name and encoded data of the images of ``parts``, of several shards by turns, read ahead by threads.

        The order does not depend on how fast a shard is read. ``troubles`` takes what could not be read, a shard or a
        member, and why; ``closing``, once set, ends what waits for a network.
        """
        ended, waiting = closing or threading.Event(), iter(parts)
        with ThreadPoolExecutor(_OPEN, "crosslevel-read") as pool:

            def begin(part: Part) -> _Slot:
                images = _images(self.shards[part.shard], self.titles[part.shard], part, troubles, ended)
                return images, pool.submit(_chunk, images)

            slots = deque(begin(part) for part in islice(waiting, _OPEN))
            try:
                while slots:
                    images, future = slots.popleft()
                    found = future.result()
                    slots += [(images, pool.submit(_chunk, images))] if found else map(begin, islice(waiting, 1))
                    yield from found
            finally:
                if closing is None:
                    ended.set()
                for _, future in slots:
                    future.cancel()

    def some(self, count: int) -> Images:
        """The first ``count`` images of a few shards, always the same, to be looked at.

        Raises:
            SourceError: there is not one, not even in the first 16 of these shards.

        """
        order = torch.randperm(len(self.shards), generator=_generator(0)).tolist()
        troubles: list[tuple[str, str]] = []
        for few in (order[:_OPEN], order[_OPEN : 4 * _OPEN]):
            found = list(islice(self.read(map(Part, few), troubles), count))
            if found:
                return _ScannedShard(found, self.name)
        raise self.unreadable(troubles, 4 * _OPEN)

    def unreadable(self, troubles: list[tuple[str, str]], tried: int | None = None) -> SourceError:
        """What to raise when there is no image in any of the shards that were ``tried``, all unless given."""
        why = f" (the first: {': '.join(troubles[0])})" if troubles else ""
        which = "its" if tried is None or tried >= len(self.shards) else f"{tried} of its"
        return SourceError(f"{self.name}: none of {which} {len(self.shards):,} shards can be read{why}")


class Part(NamedTuple):
    """Of shard number ``shard`` every ``of``-th image, from the ``first``-th on."""

    shard: int
    first: int = 0
    of: int = 1


class StreamBatches:
    """Batches of a stream, ``epoch_size`` images an epoch over all ranks; usable wherever `TrainBatches` is.

    A pass reads the shards in an order drawn from (``seed``, ``epoch``, pass). The ranks share the shards out among
    themselves; those left over, where the ranks do not divide the shards, are read by all ranks, and rank r takes every
    ``world``-th image from the r-th on. So a pass has every image exactly once. A rank that is through before the epoch
    is begins another pass, in another order, so that all ranks have the same number of steps; what a pass has beyond
    the epoch is left out. Shards of about equal length make both rare.

    Threads read some shards ahead, and images are drawn at random from a buffer of ``buffer``, by which neither workers
    nor the speed of a network change anything. ``workers`` processes decode (0: one thread) and cut views by ``crops``,
    whose generator is seeded by (``seed``, ``epoch``, number): (B, V, 3, s, s). ``Batch.index`` is that number, the
    running number of the image in the epoch: it names no image, as it does for sources of known length.

    An unreadable image goes to ``bad``, as "shard.tar/member", and the next one of the stream takes its place. A shard
    that is truncated, or that cannot be read after several attempts, goes there too, and the epoch goes on without the
    rest of it. ``start`` is the first batch to deliver, as in `TrainBatches`: what comes before is read, not decoded.

    Raises:
        ValueError: an epoch of fewer images than ranks, or a rank or batch size that cannot be.
        SourceError: while iterating, if no shard at all can be read.

    """

    def __init__(
        self,
        images: ImageStream,
        batch_size: int,
        epoch_size: int,
        *,
        seed: int,
        bad: BadFiles,
        crops: Crops,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int = BUFFER,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not one of the {world} ranks: 0 to {world - 1}")
        if batch_size < 1 or buffer < 1:
            raise ValueError(f"batch_size={batch_size}, buffer={buffer}: at least 1 each")
        if epoch_size < world:
            raise ValueError(f"epoch_size={epoch_size}: at least one image for each of {world} ranks")
        self.images, self.seed, self.bad, self.workers, self.buffer = images, seed, bad, workers, buffer
        self._share, self.rank, self.world = epoch_size // world, rank, world
        self.batch_size = min(batch_size, self._share)
        self.epoch, self.start = 0, 0
        self._job = _StreamJob(images.name, seed, crops)
        self._keys: _Keys[_Key] = _Keys([])
        self._loader: DataLoader[_Done] | None = None
        left = len(images.shards) % world
        if left and not rank:
            warnings.warn(
                f"{images.name}: {left} of the shards, {len(images.shards)} in all, cannot be dealt out to {world} "
                f"ranks: each rank reads these, and takes one in {world} of their images",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        return self._share // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, start, self.start = self.epoch, self.start, 0
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        wanted, closing = max(0, len(self) - start), threading.Event()
        keys = self._wanted(epoch, start, closing)
        ahead = _ahead(lambda _: next(keys), range(wanted))
        # A batch without a single readable image is no batch: then more are decoded, here.
        more = map(self._job.__getitem__, islice(keys, _PATIENCE))
        delivered = 0
        try:
            for batch in islice(_delivered(chain(self._decoded(ahead), more), self.bad), wanted):
                yield batch
                delivered += 1
        finally:
            closing.set()
            ahead.close()
            keys.close()
        if delivered < wanted:
            raise SourceError(f"{self.images.name}: hardly any of its images can be read")

    def _decoded(self, keys: Iterable[_Key]) -> Iterable[_Done]:
        if not self.workers:
            return _ahead(self._job.__getitem__, keys)
        self._keys.keys = keys
        if self._loader is None:
            self._loader = _loader(self._job, self._keys, self.workers, persistent=True)
        return self._loader

    def _wanted(self, epoch: int, start: int, closing: threading.Event) -> Generator[_Key, None, None]:
        """What to decode for each batch from ``start`` on, without end."""
        troubles: list[tuple[str, str]] = []
        told, size = 0, self.batch_size
        images = self._numbered(epoch, troubles, closing)
        try:
            deque(islice(images, start * size), maxlen=0)
            window = list(islice(images, size + _SPARE))
            while True:
                fresh = troubles[told:]
                told += len(fresh)
                yield _Key(epoch, window[:size], window[size:], fresh)
                window = window[size:] + list(islice(images, size))
        except SourceError as error:
            while True:
                yield _Key(epoch, [], [], troubles[told:], str(error))

    def _numbered(self, epoch: int, troubles: list[tuple[str, str]], closing: threading.Event) -> Iterator[_Sample]:
        """This rank's images, pass after pass, with their numbers in the epoch: r, r + world, ..."""
        numbers, lost = itertools.count(self.rank, self.world), False
        for turn in itertools.count():
            parts = [Part(shard) for shard in range(len(self.images.shards))] if lost else self.parts(epoch, turn)
            number = -1
            draws = _generator(self.seed, epoch, turn, self.rank, 2)
            for path, data in _shuffled(self.images.read(parts, troubles, closing), self.buffer, draws):
                number = next(numbers)
                yield _Sample(number, path, data)
            if number < 0 and lost:
                raise self.images.unreadable(troubles)
            lost = number < 0  # other ranks' shards may be in better order than this one's

    def parts(self, epoch: int, turn: int = 0) -> list[Part]:
        """What this rank reads in pass ``turn`` of ``epoch``, in order."""
        order = torch.randperm(len(self.images.shards), generator=_generator(self.seed, epoch, turn, 1)).tolist()
        even = len(order) // self.world * self.world
        own = [Part(shard) for shard in order[:even][self.rank :: self.world]]
        return own + [Part(shard, self.rank, self.world) for shard in order[even:]]


class _Sample(NamedTuple):
    number: int
    path: str
    data: bytes


class _Key(NamedTuple):
    """A batch to decode: its images, some more in case, what went wrong while reading; ``failure`` ends the run."""

    epoch: int
    images: list[_Sample]
    spare: list[_Sample]
    bad: list[tuple[str, str]]
    failure: str = ""


@dataclass
class _StreamJob(Dataset[_Done]):
    name: str
    seed: int
    crops: Crops

    def __getitem__(self, key: _Key) -> _Done:
        bad, spare = list(key.bad), iter(key.spare)
        if key.failure:
            return _Done(None, bad, key.failure)
        views: dict[int, Tensor] = {}
        shown: dict[int, _Sample] = {}
        for image in key.images:
            for candidate in chain((image,), spare):
                picture = _decoded(candidate, bad)
                if picture is not None:
                    views[image.number] = self._crop(picture, key.epoch, image.number)
                    shown[image.number] = candidate
                    break
        if not shown:
            return _Done(None, bad)
        readable = itertools.cycle(list(shown.values()))
        for image in key.images:
            if image.number not in shown:  # more are bad than there are spare ones: this batch's own come again
                again = shown[image.number] = next(readable)
                views[image.number] = self._crop(decode(bytearray(again.data), again.path), key.epoch, image.number)
        numbers = [image.number for image in key.images]
        index = torch.tensor([shown[number].number for number in numbers])
        return _Done(Batch(torch.stack([views[n] for n in numbers]), torch.full_like(index, -1), index), bad)

    def _crop(self, picture: UInt8[Tensor, "3 H W"], epoch: int, number: int) -> UInt8[Tensor, "V 3 s s"]:
        return self.crops(picture, _generator(self.seed, epoch, number))


def _decoded(image: _Sample, bad: list[tuple[str, str]]) -> UInt8[Tensor, "3 H W"] | None:
    try:
        return decode(bytearray(image.data), image.path)
    except BadImage as error:
        bad.append((error.path, error.reason))
        return None


class _ScannedShard(Images):
    """Encoded images in memory."""

    def __init__(self, images: list[tuple[str, bytes]], name: str) -> None:
        self.name, self.paths, self._data = name, [path for path, _ in images], [data for _, data in images]

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        return decode(bytearray(self._data[i]), self.paths[i]), -1

    def _content(self) -> Iterable[bytes]:
        yield from self._data


_Slot = tuple[Iterator[tuple[str, bytes]], Future[list[tuple[str, bytes]]]]


def _chunk(images: Iterator[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return list(islice(images, _CHUNK))


def _shuffled(images: Iterator[tuple[str, bytes]], size: int, draws: torch.Generator) -> Iterator[tuple[str, bytes]]:
    """Each image once, drawn at random from ``size`` that wait."""
    waiting = list(islice(images, size))
    for image in images:
        place = int(torch.randint(len(waiting), (), generator=draws))
        yield waiting[place]
        waiting[place] = image
    for place in torch.randperm(len(waiting), generator=draws).tolist():
        yield waiting[place]


def _images(
    shard: str, title: str, part: Part, troubles: list[tuple[str, str]], closing: threading.Event
) -> Iterator[tuple[str, bytes]]:
    """Name and encoded data of the images of one shard, until its end or the damage that ends it."""
    tape, count = Tape(shard, closing), 0
    try:
        for name, size in _members(tape):
            path = f"{title}/{name}"
            if size > 8 * PIXEL_LIMIT:
                troubles.append((path, f"it has {size:,} bytes, more than {PIXEL_LIMIT:,} pixels can need"))
                continue
            mine = count % part.of == part.first
            data = tape.read(size) if mine else b""
            if (len(data) if mine else tape.skip(size)) < size:
                raise Damage(f"truncated inside {name}")
            count += 1
            if mine:
                yield path, data
        if not count:
            troubles.append((title, f"no image in it (looked for {', '.join(sorted(EXTENSIONS))})"))
    except Damage as damage:
        if not closing.is_set():
            troubles.append((title, f"{damage}; the {count:,} images before are used" if count else str(damage)))
    finally:
        tape.close()


def _members(tape: Tape) -> Iterator[tuple[str, int]]:
    """Name and size of each image in a tar file, at its data."""
    try:
        for member in members(tape):
            name = member.name.decode("utf-8", "surrogateescape")
            if _is_image(name):
                yield name, member.size
    except BadTar as error:
        where = error.member.decode("utf-8", "surrogateescape")
        raise Damage(
            {
                "header": f"damaged: no member begins at byte {error.at:,}",
                "end": f"truncated inside {where}" if where else "truncated: the end of the archive is missing",
                "pax": "damaged: a broken pax header",
                "long": "damaged: a header that is too long",
                "sparse": f"{where} is sparse and cannot be read: make the shard without --sparse",
            }[error.what]
        ) from error


def _is_image(name: str) -> bool:
    last = name.rpartition("/")[2]
    return not last.startswith(".") and "." in last and last.rpartition(".")[2].lower() in EXTENSIONS
