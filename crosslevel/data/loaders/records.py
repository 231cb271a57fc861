"""One record for every readable image: the result of a function, such as the image's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.data.loaders.workers import Keys, worth_workers
from crosslevel.utils.errors import BadImage

if TYPE_CHECKING:
    from crosslevel.data.cluster import Opened

Record = TypeVar("Record", bound=tuple[Any, ...])
Result = TypeVar("Result")


class Records(NamedTuple, Generic[Record]):
    """The records of the images ``numbers``, joined to one record whose tensors have a first dimension B."""

    numbers: Int64[Tensor, " B"]
    columns: Record


def records(
    images: Images,
    find: Callable[[UInt8[Tensor, "3 H W"]], Record],
    batch_size: int,
    *,
    bad_files: BadFiles,
    workers: int | None = None,
    elsewhere: Opened | None = None,
) -> Iterator[Records[Record]]:
    """Apply ``find`` to each image, in order; it returns a named tuple of tensors, of the same shapes for all images.

    No label is read. Images that cannot be read go to ``bad_files``, and have no record. ``workers`` is as in
    `EvalBatches`. ``elsewhere`` are the same images for the machines of a cluster, which then do the work.
    """
    total = len(images)
    keys = [range(first, min(first + batch_size, total)) for first in range(0, total, batch_size)]
    for part in mapped(images, partial(_Job, find=find), keys, workers, elsewhere):
        for path, reason in part.errors:
            bad_files.add(path, reason)
        if part.records is not None:
            yield part.records


def mapped(
    images: Images,
    job_of: Callable[[Images], Dataset[Result]],
    keys: Sequence[range],
    workers: int | None = None,
    elsewhere: Opened | None = None,
) -> Iterable[Result]:
    """Run a job of the images on each key, in order: in this process, in ``workers``, or on a cluster."""
    if elsewhere is not None:
        return elsewhere.mapped(job_of, keys)
    job = job_of(images)
    workers = worth_workers(job, len(images)) if workers is None else workers
    return Pool(job, Keys(list(keys)), workers, persistent=False) if workers else ahead(job.__getitem__, keys)


class _Part(NamedTuple):
    """A worker's result."""

    records: Records[Any] | None
    errors: list[tuple[str, str]]


@dataclass
class _Job(Dataset[_Part]):
    images: Images
    find: Callable[[Tensor], Any]

    def __getitem__(self, key: range) -> _Part:
        rows, numbers, errors = [], [], []
        for i in key:
            try:
                image = self.images[i][0]
            except BadImage as error:
                errors.append((error.path, error.reason))
                continue
            rows.append(self.find(image))
            numbers.append(i)
        if not rows:
            return _Part(None, errors)
        columns = type(rows[0])(*map(torch.stack, zip(*rows, strict=True)))
        return _Part(Records(torch.tensor(numbers), columns), errors)
