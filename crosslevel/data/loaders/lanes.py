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
"""Rows of a lane in each batch of all ranks: a rank whose own batch has at least as many reads no images for others."""

_MOST = 256  # the most lanes; each has a file open
_UNEVEN = 1.1  # a lane's bytes for each of its rows, as a multiple of the mean
_SPARE = 16  # spare images of a batch, or 4 of each lane, in case some of its own cannot be read


class Sample(NamedTuple):
    """An encoded image, and its number in the epoch."""

    number: int
    path: str
    data: bytes


def rows_of(sizes: Sequence[int], batch: int, rows: int = ROWS) -> list[range]:
    """Divide the rows of a batch of all ranks among lanes: as many as can have ``rows`` rows or more and even shares.

    Args:
        sizes: the shards' bytes, or 1 each if unknown.
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
    """The shards of each lane in random order, dealt largest first, each to the lane with the least for its rows."""
    order = torch.randperm(len(sizes), generator=rng).tolist()
    lanes = [(0.0, rank) for rank in range(len(spans))]
    lane_numbers = torch.randperm(len(spans), generator=rng).tolist()
    lane_shards: list[list[int]] = [[] for _ in spans]
    # Sizes within a tenth are alike: which of them meet in a lane is random.
    for rank in sorted(range(len(order)), key=lambda rank: -round(8 * math.log2(max(1, sizes[order[rank]])))):
        load, lane = heapq.heappop(lanes)
        lane_shards[lane_numbers[lane]].append(rank)
        heapq.heappush(lanes, (load + sizes[order[rank]] / len(spans[lane_numbers[lane]]), lane))
    return [[order[rank] for rank in sorted(ranks)] for ranks in lane_shards]


class Lane:
    """A stream of images that fills ``span``, the lane's rows, in each batch of all ranks.

    Args:
        images: names and encoded images, without end.
        span: the lane's rows.
        rank_rows: this rank's rows of the batch.
        batch: images of all ranks.
        count: number of lanes.

    """

    def __init__(
        self, images: Iterator[tuple[str, bytes]], span: range, rank_rows: range, batch: int, count: int
    ) -> None:
        size = len(span)
        self._size, self._spare, self._rank_slice = size, max(4, _SPARE // count), _common(span, rank_rows)
        numbers = (step * batch + row for step in itertools.count() for row in span)
        self._images = map(lambda number, image: Sample(number, *image), numbers, images)
        self._waiting: list[Sample] = []

    def skip(self) -> None:
        """Skip one batch."""
        for _ in islice(self._images, self._size):
            pass

    def take(self) -> tuple[list[Sample], list[Sample]]:
        """This rank's images of the next batch, and some later ones in case they cannot be read."""
        self._waiting += islice(self._images, self._size + self._spare - len(self._waiting))
        images, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return images[self._rank_slice], list(self._waiting)


def _common(span: range, rank_rows: range) -> slice:
    return slice(max(0, rank_rows.start - span.start), max(0, rank_rows.stop - span.start))


def shared(spans: Sequence[range], rank_rows: range) -> list[int]:
    """The lanes that fill rows of this rank."""
    return [lane for lane, span in enumerate(spans) if span.start < rank_rows.stop and span.stop > rank_rows.start]


def substitutes(number: int, spare: Sequence[Sample], used: set[int]) -> Iterator[Sample]:
    """Yield substitutes for an unreadable image, each used once; ``used`` collects their indices in ``spare``.

    The first one depends on the image's ``number`` alone, since ranks that share a lane do not see each other's.
    """
    for step in range(len(spare)):
        position = (number + step) % len(spare)
        if position not in used:
            used.add(position)
            yield spare[position]
