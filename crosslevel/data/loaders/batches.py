"""Batches of images: packed once in memory, in random order to train, in order to evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.bad_files import BadFiles, first_of
from crosslevel.data.images import Images, ImageView, InMemoryImages
from crosslevel.data.loaders.order import natural, permuted, share
from crosslevel.data.loaders.partners import Partners
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.data.loaders.workers import Keys, worth_workers
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.rng import generator

Crops = Callable[[UInt8[Tensor, "3 H W"], torch.Generator], UInt8[Tensor, "V 3 s s"]]


class Batch(
    NamedTuple("_Batch", [("images", Tensor), ("labels", Tensor), ("index", Tensor), ("partners", Tensor | None)])
):
    """``images`` (B, 3, S, S) or (B, V, 3, s, s) uint8, ``labels`` (B,) (-1 without), ``index`` (B,) in the source.

    ``partners`` (B, 3, S, S) uint8 are the images that second views are drawn from, if these are not ``images``.
    """

    def __new__(cls, images: Tensor, labels: Tensor, index: Tensor, partners: Tensor | None = None) -> Batch:
        """A batch without partners, unless they are given."""
        return super().__new__(cls, images, labels, index, partners)


class TrainBatches:
    """Every image once an epoch, in random or natural order; usable wherever a DataLoader is.

    ``epoch`` chooses the order, drawn from (``seed``, ``epoch``) alike on all ranks:

    - ``shuffled``: a random permutation, cut into batches of all ranks; each rank takes its part. So 8 ranks, on one
      machine or several, and a single rank have the same batches in the same order. Sources with ``blocks`` are
      shuffled some blocks at a time (`order.permuted`), and each rank takes a consecutive part;
    - ``natural``: the order of the source, as a camera delivers it; it starts at a random image and wraps around at the
      end. Batches are consecutive, and each rank has a consecutive part.

    ``start`` is the first batch to deliver, so that a run resumes within an epoch without reading earlier batches;
    it is 0 again once an iteration has begun.

    ``InMemoryImages`` images come as (B, 3, S, S) by one index operation. Others are decoded in ``workers``
    processes (0: one thread), brought to ``resize`` x ``resize`` pixels if given, and cut into views by
    ``crops``, whose generator is seeded by (``seed``, ``epoch``, image): (B, V, 3, s, s), the same for any
    number of workers. An unreadable image goes to ``bad_files``; another one, drawn from (``seed``, ``epoch``, image),
    is used instead, so that batches keep their size on all ranks.

    With ``partners`` every second view is drawn from another image of the track: a batch of images in memory has both
    images; otherwise the crops are made of both.

    The last, smaller batch is dropped, unless it is the only one.

    Raises:
        SourceError: fewer images than ranks; while iterating, if no image at all can be read.

    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int,
        bad_files: BadFiles,
        crops: Crops | None = None,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        resize: int | None = None,
        order: Literal["shuffled", "natural"] = "shuffled",
        partners: Partners | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank={rank} is not one of the {world} ranks: 0 to {world - 1}")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least 1")
        if order not in ("shuffled", "natural"):
            raise UserError(f"order={order!r}: use shuffled or natural")
        if isinstance(images, InMemoryImages) and (crops or resize not in (None, images.data.shape[-1])):
            raise UserError("crops and resize are for streamed images: views of packed ones are drawn by batch")
        if partners is not None and crops is None and not isinstance(images, InMemoryImages):
            raise UserError("partners of streamed images need crops")
        self._share = len(images) // world
        if not self._share:
            raise SourceError(f"{images.name}: {len(images)} images for {world} ranks: use fewer ranks")
        self.images, self.seed, self.bad_files, self.workers = images, seed, bad_files, workers
        self.batch_size, self.rank, self.world = min(batch_size, self._share), rank, world
        self.epoch, self.start, self.natural = 0, 0, order == "natural"
        self._job, self.partners = _TrainJob(images, seed, crops, resize), partners
        self._keys: Keys[_TrainKey] = Keys([])
        self._pool: Pool[Done] | None = None

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        return self._share // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, start, self.start = self.epoch, self.start, 0
        batches = self.order(epoch).split(self.batch_size)[start : len(self)]
        if isinstance(self.images, InMemoryImages):
            return (_packed_batch(self.images, index, self._partners(epoch, index)) for index in batches)
        keys = [_TrainKey(epoch, index, self._partners(epoch, index)) for index in batches]
        if not self.workers:
            return delivered(ahead(self._job.__getitem__, keys), self.bad_files)
        self._keys.keys = keys
        if self._pool is None:
            self._pool = Pool(self._job, self._keys, self.workers, persistent=True)
        return delivered(self._pool, self.bad_files)

    def _partners(self, epoch: int, index: Tensor) -> Tensor | None:
        return None if self.partners is None else self.partners(epoch, index)

    def order(self, epoch: int) -> Int64[Tensor, " N"]:
        """The images of this rank in the order of ``epoch``."""
        rng, total = generator(self.seed, epoch), len(self.images)
        if self.natural:
            return share(natural(total, rng), self.rank, self.world)
        if self.images.blocks is not None:
            return share(permuted(self.images.blocks, rng), self.rank, self.world)
        permutation = torch.randperm(total, generator=rng)[: self._share * self.world]
        # In each batch the ranks have consecutive parts; joined, they are the same batch for any number of ranks.
        even = len(self) * self.batch_size * self.world
        batched = permutation[:even].view(len(self), self.world, self.batch_size)[:, self.rank].flatten()
        return torch.cat([batched, permutation[even:][self.rank :: self.world]])


class EvalBatches:
    """Every image once, in order, as (B, 3, ``size``, ``size``); unreadable ones go to ``bad_files``.

    The shorter side is resized to ``size`` with antialiasing, then the centre is cut out; ``Batch.index``
    says which images a batch has. ``start`` is the first image, to continue a run. One thread decodes two
    batches ahead, or ``workers`` processes do (None: one process a core if decoding some images shows that all would
    take seconds). Memory does not grow with the number of images.
    """

    def __init__(
        self, images: Images, batch_size: int, size: int, *,
        bad_files: BadFiles, workers: int | None = 0, start: int = 0,
    ) -> None:  # fmt: skip
        if batch_size < 1 or size < 1:
            raise UserError(f"batch_size={batch_size}, size={size}: at least 1 each")
        self.images, self.batch_size, self.size = images, batch_size, size
        self.bad_files, self.workers, self.start = bad_files, workers, start

    def __len__(self) -> int:
        """Batches, if every image can be read (one without any readable image is left out)."""
        return math.ceil(max(0, len(self.images) - self.start) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        total = len(self.images)
        firsts = range(self.start, total, self.batch_size)
        keys = Keys([range(first, min(first + self.batch_size, total)) for first in firsts])
        if isinstance(self.images, InMemoryImages):
            return (self._packed(self.images, key) for key in keys)
        job = _EvalJob(self.images, self.size)
        workers = worth_workers(job, len(self.images)) if self.workers is None else self.workers
        if not workers:
            return delivered(ahead(job.__getitem__, keys), self.bad_files)
        return delivered(Pool(job, keys, workers, persistent=False), self.bad_files)

    def _packed(self, images: InMemoryImages, key: range) -> Batch:
        batch = _packed_batch(images, torch.arange(key.start, key.stop))
        return batch._replace(images=fit(batch.images, self.size))


def pack(
    images: Images,
    size: int,
    *,
    bad_files: BadFiles,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InMemoryImages:
    """Decode all images into one tensor of ``size`` x ``size`` pixels, as ``fit`` does; bad ones are dropped.

    ``workers`` are processes, as `EvalBatches` has them.
    ``progress`` is called with the images done and their total. Images that are already packed at this
    size are returned as they are.

    Raises:
        SourceError: fewer than 2 images can be read.

    """
    if isinstance(images, InMemoryImages) and images.data.shape[-2:] == (size, size):
        images.check()
        return images
    total = len(images)
    data = torch.empty((total, images.channels, size, size), dtype=torch.uint8)
    indices, count = list[Tensor](), 0
    for batch in EvalBatches(images, 256, size, workers=workers, bad_files=bad_files):
        data[count : count + len(batch.index)] = batch.images
        count += len(batch.index)
        indices.append(batch.index)
        if progress:
            progress(int(batch.index[-1]) + 1, total)
    if count < 2:
        number = f"only {count} of {total} can be read{bad_files.first}"
        raise SourceError(f"{images.name}: needs at least 2 images, {number}")
    if progress:
        progress(total, total)
    index = torch.cat(indices)
    return InMemoryImages.of(data[:count], images if count == total else ImageView(images, index))


def fit(image: UInt8[Tensor, "*B C H W"], size: int) -> UInt8[Tensor, "*B C size size"]:
    """Resize the shorter side to ``size`` (bilinear, antialiased), then cut out the centre; unchanged if it fits."""
    if image.shape[-2:] == (size, size):
        return image
    if min(image.shape[-2:]) != size:
        image = tvf.resize(image, [size], antialias=True)
    cropped: Tensor = tvf.center_crop(image, [size, size])
    return cropped


class Done(NamedTuple):
    """A worker's result; without a batch, ``failure`` ends the run if it is not empty."""

    batch: Batch | None
    errors: list[tuple[str, str]]
    failure: str = ""


@dataclass
class _EvalJob(Dataset[Done]):
    images: Images
    size: int

    def __getitem__(self, key: range) -> Done:
        pictures, labels, index, errors = [], [], [], []
        for i in key:
            try:
                picture, label = self.images[i]
            except BadImage as error:
                errors.append((error.path, error.reason))
                continue
            pictures.append(fit(picture, self.size))
            labels.append(label)
            index.append(i)
        if not index:
            return Done(None, errors)
        return Done(Batch(_stacked(pictures), torch.tensor(labels), torch.tensor(index)), errors)


class _TrainKey(NamedTuple):
    """A batch of an epoch: its images, and the images of their second views."""

    epoch: int
    requested: Tensor
    partners: Tensor | None


@dataclass
class _TrainJob(Dataset[Done]):
    images: Images
    seed: int
    crops: Crops | None
    resize: int | None

    def __getitem__(self, key: _TrainKey) -> Done:
        epoch, requested, partners = key
        pictures, labels, index, errors = [], [], [], list[tuple[str, str]]()
        for position, i in enumerate(requested.tolist()):
            readable = self._readable(epoch, i, errors)
            if readable is None:
                failure = f"none of its {len(self.images)} images can be read{first_of(dict(errors))}"
                return Done(None, errors, f"{self.images.name}: {failure}")
            picture, label, j = readable
            picture = picture if self.resize is None else fit(picture, self.resize)
            # Crops stay as they lie in memory, (V, s, s, 3): the device turns them faster than a worker.
            cut = None if self.crops is None else self.crops(picture, generator(self.seed, epoch, i))
            if cut is not None and partners is not None and partners[position] != i == j:
                self._exchange(cut, int(partners[position]), generator(self.seed, epoch, i), errors)
            pictures.append(picture if cut is None else cut.movedim(1, -1))
            labels.append(label)
            index.append(j)
        if len({picture.shape for picture in pictures}) > 1:
            return Done(None, errors, f"{self.images.name}: the images differ in size: give resize or crops")
        stacked = _stacked(pictures) if self.crops is None else _stacked(pictures).movedim(-1, 2)
        return Done(Batch(stacked, torch.tensor(labels), torch.tensor(index)), errors)

    def _exchange(self, cut: Tensor, partner: int, rng: torch.Generator, errors: list[tuple[str, str]]) -> None:
        """Replace every second crop by the partner's, with the same random numbers, if the partner is readable."""
        try:
            picture, _ = self.images[partner]
        except BadImage as error:
            errors.append((error.path, error.reason))
            return
        assert self.crops is not None
        cut[1::2] = self.crops(picture if self.resize is None else fit(picture, self.resize), rng)[1::2]

    def _readable(self, epoch: int, i: int, errors: list[tuple[str, str]]) -> tuple[Tensor, int, int] | None:
        """Image i with its label and number, or a substitute if it is unreadable; None if no image can be read."""
        for j in chain((i,), self._substitutes(epoch, i)):
            try:
                return *self.images[j], j
            except BadImage as error:
                errors.append((error.path, error.reason))
        return None

    def _substitutes(self, epoch: int, i: int) -> Iterator[int]:
        """Random images first, then all images in turn."""
        count = len(self.images)
        # Another stream than that of the crops, whose random numbers must not depend on a bad file.
        yield from torch.randint(count, (64,), generator=generator(self.seed, epoch, i, 1)).tolist()
        yield from range(count)


def _stacked(pictures: list[Tensor]) -> Tensor:
    """One contiguous tensor, whatever the pictures' memory layout; in a worker, in shared memory."""
    shape = (len(pictures), *pictures[0].shape)
    if get_worker_info() is None:
        stacked = torch.empty(shape, dtype=torch.uint8)
    else:
        # Private memory would be copied once more on its way to the main process.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        stacked = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    for row, picture in zip(stacked, pictures, strict=True):
        row.copy_(picture)
    return stacked


def _packed_batch(images: InMemoryImages, index: Tensor, partners: Tensor | None = None) -> Batch:
    labels = torch.full_like(index, -1) if images.labels is None else images.labels[index]
    return Batch(images.batch(index), labels, index, None if partners is None else images.batch(partners))


def delivered(results: Iterable[Done], bad_files: BadFiles) -> Iterator[Batch]:
    """Yield the batches, and record the images that could not be read."""
    for done in results:
        for path, reason in done.errors:
            bad_files.add(path, reason)
        if done.failure:
            raise SourceError(done.failure)
        if done.batch is not None:
            yield done.batch
