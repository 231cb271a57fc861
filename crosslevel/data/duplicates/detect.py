"""Pairs of duplicates and near-duplicates among small pictures, each with its kind and distance, and their tracks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from crosslevel.data.duplicates.alignment import Agreement, agreement
from crosslevel.data.duplicates.coarse import blocks, halves, maybe_alike, maybe_edited
from crosslevel.data.duplicates.descriptor import alike, difference, mirrored, outline
from crosslevel.data.duplicates.hashes import near_pairs, perceptual_hash
from crosslevel.data.duplicates.neighbours import USUAL, Cells, neighbours

RADIUS = 8  # how many of the 64 bits of a hash may differ
COPY = 0.02  # root mean square difference of copies, unshifted, of the range of a pixel
NEAR = 0.05  # likewise of near-duplicates, at the best shift
OF_CONTRAST = 0.3  # share of a picture's deviation: light things on a light ground differ by little
NOISE = 0.008  # below this difference two pictures are the same, however alike their neighbours are
EDITED = 0.96  # correlation of edges
COLOURS = 0.9  # correlation of colours, of edited copies
CROWD = 32  # neighbours that say how alike the images around one are
IN_A_CROWD, EDITED_IN_A_CROWD = 0.3, 0.25  # largest distance of a duplicate, as a share of that to the crowd
MIRRORED = 0.8  # correlation of outlines from which on a mirrored pair is compared
_COMPARED, _ALIGNED = 8, 3  # nearest neighbours whose pixels, and whose edges, are compared
_LINKED = 2000  # images of a track up to which all are compared with all
_PART, _PAIRS = 256, 8192  # pictures, and pairs of them, at a time

Pictures = UInt8[Tensor, "N 3 32 32"]
Index = Int64[Tensor, "P 2"]


class Kind(IntEnum):
    """The kinds of pairs, the closest first."""

    EXACT = 0
    COPY = 1
    EDITED = 2
    NEAR = 3


class Pairs(NamedTuple):
    """Pairs (i, j), i < j, each once: not all pairs, but enough to connect each set.

    ``distance`` is 0 for equal pictures; for an edited copy, 1 minus the correlation of edges; otherwise the root mean
    square difference of pixels, 0 to 1, at the best small shift.
    """

    images: Index
    kind: Int64[Tensor, " P"]
    distance: Float[Tensor, " P"]

    def of(self, mask: Bool[Tensor, " P"]) -> Pairs:
        """The pairs that ``mask`` selects."""
        return Pairs(*(column[mask] for column in self))


def duplicate_pairs(pictures: Pictures, first: int | None = None, cells: Cells = USUAL) -> Pairs:
    """Copies, edited copies and near-duplicates, by pixels alone.

    Candidates are the nearest by their `outline`, mirrored too, and pictures with nearly the same perceptual hash. A
    copy has almost equal pixels. A near-duplicate has, once it is shifted slightly. An edited copy has the edges and
    colours of its original after brightness, contrast, colour, crop and mirror are taken out.

    Where many different images look alike, such as product shots of one kind, a small difference is no evidence. So a
    pair has to be far closer than the neighbours of rank 17 to 32 of each of its images (after Lowe 2004, section 7.1,
    whose second neighbour would be another copy here), and the difference of a near-duplicate has to be small relative
    to its contrast. If all frames of a video differ from each other by the same amount, pixels cannot distinguish them
    from different images: they are not near-duplicates here.

    Args:
        pictures: small ones, of all images.
        first: for two collections in sequence, the number of images of the first: then only pairs across the two, and
            pairs of equal pictures, are searched.
        cells: how neighbours are searched among many pictures.

    """
    owner, leading = _distinct(pictures)
    is_second = None if first is None else leading >= first
    pairs = _pairs(pictures[leading], is_second, cells) if len(leading) > 1 else _none()
    is_repeated = torch.ones(len(pictures), dtype=torch.bool)
    is_repeated[leading] = False
    same = torch.stack([leading[owner[is_repeated]], is_repeated.nonzero()[:, 0]], dim=1)
    return Pairs(
        torch.cat([same, leading[pairs.images].sort(dim=1).values]),
        torch.cat([torch.full((len(same),), Kind.COPY.value), pairs.kind]),
        torch.cat([torch.zeros(len(same)), pairs.distance]),
    )


def _none() -> Pairs:
    return Pairs(torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))


def _distinct(pictures: Pictures) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " U"]]:
    """The number of each picture among the distinct ones, and the first image of each distinct picture."""
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    owner = torch.empty(len(pictures), dtype=torch.long)
    for i, picture in enumerate(pictures.contiguous().numpy()):
        number = numbers.setdefault(hashlib.blake2b(picture, digest_size=16).digest(), len(first))
        if number == len(first):
            first.append(i)
        owner[i] = number
    return owner, torch.tensor(first)


def _pairs(pictures: Pictures, is_second: Bool[Tensor, " N"] | None, cells: Cells) -> Pairs:
    """All pairs of distinct pictures, or those of which exactly one ``is_second``."""
    outlines = in_parts(outline, pictures)
    crowd = Crowd(pictures, outlines, cells)
    candidates = _candidates(crowd, outlines, is_second, cells)
    means = in_parts(blocks, pictures)
    near = _near(pictures, _alike(pictures, candidates.nearest, means), crowd)
    hashed = near_pairs(in_parts(perceptual_hash, pictures), RADIUS, tracks(len(pictures), near.images))
    if is_second is not None:
        hashed = hashed[is_second[hashed[:, 0]] != is_second[hashed[:, 1]]]
    near = _joined(near, _near(pictures, _alike(pictures, hashed, means), crowd))
    del means  # a gigabyte for a million pictures
    copies = tracks(len(pictures), near.of(near.kind == Kind.COPY).images)
    aligned = unique_pairs(torch.cat([candidates.aligned, hashed]))[0]
    aligned = aligned[copies[aligned[:, 0]] != copies[aligned[:, 1]]]
    edges = in_parts(halves, pictures)
    edited = _edited(pictures, aligned[maybe_edited(edges, aligned)], crowd, mirror=False)
    through = candidates.mirrored
    turned = _edited(pictures, through[maybe_edited(edges, through, mirror=True)], crowd, mirror=True)
    return coherent_pairs(_joined(near, edited, turned), outlines, crowd)


class _Candidates(NamedTuple):
    """Pairs to compare by pixels, by edges, and by edges with one picture mirrored."""

    nearest: Index
    aligned: Index
    mirrored: Index


def _candidates(
    crowd: Crowd, outlines: Float[Tensor, "N 64"], is_second: Bool[Tensor, " N"] | None, cells: Cells
) -> _Candidates:
    all_images = torch.arange(len(outlines))
    if is_second is None:
        queries, keys, indices = all_images, all_images, crowd.indices
    else:
        queries, keys = all_images[is_second], all_images[~is_second]
        indices = (
            keys[neighbours(outlines[queries], outlines[keys], _COMPARED, cells).indices]
            if len(keys)
            else queries[:0, None]
        )
    turned = neighbours(mirrored(outlines[queries]), outlines[keys], 3, cells)
    through = torch.where(turned.values >= MIRRORED, turned.indices, -1)
    through = torch.where(through >= 0, keys[through.clamp(min=0)], -1)
    return _Candidates(
        *(neighbour_pairs(queries, columns) for columns in (indices[:, :_COMPARED], indices[:, :_ALIGNED], through))
    )


def _alike(pictures: Pictures, index: Index, means: Tensor) -> Index:
    """The pairs whose pixels differ by at most `NEAR` at the best shift; ``means`` (`blocks`) rule out most of them."""
    possible = index[maybe_alike(means, index, NEAR)]
    return possible[alike(pictures, possible, NEAR)]


def _near(pictures: Pictures, index: Index, crowd: Crowd) -> Pairs:
    """The copies and near-duplicates among pairs that are alike."""
    shifted, unshifted = difference(pictures, index), difference(pictures, index, reach=0)
    limit = IN_A_CROWD * crowd.distance(index, lambda pairs: difference(pictures, pairs))
    rows, position = index.unique(return_inverse=True)
    contrast = in_parts(_contrast, pictures, rows)
    limit = torch.minimum(limit, OF_CONTRAST * contrast[position].min(1).values)
    kind = torch.where(unshifted <= COPY, Kind.COPY.value, Kind.NEAR.value)
    return Pairs(index, kind, shifted).of((unshifted <= NOISE) | (shifted <= limit))


def _contrast(pictures: Pictures) -> Float[Tensor, " N"]:
    """The root mean square deviation of the pixels from their mean colour, as a share of a pixel's range."""
    return (pictures.float() / 255).flatten(2).var(2).mean(1).sqrt()


def _edited(pictures: Pictures, index: Index, crowd: Crowd, mirror: bool) -> Pairs:
    """The edited copies among these pairs."""
    edges, colours = _agreement(pictures, index, mirror)
    good = (edges >= EDITED) & (colours >= COLOURS)
    index, edges = index[good], edges[good]

    def root_distance(pairs: Index) -> Tensor:
        # The root makes them distances between images, comparable with those of pixels, and not squares.
        return (1 - _agreement(pictures, pairs).edges).clamp(min=0).sqrt()

    limit = EDITED_IN_A_CROWD * crowd.distance(index, root_distance)
    distance = (1 - edges).clamp(min=0)
    return Pairs(index, torch.full((len(index),), Kind.EDITED.value), distance).of(distance.sqrt() <= limit)


def _agreement(pictures: Pictures, pairs: Index, mirror: bool = False) -> Agreement:
    """The agreement of each pair, its second picture mirrored or not; in chunks: 18 GB for a million images."""
    chunks = []
    for i, j in (part.T for part in pairs.split(_PAIRS)):
        chunks.append(agreement(pictures[i], pictures[j].flip(3) if mirror else pictures[j]))
    return Agreement(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _joined(*sets: Pairs) -> Pairs:
    """All pairs, each once, with the closest kind found for it."""
    index, kind, distance = (torch.cat(columns) for columns in zip(*sets, strict=True))
    unique, owner = unique_pairs(index)
    order = kind.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    starts = torch.ones(len(order), dtype=torch.bool)
    starts[1:] = owner[order[1:]] != owner[order[:-1]]
    closest = order[starts]
    return Pairs(unique, kind[closest], distance[closest])


def coherent_pairs(pairs: Pairs, outlines: Float[Tensor, "N 64"], crowd: Crowd, linked: int = _LINKED) -> Pairs:
    """The pairs, without those that chain different images into one track.

    The images of a track of three or more have to be at least as close to each other, on average, as to their
    surroundings. Otherwise average linkage cuts the track at that distance (Sokal and Michener 1958); a track of more
    than ``linked`` images first loses the longer half of its links.
    """
    cluster, settled = torch.full((len(outlines),), -1), torch.zeros(len(pairs.images), dtype=torch.bool)
    while True:
        mask, crowded = torch.ones(len(pairs.images), dtype=torch.bool), False
        for links in _by_track(tracks(len(outlines), pairs.images)[pairs.images[:, 0]]):
            if settled[links[0]]:
                continue
            inside = pairs.images[links].unique()
            if len(inside) > linked:
                crowded = True
                mask[links[pairs.distance[links] > pairs.distance[links].median()]] = False
                continue
            cluster[inside] = average_linkage(outlines[inside], crowd.around(inside, outlines))
            is_together = cluster[pairs.images[links, 0]] == cluster[pairs.images[links, 1]]
            mask[links], settled[links] = is_together, is_together.all()
        pairs, settled = pairs.of(mask), settled[mask]
        if not crowded or mask.all():
            return pairs


def _by_track(owner: Int64[Tensor, " P"]) -> Iterator[Int64[Tensor, " p"]]:
    """The pairs of each track that has several."""
    order = owner.argsort(stable=True)
    sizes = owner[order].unique_consecutive(return_counts=True)[1]
    return (links for links in order.split(sizes.tolist()) if len(links) > 1)


def average_linkage(outlines: Float[Tensor, "n 64"], limit: float) -> Int64[Tensor, " n"]:
    """Clusters by average linkage of distances between outlines, or between one and the other's mirror image.

    ``outlines`` have length 1. If their mean distance is within ``limit``, all are of cluster 0.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415 - as below

    agree = torch.maximum(outlines @ outlines.T, outlines @ mirrored(outlines).T)
    distances = (2 - 2 * torch.maximum(agree, agree.T)).clamp(min=0).sqrt().double().numpy()
    upper = distances[np.triu_indices(len(distances), 1)]
    if upper.mean() <= limit:
        return torch.zeros(len(outlines), dtype=torch.long)
    return torch.from_numpy(fcluster(linkage(upper, "average"), limit, "distance")).long()


class Crowd:
    """The neighbours of each picture, and the distance to those that surround it."""

    def __init__(self, pictures: Pictures, outlines: Float[Tensor, "N 64"], cells: Cells = USUAL) -> None:
        count = len(pictures)
        # Among few images, a third: the others may be copies of it, or show something else.
        self.rank = min(CROWD, (count - 1) // 3) if count >= 8 else 0
        indices = neighbours(outlines, outlines, max(self.rank, min(_COMPARED, count - 1)) + 1, cells).indices
        is_self = indices == torch.arange(count).unsqueeze(1)
        # If many are equal, the image itself may be missing from the list: then the last neighbour is dropped.
        is_self[~is_self.any(1), -1] = True
        self.indices = indices[~is_self].view(count, -1)

    def distance(self, index: Index, measure: Callable[[Index], Tensor]) -> Float[Tensor, " P"]:
        """Each pair's distance to its surroundings: the smaller of the two images' distances; infinite if too few."""
        if not self.rank or not len(index):
            return torch.full((len(index),), torch.inf)
        unique, position = index.unique(return_inverse=True)
        ranks = torch.linspace(self.rank // 2, self.rank - 1, 5).long().unique()
        surrounding = self.indices[unique][:, ranks]
        pairs = torch.stack([unique.unsqueeze(1).expand_as(surrounding), surrounding.clamp(min=0)], dim=2).flatten(0, 1)
        distances = measure(pairs).view_as(surrounding).masked_fill(surrounding < 0, torch.inf)
        return distances.median(1).values[position].min(1).values

    def around(self, images: Int64[Tensor, " n"], outlines: Float[Tensor, "N 64"]) -> float:
        """The mean distance of ``outlines`` to those that surround the images; infinite where there are too few."""
        if not self.rank:
            return math.inf
        surrounding = self.indices[images][:, self.rank // 2 : self.rank]
        agree = torch.einsum("nd,nkd->nk", outlines[images], outlines[surrounding.clamp(min=0)])
        return float((2 - 2 * agree).clamp(min=0).sqrt()[surrounding >= 0].mean())


def neighbour_pairs(queries: Int64[Tensor, " Q"], indices: Int64[Tensor, "Q k"]) -> Index:
    """The pairs (i, j), i < j, each once, of every query and its neighbours (-1: none)."""
    row = queries.unsqueeze(1).expand_as(indices)
    i, j = row[(indices >= 0) & (indices != row)], indices[(indices >= 0) & (indices != row)]
    return unique_pairs(torch.stack([torch.minimum(i, j), torch.maximum(i, j)], dim=1))[0]


def unique_pairs(pairs: Index) -> tuple[Index, Int64[Tensor, " P"]]:
    """The distinct pairs in order, and the index of each pair among them.

    Pairs are compared as single numbers: ``unique(dim=0)`` makes a tensor of each row, gigabytes for a million
    pictures.
    """
    base = int(pairs.max()) + 1 if len(pairs) else 1
    keys, owner = (pairs[:, 0] * base + pairs[:, 1]).unique(return_inverse=True)
    return torch.stack([keys // base, keys % base], dim=1), owner


def in_parts(
    function: Callable[[Tensor], Tensor], pictures: Pictures, index: Int64[Tensor, " n"] | None = None
) -> Tensor:
    """Apply ``function`` to all pictures, or those of ``index``, in chunks."""
    first = function(pictures[:_PART])
    count = len(pictures) if index is None else len(index)
    result = first.new_empty(count, *first.shape[1:])
    # Small results, kept one by one, would lie between freed blocks and keep those pages in use: gigabytes.
    for start, output in zip(range(0, count, _PART), result.split(_PART), strict=False):
        span = slice(start, start + _PART)
        output.copy_(function(pictures[span] if index is None else pictures[index[span]]))
    return result


def tracks(count: int, index: Index) -> Int64[Tensor, " count"]:
    """The track of each image: images that pairs connect, directly or over others, share one; numbered from 0."""
    from scipy.sparse import coo_array  # noqa: PLC0415 - slow to import, and most commands search no duplicates
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    i, j = index.cpu().numpy().T
    graph = coo_array(([True] * len(i), (i, j)), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()
