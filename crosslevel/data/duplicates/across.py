"""Images of one collection that another has as well, such as test images among those to train on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from crosslevel.data.duplicates.detect import Kind, duplicate_pairs, tracks
from crosslevel.data.duplicates.scan import ScanResult
from crosslevel.data.duplicates.sets import graded, with_exact

_GRADED = 8  # copies in the first collection that one of the second is compared with


class Match(NamedTuple):
    """Image ``own`` of the first scan is image ``other`` of the second, or nearly."""

    own: int
    other: int
    kind: Kind
    distance: float


def matches(own: ScanResult, other: ScanResult) -> list[Match]:
    """Of each image of ``other`` that is a copy or a near-duplicate of some in ``own``, the closest one."""
    count = len(own.numbers)
    both = ScanResult(*(torch.cat(columns) for columns in zip(own, other, strict=True)))
    pairs = with_exact(both, duplicate_pairs(both.pictures, count))
    owner = tracks(len(both.numbers), pairs.of(pairs.kind <= Kind.EDITED).images)
    result: dict[int, Match] = {}
    shared = set(owner[:count].tolist()) & set(owner[count:].tolist())
    held: dict[int, list[int]] = {name: [] for name in shared}
    for i, name in enumerate(owner[:count].tolist()):
        if name in shared:
            held[name].append(i)
    compared: list[tuple[int, int]] = []
    for j, name in enumerate(owner[count:].tolist()):
        if name in shared:
            candidates = sorted(held[name], key=lambda i: bool(both.content[i] != other.content[j]))[:_GRADED]
            compared += [(count + j, i) for i in candidates]
    index = torch.tensor(compared, dtype=torch.long).view(-1, 2)
    for (place, i), grade in zip(compared, graded(both, index), strict=True):
        match = Match(i, place - count, *grade)
        result[match.other] = min(result.get(match.other, match), match, key=lambda match: match[2:])
    near = pairs.of((pairs.kind == Kind.NEAR) & (pairs.images[:, 0] < count) & (pairs.images[:, 1] >= count))
    order = near.distance.argsort(stable=True)
    for (i, j), distance in zip(near.images[order].tolist(), near.distance[order].tolist(), strict=True):
        result.setdefault(j - count, Match(i, j - count, Kind.NEAR, distance))
    return [result[j] for j in sorted(result)]
