"""Batches of a stream, whose number of images is not known, drawn at random from a buffer."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decode import decode
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.loaders.batches import Batch, Crops, Done, delivered
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.workers import Keys, ahead
from crosslevel.data.sources.containers.stream import ImageStream, Part
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.rng import generator

BUFFER = 1024
"""Encoded images that wait on each rank to be drawn at random: about 100 MB at ImageNet's size."""

_SPARE = 16  # further images that a batch takes along, in case some of its own cannot be read
_PATIENCE = 100  # batches without a single readable image before an epoch is given up


class StreamBatches:
    """Batches of a stream, ``epoch_size`` images an epoch over all ranks; usable wherever `TrainBatches` is.

    One pass reads every image of all shards exactly once, in an order of shards drawn from (``seed``, ``epoch``, pass).
    Each rank reads an equal number of shards. If shards are left over, all ranks read these, and rank r uses images
    r, r + ``world``, r + 2 ``world``, ... of them. A rank that ends its pass before the epoch ends begins another pass
    in another order; if the epoch ends first, the rest of the pass is not used. So all ranks have as many steps.

    Threads read some shards ahead. Images are drawn at random from a buffer of ``buffer`` images; the draw depends
    neither on the number of workers nor on the speed of the network. ``workers`` processes (0: one thread) decode and
    cut views by ``crops``, whose generator is seeded by (``seed``, ``epoch``, number): (B, V, 3, s, s). ``Batch.index``
    is that number: it counts the images of the epoch, and does not say which image of the source it is.

    An unreadable image goes to ``bad``, as "shard.tar/member"; the next image of the stream is used instead. A shard
    that is truncated, or cannot be read after several attempts, goes to ``bad`` too; its remaining images are missing.
    ``start`` is the first batch to deliver, as in `TrainBatches`: images before it are read, but not decoded.

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
            raise UserError(f"rank={rank} is not one of the {world} ranks: 0 to {world - 1}")
        if batch_size < 1 or buffer < 1:
            raise UserError(f"batch_size={batch_size}, buffer={buffer}: at least 1 each")
        if epoch_size < world:
            raise UserError(f"epoch_size={epoch_size}: at least one image for each of {world} ranks")
        self.images, self.seed, self.bad, self.workers, self.buffer = images, seed, bad, workers, buffer
        self._share, self.rank, self.world = epoch_size // world, rank, world
        self.batch_size = min(batch_size, self._share)
        self.epoch, self.start = 0, 0
        self._job = _StreamJob(images.name, seed, crops, images.reading)
        self._keys: Keys[_Key] = Keys([])
        self._pool: Pool[Done] | None = None
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
        upcoming = ahead(lambda _: next(keys), range(wanted))
        # A batch without a single readable image is no batch: then more are decoded, here.
        more = map(self._job.__getitem__, islice(keys, _PATIENCE))
        count = 0
        try:
            for batch in islice(delivered(chain(self._decoded(upcoming), more), self.bad), wanted):
                yield batch
                count += 1
        finally:
            closing.set()
            upcoming.close()
            keys.close()
        if count < wanted:
            raise SourceError(f"{self.images.name}: hardly any of its images can be read")

    def _decoded(self, keys: Iterable[_Key]) -> Iterable[Done]:
        if not self.workers:
            return ahead(self._job.__getitem__, keys)
        self._keys.keys = keys
        if self._pool is None:
            self._pool = Pool(self._job, self._keys, self.workers, persistent=True)
        return self._pool

    def _wanted(self, epoch: int, start: int, closing: threading.Event) -> Generator[_Key, None, None]:
        """What to decode for each batch from ``start`` on, without end."""
        troubles: list[tuple[str, str]] = []
        reported, size = 0, self.batch_size
        images = self._numbered(epoch, troubles, closing)
        try:
            deque(islice(images, start * size), maxlen=0)
            window = list(islice(images, size + _SPARE))
            while True:
                fresh = troubles[reported:]
                reported += len(fresh)
                yield _Key(epoch, window[:size], window[size:], fresh)
                window = window[size:] + list(islice(images, size))
        except SourceError as error:
            while True:
                yield _Key(epoch, [], [], troubles[reported:], str(error))

    def _numbered(self, epoch: int, troubles: list[tuple[str, str]], closing: threading.Event) -> Iterator[_Sample]:
        """This rank's images, pass after pass, with their numbers in the epoch: r, r + world, ..."""
        numbers, lost = itertools.count(self.rank, self.world), False
        for turn in itertools.count():
            parts = [Part(shard) for shard in range(len(self.images.shards))] if lost else self.parts(epoch, turn)
            number = -1
            rng = generator(self.seed, epoch, turn, self.rank, 2)
            for path, data in _shuffled(self.images.read(parts, troubles, closing), self.buffer, rng):
                number = next(numbers)
                yield _Sample(number, path, data)
            if number < 0 and lost:
                raise self.images.unreadable(troubles)
            lost = number < 0  # other ranks' shards may be in better order than this one's

    def parts(self, epoch: int, turn: int = 0) -> list[Part]:
        """What this rank reads in pass ``turn`` of ``epoch``, in order."""
        order = torch.randperm(len(self.images.shards), generator=generator(self.seed, epoch, turn, 1)).tolist()
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
class _StreamJob(Dataset[Done]):
    name: str
    seed: int
    crops: Crops
    reading: Reading = USUAL

    def __getitem__(self, key: _Key) -> Done:
        bad, spare = list(key.bad), iter(key.spare)
        if key.failure:
            return Done(None, bad, key.failure)
        views: dict[int, Tensor] = {}
        used: dict[int, _Sample] = {}
        for image in key.images:
            for candidate in chain((image,), spare):
                picture = self._decoded(candidate, bad)
                if picture is not None:
                    views[image.number] = self._crop(picture, key.epoch, image.number)
                    used[image.number] = candidate
                    break
        if not used:
            return Done(None, bad)
        readable = itertools.cycle(list(used.values()))
        for image in key.images:
            if image.number not in used:  # more are bad than there are spare ones: this batch's own come again
                again = used[image.number] = next(readable)
                picture = decode(bytearray(again.data), again.path, reading=self.reading)
                views[image.number] = self._crop(picture, key.epoch, image.number)
        numbers = [image.number for image in key.images]
        index = torch.tensor([used[number].number for number in numbers])
        return Done(Batch(torch.stack([views[n] for n in numbers]), torch.full_like(index, -1), index), bad)

    def _crop(self, picture: UInt8[Tensor, "3 H W"], epoch: int, number: int) -> UInt8[Tensor, "V 3 s s"]:
        return self.crops(picture, generator(self.seed, epoch, number))

    def _decoded(self, image: _Sample, bad: list[tuple[str, str]]) -> UInt8[Tensor, "3 H W"] | None:
        try:
            return decode(bytearray(image.data), image.path, reading=self.reading)
        except BadImage as error:
            bad.append((error.path, error.reason))
            return None


def _shuffled(images: Iterator[tuple[str, bytes]], size: int, rng: torch.Generator) -> Iterator[tuple[str, bytes]]:
    """Each image once, drawn at random from ``size`` that wait."""
    waiting = list(islice(images, size))
    for image in images:
        i = int(torch.randint(len(waiting), (), generator=rng))
        yield waiting[i]
        waiting[i] = image
    for i in torch.randperm(len(waiting), generator=rng).tolist():
        yield waiting[i]
