"""Images that two collections have in common, such as test images among the training images."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crosslevel.data.duplicates.detect import Kind, duplicate_pairs, tracks
from crosslevel.data.duplicates.scan import ScanResult
from crosslevel.data.duplicates.sets import graded, with_exact

_GRADED = 8  # candidates in the first collection for each image of the second


class Match(NamedTuple):
    """Image ``first`` of one scan and image ``second`` of the other are the same, or nearly."""

    first: int
    second: int
    kind: Kind
    distance: float


def matches(first: ScanResult, second: ScanResult) -> list[Match]:
    """For each image of ``second`` that has copies or near-duplicates in ``first``, the closest one."""
    count = len(first.numbers)
    joined = ScanResult(*(torch.cat(columns) for columns in zip(first, second, strict=True)))
    pairs = with_exact(joined, duplicate_pairs(joined.pictures, count))
    owner = tracks(len(joined.numbers), pairs.of(pairs.kind <= Kind.EDITED).images)
    result: dict[int, Match] = {}
    shared = set(owner[:count].tolist()) & set(owner[count:].tolist())
    candidates_of: dict[int, list[int]] = {name: [] for name in shared}
    for i, name in enumerate(owner[:count].tolist()):
        if name in shared:
            candidates_of[name].append(i)
    compared: list[tuple[int, int]] = []
    for j, name in enumerate(owner[count:].tolist()):
        if name in shared:
            candidates = sorted(candidates_of[name], key=lambda i: bool(joined.content[i] != second.content[j]))[
                :_GRADED
            ]
            compared += [(count + j, i) for i in candidates]
    index = torch.tensor(compared, dtype=torch.long).view(-1, 2)
    for (row, i), grade in zip(compared, graded(joined, index), strict=True):
        match = Match(i, row - count, *grade)
        result[match.second] = min(result.get(match.second, match), match, key=lambda match: match[2:])
    near = pairs.of((pairs.kind == Kind.NEAR) & (pairs.images[:, 0] < count) & (pairs.images[:, 1] >= count))
    order = near.distance.argsort(stable=True)
    for (i, j), distance in zip(near.images[order].tolist(), near.distance[order].tolist(), strict=True):
        result.setdefault(j - count, Match(i, j - count, Kind.NEAR, distance))
    return [result[j] for j in sorted(result)]
