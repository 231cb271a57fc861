"""Pairs of duplicates and near-duplicates among small pictures, each with its kind and distance, and their tracks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from crosslevel.data.duplicates.alignment import agreement
from crosslevel.data.duplicates.descriptor import alike, difference, mirrored, outline
from crosslevel.data.duplicates.hashes import near_pairs, perceptual_hash
from crosslevel.data.duplicates.neighbours import neighbours

RADIUS = 8  # of the 64 bits of a hash
COPY = 0.02  # root mean square difference of copies, unshifted, of the range of a pixel
NEAR = 0.05  # of near-duplicates, at the best shift
NOISE = 0.008  # from here down two pictures are one, whatever crowd they stand in
EDITED = 0.96  # correlation of edges
COLOURS = 0.9  # correlation of colours, of edited copies
CROWD = 32  # neighbours that say how alike the images around one are
IN_A_CROWD, EDITED_IN_A_CROWD = 0.3, 0.25  # a duplicate is at most this far, of the distance of the crowd
MIRRORED = 0.8  # correlation of outlines from which on a mirrored pair is compared
_COMPARED, _ALIGNED = 8, 3  # nearest neighbours whose pixels, and whose edges, are compared
_LINKED = 2000  # images of a track up to which all are compared with all
_PART = 256  # pictures at a time

Pictures = UInt8[Tensor, "N 3 32 32"]
Index = Int64[Tensor, "P 2"]


class Kind(IntEnum):
    """How a pair belongs together, the closest first."""

    EXACT = 0
    COPY = 1
    EDITED = 2
    NEAR = 3


class Pairs(NamedTuple):
    """Pairs (i, j), i < j, each once: not all there are, but enough to connect each set.

    ``distance`` is 0 for equal pictures, of an edited copy 1 less the correlation of edges, of the others the root mean
    square difference of pixels, 0 to 1, at the best small shift.
    """

    index: Index
    kind: Int64[Tensor, " P"]
    distance: Float[Tensor, " P"]

    def of(self, chosen: Bool[Tensor, " P"]) -> Pairs:
        """The ``chosen`` pairs."""
        return Pairs(*(column[chosen] for column in self))


def duplicate_pairs(pictures: Pictures) -> Pairs:
    """Copies, edited copies and near-duplicates, by pixels alone.

    Candidates are the nearest by their `outline`, mirrored too, and pictures with nearly the same perceptual hash. A
    copy differs hardly in any pixel; a near-duplicate by little after a small shift; an edited copy has the edges and
    colours of its original after brightness, contrast, colour, crop and mirror are taken out.

    Where look-alikes abound, as among product shots of one kind, as little is no evidence: a pair has to be far closer
    than what is around each of the two, the neighbours of rank 17 to 32 (after Lowe 2004, section 7.1, whose second
    neighbour would be another copy here). No pixel tells look-alikes of one distance from a film whose frames all
    differ by as much as they do: neither are near-duplicates here.
    """
    owner, first = _distinct(pictures)
    found = _pairs(pictures[first]) if len(first) > 1 else _none()
    again = torch.ones(len(pictures), dtype=torch.bool)
    again[first] = False
    same = torch.stack([first[owner[again]], again.nonzero()[:, 0]], dim=1)
    ends = first[found.index].sort(dim=1).values
    return Pairs(
        torch.cat([same, ends]),
        torch.cat([torch.full((len(same),), Kind.COPY.value), found.kind]),
        torch.cat([torch.zeros(len(same)), found.distance]),
    )


def _none() -> Pairs:
    return Pairs(torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))


def _distinct(pictures: Pictures) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " U"]]:
    """Which of the different pictures each one is, and the first of each."""
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    owner = torch.empty(len(pictures), dtype=torch.long)
    for i, picture in enumerate(pictures.contiguous().numpy()):
        number = numbers.setdefault(hashlib.blake2b(picture, digest_size=16).digest(), len(first))
        if number == len(first):
            first.append(i)
        owner[i] = number
    return owner, torch.tensor(first)


def _pairs(pictures: Pictures) -> Pairs:
    outlines = in_parts(outline, pictures)
    crowd = _Crowd(pictures, outlines)
    close = crowd.nearest(_COMPARED)
    near = _near(pictures, close[alike(pictures, close, NEAR)], crowd)
    hashes = in_parts(perceptual_hash, pictures)
    hashed = near_pairs(hashes, RADIUS, tracks(len(pictures), near.index))
    near = _joined(near, _near(pictures, hashed[alike(pictures, hashed, NEAR)], crowd))
    known = tracks(len(pictures), near.of(near.kind == Kind.COPY).index)
    aligned = torch.cat([crowd.nearest(_ALIGNED), hashed]).unique(dim=0)
    aligned = aligned[known[aligned[:, 0]] != known[aligned[:, 1]]]
    edited = _edited(pictures, aligned, crowd, mirror=False)
    turned = _edited(pictures, _mirrored(outlines), crowd, mirror=True)
    return _joined(near, edited, turned)


def _near(pictures: Pictures, index: Index, crowd: _Crowd) -> Pairs:
    """Those that are copies or near-duplicates, of pairs that are alike."""
    shifted, apart = difference(pictures, index), difference(pictures, index, reach=0)
    limit = IN_A_CROWD * crowd.distance(index, lambda pairs: difference(pictures, pairs))
    kind = torch.where(apart <= COPY, Kind.COPY.value, Kind.NEAR.value)
    return Pairs(index, kind, shifted).of((apart <= NOISE) | (shifted <= limit))


def _edited(pictures: Pictures, index: Index, crowd: _Crowd, mirror: bool) -> Pairs:
    """Those that are edited copies."""
    i, j = index.T
    edges, colours = agreement(pictures[i], pictures[j].flip(3) if mirror else pictures[j])
    good = (edges >= EDITED) & (colours >= COLOURS)
    index, edges = index[good], edges[good]

    def apart(pairs: Index) -> Tensor:
        # A root: distances between images, as those of pixels are, and not their squares.
        return (1 - agreement(pictures[pairs[:, 0]], pictures[pairs[:, 1]]).edges).clamp(min=0).sqrt()

    limit = EDITED_IN_A_CROWD * crowd.distance(index, apart)
    distance = (1 - edges).clamp(min=0)
    return Pairs(index, torch.full((len(index),), Kind.EDITED.value), distance).of(distance.sqrt() <= limit)


def _mirrored(outlines: Float[Tensor, "N 64"]) -> Index:
    """Pairs whose one outline is close to the other's mirror image."""
    values, places = neighbours(mirrored(outlines), outlines, 3)
    row = torch.arange(len(outlines)).unsqueeze(1).expand_as(places)
    kept = (values >= MIRRORED) & (places != row) & (places >= 0)
    return _once(row[kept], places[kept])


def _joined(*parts: Pairs) -> Pairs:
    """All pairs, each once: the first part that has it counts, and a copy before all."""
    index, kind, distance = (torch.cat(columns) for columns in zip(*parts, strict=True))
    unique, owner = index.unique(dim=0, return_inverse=True)
    order = kind.where(kind != Kind.NEAR, Kind.NEAR.value).argsort(stable=True).flip(0)
    first = torch.empty(len(unique), dtype=torch.long)
    first[owner[order]] = order  # written last is the closest kind
    return Pairs(unique, kind[first], distance[first])


class _Crowd:
    """The neighbours of each picture, and how far those are that surround it."""

    def __init__(self, pictures: Pictures, outlines: Float[Tensor, "N 64"]) -> None:
        count = len(pictures)
        # Of few images a third: the others may be copies of it, or another thing.
        self.rank = min(CROWD, (count - 1) // 3) if count >= 8 else 0
        places = neighbours(outlines, outlines, max(self.rank, min(_COMPARED, count - 1)) + 1).places
        own = places == torch.arange(count).unsqueeze(1)
        # Where many are equal it may itself be missing: then the last one goes.
        own[~own.any(1), -1] = True
        self.places = places[~own].view(count, -1)

    def nearest(self, k: int) -> Index:
        """Each picture with its k nearest, each pair once."""
        places = self.places[:, :k]
        row = torch.arange(len(places)).unsqueeze(1).expand_as(places)
        return _once(row[places >= 0], places[places >= 0])

    def distance(self, index: Index, measure: Callable[[Index], Tensor]) -> Float[Tensor, " P"]:
        """How far what surrounds a pair is, of the closer side: infinite where there are too few images to say."""
        if not self.rank or not len(index):
            return torch.full((len(index),), torch.inf)
        asked, place = index.unique(return_inverse=True)
        ranks = torch.linspace(self.rank // 2, self.rank - 1, 5).long().unique()
        others = self.places[asked][:, ranks]
        pairs = torch.stack([asked.unsqueeze(1).expand_as(others), others.clamp(min=0)], dim=2).flatten(0, 1)
        apart = measure(pairs).view_as(others).masked_fill(others < 0, torch.inf)
        return apart.median(1).values[place].min(1).values


def _once(i: Int64[Tensor, " P"], j: Int64[Tensor, " P"]) -> Index:
    return torch.stack([torch.minimum(i, j), torch.maximum(i, j)], dim=1).unique(dim=0)


def in_parts(function: Callable[[Tensor], Tensor], pictures: Pictures) -> Tensor:
    """What ``function`` makes of each picture, of some at a time."""
    first = function(pictures[:_PART])
    result = first.new_empty(len(pictures), *first.shape[1:])
    # Kept one by one, small results would lie between what has been freed, and hold its pages: gigabytes.
    for part, place in zip(pictures.split(_PART), result.split(_PART), strict=True):
        place.copy_(function(part))
    return result


def tracks(count: int, index: Index) -> Int64[Tensor, " count"]:
    """The track of each image: images that pairs connect, directly or over others, share one; numbered from 0."""
    i, j = index.cpu().numpy().T
    graph = coo_array(([True] * len(i), (i, j)), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()
