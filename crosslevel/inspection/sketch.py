"""Sketches: counts of a part of a collection, which can be merged to those of the whole, on any machines.

A sketch of many images is small: counts, 16 bytes (checksum and number) for each image, and 3 KB for each image of the
sample.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.cluster import Opened
from crosslevel.data.duplicates.scan import ScanResult, content_of, glance
from crosslevel.data.images import Images
from crosslevel.data.loaders.records import mapped
from crosslevel.utils.errors import BadImage, SourceError

_AT_A_TIME = 512
_COPY = re.compile(r"(?:#(?:t=[\d.]+|\d+))+$")  # a suffix that marks a copy, an object or a frame


@dataclass
class Sketch:
    """Counts of some images; sketches of disjoint parts can be merged in any order.

    ``looked_at`` counts all read images, unreadable ones too; ``width``, ``height`` and ``shorter_side`` count the
    images of each size in pixels, ``formats`` those of each file extension. ``content`` are checksums of the readable
    images, ``numbers`` their numbers in the source, ``sample`` the records of the sample; ``broken`` has path and
    reason of each unreadable image.
    """

    looked_at: int = 0
    width: Counter[int] = field(default_factory=Counter)
    height: Counter[int] = field(default_factory=Counter)
    shorter_side: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    content: list[Int64[Tensor, " n"]] = field(default_factory=list)
    numbers: list[Int64[Tensor, " n"]] = field(default_factory=list)
    sample: list[ScanResult] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, scanned: ScanResult, paths: Sequence[str]) -> Sketch:
        """The sketch of a completely scanned source; ``paths`` are those of its images. It lists no broken images."""
        sketch = cls(len(paths), content=[scanned.content], numbers=[scanned.numbers], sample=[scanned])
        sketch._count(scanned.shape, (paths[i] for i in scanned.numbers.tolist()))
        return sketch

    def _count(self, shape: Int64[Tensor, "n 2"], names: Iterable[str]) -> None:
        for counter, sides in (
            (self.height, shape[:, 0]), (self.width, shape[:, 1]), (self.shorter_side, shape.amin(1)),
        ):  # fmt: skip
            counter.update(sides.tolist())
        suffixes = (os.path.splitext(_COPY.sub("", name))[1].lower().lstrip(".") for name in names)
        self.formats.update(suffix or "not in the name" for suffix in suffixes)

    def merge(self, other: Sketch) -> None:
        """Add the counts of another sketch; its tensors are copied, since each tensor of a worker holds a file open."""
        self.looked_at += other.looked_at
        for name in ("width", "height", "shorter_side", "formats"):
            getattr(self, name).update(getattr(other, name))
        self.content += [part.clone() for part in other.content]
        self.numbers += [part.clone() for part in other.numbers]
        self.sample += [ScanResult(*(column.clone() for column in part)) for part in other.sample]
        self.broken += other.broken

    @property
    def readable(self) -> int:
        """How many images can be read."""
        return sum(map(len, self.content))

    def exact_copies(self) -> list[list[int]]:
        """The sets of images with equal pixels: their numbers in ascending order, the sets by their first."""
        numbers, content = torch.cat(self.numbers), torch.cat(self.content)
        order = numbers.argsort()
        order = order[content[order].argsort(stable=True)]
        counts = content[order].unique_consecutive(return_counts=True)[1]
        several = numbers[order[(counts > 1).repeat_interleave(counts)]]
        return sorted(part.tolist() for part in several.split(counts[counts > 1].tolist()))


def sketch(
    images: Images,
    sampled: Int64[Tensor, " n"],
    bad_files: BadFiles,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
    elsewhere: Opened | None = None,
    at_once: int = _AT_A_TIME,
) -> tuple[Sketch, ScanResult]:
    """Read all images, and keep the records of the sample.

    Args:
        images: the source.
        sampled: the numbers of the sample, in ascending order.
        bad_files: collects unreadable images.
        workers: processes that decode, as `EvalBatches` has them.
        progress: called with the number of images read.
        elsewhere: the same images for the machines of a cluster, each of which sends back a sketch of its part.
        at_once: images of a part.

    Returns:
        the sketch of all images, and the records of the sample in its order, numbered by their index in ``sampled``.

    Raises:
        SourceError: fewer than 2 images of the sample can be read.

    """
    total, combined = len(images), Sketch()
    keys = [range(first, min(first + at_once, total)) for first in range(0, total, at_once)]
    job_of = partial(Sketching, sampled=sampled)
    for key, part in zip(keys, mapped(images, job_of, keys, workers, elsewhere), strict=True):
        for path, reason in part.broken:
            bad_files.add(path, reason)
        part.broken = []
        combined.merge(part)
        progress(key.stop)
        if key.stop > int(sampled[-1]) and sum(len(record.numbers) for record in combined.sample) < 2:
            raise SourceError(
                f"{images.name}: fewer than 2 of {len(sampled)} sampled images can be read{bad_files.first}"
            )
    joined = ScanResult(*map(torch.cat, zip(*combined.sample, strict=True)))
    combined.sample = []
    return combined, joined._replace(numbers=torch.searchsorted(sampled, joined.numbers))


@dataclass
class Sketching(Dataset[Sketch]):
    """A data set whose items are the sketches of ranges of images."""

    images: Images
    sampled: Int64[Tensor, " n"]

    def __getitem__(self, key: range) -> Sketch:
        result, first = Sketch(len(key)), int(torch.searchsorted(self.sampled, key.start))
        inside = set(self.sampled[first : first + len(key)].tolist())
        shapes, content, numbers, glances = [], list[int](), list[int](), []
        for i in key:
            try:
                image = self.images[i][0]
            except BadImage as error:
                result.broken.append((error.path, error.reason))
                continue
            shapes.append(image.shape[1:])
            content.append(content_of(image))
            numbers.append(i)
            if i in inside:
                glances.append((glance(image, content[-1]), i))
        shape = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
        result._count(shape, (self.images.paths[i] for i in numbers))
        result.content = [torch.tensor(content, dtype=torch.int64)]
        result.numbers = [torch.tensor(numbers, dtype=torch.int64)]
        if glances:
            columns = zip(*((*one, torch.tensor(i)) for one, i in glances), strict=True)
            result.sample = [ScanResult(*map(torch.stack, columns))]
        return result
