"""Parts of a source: selection of images by labels and tracks alone.

Random selections use the ``torch.Generator`` that is passed in, on the CPU: the same seed gives the same part on every
machine with the same release of torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.data.images import Images, ImageView, InMemoryImages
from crosslevel.utils.errors import UserError


def take(
    images: Images,
    index: Int64[Tensor, " M"],
    labels: Int64[Tensor, " M"] | None = None,
    classes: list[str] | None = None,
) -> Images:
    """The images ``index``, with the source's labels or these: packed images stay packed."""
    part = ImageView(images, index)
    if labels is not None:
        part.labels, part.classes = labels, classes
    return InMemoryImages.of(images.batch(index), part) if isinstance(images, InMemoryImages) else part


def unlabelled(images: Images) -> Images:
    """Return the images without labels and classes, but with their tracks."""
    bare = copy.copy(images)
    bare.labels = bare.classes = None
    if isinstance(bare, ImageView):
        bare.images = unlabelled(bare.images)
    return bare


def sample(images: Images, limit: int, generator: torch.Generator) -> Int64[Tensor, " M"]:
    """At most ``limit`` different indices, drawn uniformly, in ascending order."""
    return torch.randperm(len(images), generator=generator)[:limit].sort().values


def long_tailed(
    labels: Int64[Tensor, " N"], imbalance: float, generator: torch.Generator | None = None
) -> Int64[Tensor, " M"]:
    """Indices of a long-tailed part: class c of C keeps n * imbalance^(-c / (C - 1)) images, n the largest class's.

    The convention of the long-tailed CIFAR sets (Cui et al., CVPR 2019, section 5.1): at imbalance 100, 12,406
    of CIFAR-10's training images. Labels without images do not count as classes.

    Args:
        labels: of all images, in [0, C).
        imbalance: how many times larger the largest class is than the smallest, at least 1.
        generator: draws which images stay.

    Raises:
        ValueError: an imbalance below 1, or one that leaves a class empty.

    """
    if not 1 <= imbalance < float("inf"):
        raise UserError(f"imbalance={imbalance} must be at least 1")
    counts = torch.bincount(labels)
    present = counts.nonzero()[:, 0]
    largest, last = int(counts.max()), max(1, len(present) - 1)
    sizes = torch.zeros_like(counts)
    for rank, c in enumerate(present.tolist()):
        # Rounded first: a whole number must stay one.
        sizes[c] = min(int(counts[c]), math.floor(round(largest * imbalance ** (-rank / last), 6)))
        if not sizes[c]:
            raise UserError(f"imbalance={imbalance} leaves nothing of class {c}: lower it")
    return of_each_class(labels, sizes, generator)


def pareto(
    labels: Int64[Tensor, " N"], power: float, most: int, least: int, generator: torch.Generator | None = None
) -> Int64[Tensor, " M"]:
    """Indices of a long-tailed part whose class sizes are the quantiles of a Pareto distribution.

    ImageNet-LT and Places-LT (Liu et al., CVPR 2019) have class sizes from such a distribution, ImageNet-LT with power
    6 and 1,280 to 5 images a class. There, sizes and their order over the classes were drawn at random; here, class c
    has the c-th of `pareto_counts`. For ImageNet-LT's figures that is 121,449 images; the published list, which
    ``@list=FILE`` reads, has 115,846. A class with fewer images than its size is kept whole; labels without images do
    not count as classes.

    Args:
        labels: of all images, in [0, C).
        power: of the distribution; the smaller, the heavier the head.
        most: images of class 0.
        least: images of class C - 1.
        generator: draws which images stay.

    Raises:
        ValueError: a power that is not positive, or not most >= least >= 1.

    """
    sizes = torch.bincount(labels)
    present = sizes.nonzero()[:, 0]
    sizes[present] = pareto_counts(len(present), power, most, least)
    return of_each_class(labels, sizes, generator)


def pareto_counts(classes: int, power: float, most: int, least: int) -> Int64[Tensor, " C"]:
    """Sizes of C classes, never increasing, from ``most`` to ``least``.

    The class of rank r = 1 ... C has the Pareto quantile q(r) = (r / C)^(-1 / power); sizes are linear in q, rounded
    down: least + (most - least) * (q(r) - 1) / (q(1) - 1).

    Raises:
        ValueError: a power that is not positive, or not most >= least >= 1.

    """
    if not 0 < power < float("inf"):
        raise UserError(f"pareto={power} must be a positive number: ImageNet-LT has 6")
    if not 1 <= least <= most:
        raise UserError(f"most={most}, least={least}: needs most >= least >= 1")
    rank = torch.arange(1, classes + 1, dtype=torch.float64)
    above = (rank / classes) ** (-1 / power) - 1
    # Rounded first: the last bits of a power differ between machines, and a whole number must stay one.
    sizes = least + (most - least) * above / max(float(above[0]), 1e-300)
    counts = (sizes * 1e6).round().div(1e6).floor().long()
    counts[0] = most
    return counts


def of_classes(labels: Int64[Tensor, " N"], classes: Sequence[int]) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"]]:
    """Indices of the images of the ``classes`` classes, and their labels in the order of ``classes``."""
    number = torch.full((int(labels.max()) + 1,), -1)
    for new, old in enumerate(classes):
        if old < len(number):
            number[old] = new
    renumbered = number[labels]
    index = (renumbered >= 0).nonzero()[:, 0]
    return index, renumbered[index]


def first_frames(tracks: Int64[Tensor, " N"], most: int) -> Int64[Tensor, " M"]:
    """Indices of the first ``most`` images of each track, in ascending order.

    Raises:
        ValueError: fewer than one.

    """
    if most < 1:
        raise UserError(f"frames={most}: at least 1")
    _, owner = tracks.unique(return_inverse=True)
    return _first(owner, torch.full((int(owner.max()) + 1,), most), torch.arange(len(tracks)))


def stretches(tracks: Int64[Tensor, " N"], longest: int) -> Int64[Tensor, " N"]:
    """Tracks in which each has at most ``longest`` images, numbered from 0: longer ones are cut into equal stretches.

    A stretch has consecutive images of its track. A long video is one track, but what it shows an hour later is
    something else.
    """
    _, owner = tracks.unique(return_inverse=True)
    order = owner.argsort(stable=True)
    counts = owner.bincount()
    position = torch.empty_like(owner)
    position[order] = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    pieces = -(-counts // max(1, longest))
    stretch = position * pieces[owner] // counts[owner]
    cut: Tensor = (owner * len(owner) + stretch).unique(return_inverse=True)[1]
    return cut


def some_tracks(tracks: Int64[Tensor, " N"], count: int, generator: torch.Generator) -> Int64[Tensor, " M"]:
    """Indices of all images of ``count`` tracks, drawn uniformly, in ascending order.

    Raises:
        ValueError: there are fewer tracks, or ``count`` is below 1.

    """
    names, owner = tracks.unique(return_inverse=True)
    if not 1 <= count <= len(names):
        raise UserError(f"tracks={count}: choose 1 to {len(names)}, which is how many there are")
    mask = torch.zeros(len(names), dtype=torch.bool)
    mask[torch.randperm(len(names), generator=generator)[:count]] = True
    return mask[owner].nonzero()[:, 0]


def of_each_class(
    labels: Int64[Tensor, " N"], sizes: Int64[Tensor, " C"], generator: torch.Generator | None
) -> Int64[Tensor, " M"]:
    """Indices of ``sizes[c]`` images of each class c, drawn uniformly, or of all where it has fewer; ascending."""
    return _first(labels, sizes, torch.randperm(len(labels), generator=generator))


def _first(groups: Int64[Tensor, " N"], sizes: Int64[Tensor, " G"], order: Int64[Tensor, " N"]) -> Int64[Tensor, " M"]:
    """The first ``sizes[g]`` images of each group g in ``order``, sorted ascending."""
    grouped = order[groups[order].argsort(stable=True)]
    counts = groups.bincount(minlength=len(sizes))
    position = torch.arange(len(groups)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return grouped[position < sizes[groups[grouped]]].sort().values


def held_out(images: Images, count: int, generator: torch.Generator) -> tuple[Int64[Tensor, " H"], Int64[Tensor, " M"]]:
    """The indices of at least ``count`` random images, and of all others, both ascending; tracks stay together.

    Raises:
        UserError: fewer than 2 would be left.

    """
    total = len(images)
    owner = torch.arange(total) if images.tracks is None else images.tracks.unique(return_inverse=True)[1]
    sizes = owner.bincount()
    order = torch.randperm(len(sizes), generator=generator)
    track_count = int(torch.searchsorted(sizes[order].cumsum(0), count)) + 1 if count else 0
    mask = torch.zeros(len(sizes), dtype=torch.bool)
    mask[order[:track_count]] = True
    inside = mask[owner]
    if total - int(inside.sum()) < 2:
        raise UserError(f"hold_out={count} leaves {total - int(inside.sum())} of {total} images to train on")
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
