"""Batches of a stream, whose number of images is not known, drawn at random from a buffer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from crosslevel.data.loaders.lanes import ROWS, Lane, Sample, dealt, rows_of, shared, substitutes
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.data.loaders.workers import Keys
from crosslevel.data.sources.containers.stream import CHUNK, OPEN, ImageStream
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.rng import generator

BUFFER = 1024
"""Encoded images of all ranks in the shuffle buffer, at least: about 100 MB at ImageNet's size."""

_BATCHES = 4  # batches of all ranks in the buffer, if those are more images
_PATIENCE = 100  # batches without a single readable image before an epoch is given up


class StreamBatches:
    """Batches of a stream, ``epoch_size`` images an epoch over all ranks; usable wherever `TrainBatches` is.

    Which images are in which batch of all ranks, and in which of its rows, depends on (``seed``, ``epoch``) and the
    batch's size alone: rank r has the r-th part of its rows, however many ranks there are. The shards are dealt out to
    lanes (`lanes`), each of which fills the same ``rows`` rows of every batch, or some more; a rank reads the lanes of
    its own rows. A lane that several ranks share is read by each of them. Lanes are about equally long by the files'
    sizes; if that is impossible, as with few or very uneven shards, there are fewer lanes.

    One pass reads every image of all shards exactly once, in an order drawn from (``seed``, ``epoch``, pass). A lane
    that ends its pass before the epoch ends begins another one; if the epoch ends first, the rest is not used.

    Threads read some shards ahead. Images are drawn at random from a buffer of ``buffer`` images, over all lanes; the
    draw depends neither on the number of workers nor on the speed of the network. ``workers`` processes (0: one thread)
    decode and cut views by ``crops``, whose generator is seeded by (``seed``, ``epoch``, number): (B, V, 3, s, s).
    ``Batch.index`` is that number: it counts the images of the epoch, and does not identify an image of the source.

    An unreadable image goes to ``bad_files``, as "shard.tar/member"; a later one of its lane is used instead. A shard
    that is truncated, or cannot be read after several attempts, goes there too; its remaining images are missing.
    ``start`` is the first batch to deliver, as in `TrainBatches`: images before it are read, but not decoded.

    Raises:
        ValueError: an epoch of fewer images than ranks, or an impossible rank or batch size.
        SourceError: while iterating, if no shard at all can be read.

    """

    def __init__(
        self,
        images: ImageStream,
        batch_size: int,
        epoch_size: int,
        *,
        seed: int,
        bad_files: BadFiles,
        crops: Crops,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int | None = None,
        rows: int = ROWS,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} is not one of the {world} ranks: 0 to {world - 1}")
        if batch_size < 1 or rows < 1 or (buffer is not None and buffer < 1):
            raise UserError(f"batch_size={batch_size}, buffer={buffer}, rows={rows}: at least 1 each")
        if epoch_size < world:
            raise UserError(f"epoch_size={epoch_size}: at least one image for each of {world} ranks")
        self.images, self.seed, self.bad_files, self.workers = images, seed, bad_files, workers
        self._share = epoch_size // world
        self.batch_size = min(batch_size, self._share)
        self._global_batch = self.batch_size * world
        self._rank_rows = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        self.buffer = max(BUFFER, _BATCHES * self._global_batch) if buffer is None else buffer
        self._sizes = images.sizes()
        self.lanes = rows_of(self._sizes, self._global_batch, rows)
        self._deals: dict[tuple[int, int], list[list[int]]] = {}
        self.epoch, self.start = 0, 0
        self._job = _StreamJob(images.name, seed, crops, images.reading)
        self._keys: Keys[_Key] = Keys([])
        self._pool: Pool[Done] | None = None

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        return self._share // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, start, self.start = self.epoch, self.start, 0
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        remaining, closing = max(0, len(self) - start), threading.Event()
        keys = self._upcoming(epoch, start, closing)
        upcoming = ahead(lambda _: next(keys), range(remaining))
        # If no image of a batch can be read, more images are decoded here.
        more = map(self._job.__getitem__, islice(keys, _PATIENCE))
        count = 0
        try:
            for batch in islice(delivered(chain(self._decoded(upcoming), more), self.bad_files), remaining):
                yield batch
                count += 1
        finally:
            closing.set()
            upcoming.close()
            keys.close()
        if count < remaining:
            raise SourceError(f"{self.images.name}: hardly any of its images can be read")

    def _decoded(self, keys: Iterable[_Key]) -> Iterable[Done]:
        if not self.workers:
            return ahead(self._job.__getitem__, keys)
        self._keys.keys = keys
        if self._pool is None:
            self._pool = Pool(self._job, self._keys, self.workers, persistent=True)
        return self._pool

    def _upcoming(self, epoch: int, start: int, closing: threading.Event) -> Generator[_Key, None, None]:
        """Yield the samples to decode for each batch from ``start`` on, without end."""
        troubles: list[tuple[str, str]] = []
        reported, count = 0, len(self.lanes)
        with ThreadPoolExecutor(OPEN, "crosslevel-read") as pool:
            read = partial(
                self.images.read, troubles=troubles, closing=closing, pool=pool, at_once=max(1, OPEN // count),
                chunk=max(4, min(CHUNK, OPEN * CHUNK // count)),
            )  # fmt: skip
            lanes = [
                Lane(
                    self._read(number, epoch, read, troubles),
                    self.lanes[number],
                    self._rank_rows,
                    self._global_batch,
                    count,
                )
                for number in shared(self.lanes, self._rank_rows)
            ]
            try:
                for _ in range(start):  # in turn, as they are read
                    for lane in lanes:
                        lane.skip()
                while True:
                    samples = [lane.take() for lane in lanes]
                    unreported = troubles[reported:]
                    reported += len(unreported)
                    yield _Key(epoch, samples, unreported)
            except SourceError as error:
                while True:
                    yield _Key(epoch, [], troubles[reported:], str(error))
            finally:
                closing.set()
                pool.shutdown(cancel_futures=True)

    def _read(
        self, lane: int, epoch: int, read: Callable[[Iterable[int]], _Images], troubles: list[tuple[str, str]]
    ) -> _Images:
        """Names and encoded images of one lane, pass after pass."""
        lost, size = False, max(1, self.buffer // len(self.lanes))
        for turn in itertools.count():
            shards = itertools.chain.from_iterable(self.dealt(epoch, turn)) if lost else self.dealt(epoch, turn)[lane]
            any_image = False
            for image in shuffled(read(shards), size, generator(self.seed, epoch, turn, lane, 2)):
                any_image = True
                yield image
            if not any_image and lost:
                raise self.images.unreadable(troubles)
            lost = not any_image  # other lanes' shards may be intact

    def dealt(self, epoch: int, turn: int = 0) -> list[list[int]]:
        """The shards that each lane reads in pass ``turn`` of ``epoch``, in order."""
        if (epoch, turn) not in self._deals:  # cached: all lanes call it, and for many shards it takes a while
            latest = itertools.islice(self._deals.items(), max(0, len(self._deals) - 3), None)
            deal = dealt(self._sizes, self.lanes, generator(self.seed, epoch, turn, 1))
            self._deals = {**dict(latest), (epoch, turn): deal}
        return self._deals[epoch, turn]


_Images = Iterator[tuple[str, bytes]]


class _Key(NamedTuple):
    """A batch to decode: each lane's images, some spare ones, and errors while reading.

    A ``failure`` ends the run.
    """

    epoch: int
    lanes: list[tuple[list[Sample], list[Sample]]]
    errors: list[tuple[str, str]]
    failure: str = ""


@dataclass
class _StreamJob(Dataset[Done]):
    name: str
    seed: int
    crops: Crops
    reading: Reading = USUAL

    def __getitem__(self, key: _Key) -> Done:
        errors = list(key.errors)
        if key.failure:
            return Done(None, errors, key.failure)
        views: dict[int, Tensor] = {}
        used: dict[int, Sample] = {}
        for images, spare in key.lanes:
            used_spares: set[int] = set()
            for image in images:
                for candidate in chain((image,), substitutes(image.number, spare, used_spares)):
                    picture = self._decoded(candidate, errors)
                    if picture is not None:
                        views[image.number] = self._crop(picture, key.epoch, image.number)
                        used[image.number] = candidate
                        break
        if not used:
            return Done(None, errors)
        readable = itertools.cycle(list(used.values()))
        numbers = [image.number for images, _ in key.lanes for image in images]
        for number in numbers:
            if number not in used:  # more images are bad than there are spare ones: this batch's own are repeated
                repeated = used[number] = next(readable)
                picture = decode(bytearray(repeated.data), repeated.path, reading=self.reading)
                views[number] = self._crop(picture, key.epoch, number)
        index = torch.tensor([used[number].number for number in numbers])
        return Done(Batch(torch.stack([views[n] for n in numbers]), torch.full_like(index, -1), index), errors)

    def _crop(self, picture: UInt8[Tensor, "3 H W"], epoch: int, number: int) -> UInt8[Tensor, "V 3 s s"]:
        return self.crops(picture, generator(self.seed, epoch, number))

    def _decoded(self, image: Sample, errors: list[tuple[str, str]]) -> UInt8[Tensor, "3 H W"] | None:
        try:
            return decode(bytearray(image.data), image.path, reading=self.reading)
        except BadImage as error:
            errors.append((error.path, error.reason))
            return None


def shuffled(images: Iterator[tuple[str, bytes]], size: int, rng: torch.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield each image once, drawn at random from a buffer of ``size`` images.

    Args:
        images: name and encoded bytes of each.
        size: of the buffer, in images; at least 1.
        rng: draws the order.

    """
    waiting = list(islice(images, size))
    for image in images:
        i = int(torch.randint(len(waiting), (), generator=rng))
        yield waiting[i]
        waiting[i] = image
    for i in torch.randperm(len(waiting), generator=rng).tolist():
        yield waiting[i]
