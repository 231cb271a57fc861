"""Lanes: each fills the same rows of every batch from its own shards, for any number of ranks alike."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

ROWS = 16
"""Of a batch of all ranks that are one lane's: a rank whose own batch has that many reads no image for others."""

_MOST = 256  # lanes, each of which has a file open
_UNEVEN = 1.1  # a lane's bytes for each of its rows, as a multiple of the mean
_SPARE = 16  # further images that a batch takes along, or 4 of each lane, in case some of its own cannot be read


class Sample(NamedTuple):
    """An encoded image, and its number in the epoch."""

    number: int
    path: str
    data: bytes


def rows_of(sizes: Sequence[int], batch: int, rows: int = ROWS) -> list[range]:
    """Divide the rows of a batch of all ranks among lanes: as many as can have ``rows`` rows or more and even shares.

    Args:
        sizes: the shards' bytes, or 1 each where nobody knows.
        batch: images of all ranks.
        rows: of one lane, at least.

    """
    even = int(_UNEVEN * sum(sizes) / max(1, *sizes)) if len(sizes) > 1 else 1
    for count in range(min(len(sizes), batch // rows, even, _MOST), 1, -1):
        spans = [range(i * batch // count, (i + 1) * batch // count) for i in range(count)]
        loads = [sum(sizes[shard] for shard in shards) for shards in dealt(sizes, spans, torch.Generator())]
        if max(load / len(span) for load, span in zip(loads, spans, strict=True)) <= _UNEVEN * sum(sizes) / batch:
            return spans
    return [range(batch)]


def dealt(sizes: Sequence[int], spans: Sequence[range], rng: torch.Generator) -> list[list[int]]:
    """The shards of each lane in random order: the largest first, each to the lane that has least for its rows."""
    order = torch.randperm(len(sizes), generator=rng).tolist()
    lanes = [(0.0, place) for place in range(len(spans))]
    named = torch.randperm(len(spans), generator=rng).tolist()
    found: list[list[int]] = [[] for _ in spans]
    # Sizes within a tenth are alike: which of them meet in a lane is random.
    for place in sorted(range(len(order)), key=lambda place: -round(8 * math.log2(max(1, sizes[order[place]])))):
        load, lane = heapq.heappop(lanes)
        found[named[lane]].append(place)
        heapq.heappush(lanes, (load + sizes[order[place]] / len(spans[named[lane]]), lane))
    return [[order[place] for place in sorted(places)] for places in found]


class Lane:
    """What fills ``span``, the lane's rows, in one batch of all ranks after another.

    Args:
        images: names and encoded images, without end.
        span: the lane's rows.
        own: those of all rows that this rank has.
        batch: images of all ranks.
        count: of all lanes.

    """

    def __init__(self, images: Iterator[tuple[str, bytes]], span: range, own: range, batch: int, count: int) -> None:
        size = len(span)
        self._size, self._spare, self._kept = size, max(4, _SPARE // count), _common(span, own)
        numbers = (step * batch + row for step in itertools.count() for row in span)
        self._images = map(lambda number, image: Sample(number, *image), numbers, images)
        self._waiting: list[Sample] = []

    def skip(self) -> None:
        """Leave one batch out."""
        for _ in islice(self._images, self._size):
            pass

    def take(self) -> tuple[list[Sample], list[Sample]]:
        """This rank's images of the next batch, and some later ones in case they cannot be read."""
        self._waiting += islice(self._images, self._size + self._spare - len(self._waiting))
        images, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return images[self._kept], list(self._waiting)


def _common(span: range, own: range) -> slice:
    return slice(max(0, own.start - span.start), max(0, own.stop - span.start))


def shared(spans: Sequence[range], own: range) -> list[int]:
    """The lanes that have rows of this rank."""
    return [lane for lane, span in enumerate(spans) if span.start < own.stop and span.stop > own.start]


def in_place_of(number: int, spare: Sequence[Sample], taken: set[int]) -> Iterator[Sample]:
    """Yield replacements of an unreadable image, each used once; ``taken`` notes the places in ``spare`` that are used.

    The first one depends on the image's ``number`` alone, since ranks that share a lane do not see each other's.
    """
    for step in range(len(spare)):
        place = (number + step) % len(spare)
        if place not in taken:
            taken.add(place)
            yield spare[place]
