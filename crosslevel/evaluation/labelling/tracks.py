"""Which labelled images belong together: images of one film or object tell nothing about how right others will be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.detect import duplicate_pairs
from crosslevel.data.duplicates.detect import tracks as hanging_together
from crosslevel.data.duplicates.scan import scan
from crosslevel.data.duplicates.sets import with_exact
from crosslevel.data.images import Images
from crosslevel.evaluation.linear import held_out
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded

COMPARED = 10_000  # images up to which near-duplicates are searched for: it reads each of them once more
HELD_OUT, LEAST = 0.2, 4  # the share of each class that calibrates, and how many images that must be at least


class Tracks(NamedTuple):
    """The track of each of N images, None where nobody knows; and in words where it is known from."""

    owner: Int64[Tensor, " N"] | None
    source: str


class HeldOut(NamedTuple):
    """Which of N images train nothing; ``tracks`` are those that were held out whole, 0 where single images were."""

    mask: Bool[Tensor, " N"]
    tracks: int
    line: str


def tracks_of(images: Images, indices: Int64[Tensor, " N"], workers: int | None, most: int = COMPARED) -> Tracks:
    """The tracks of the images ``indices``: the source's own, or else sets of near-duplicates, by pixels.

    Args:
        images: the source.
        indices: of those that could be read.
        workers: processes that decode.
        most: images; of more, nothing is compared.

    """
    if images.tracks is not None:
        return Tracks(images.tracks[indices], "of the source")
    if len(images) > most:
        return Tracks(None, "")
    scanned = scan(images, BadFiles(), workers)
    pairs = with_exact(scanned, duplicate_pairs(scanned.pictures)).images
    owner = torch.arange(len(images), 2 * len(images))  # what cannot be read belongs to nothing
    owner[scanned.numbers] = hanging_together(len(scanned.numbers), pairs)
    return Tracks(owner[indices], "of near-duplicates")


def hold_out(labels: Int64[Tensor, " N"], tracks: Tracks, seed: int) -> HeldOut:
    """A fifth of each class, in whole tracks where there are enough, else in single images; and a line that says so.

    Raises:
        UserError: there are too few images even for that.

    """
    if tracks.owner is not None:
        mask = held_out(labels, HELD_OUT, seeded(seed), tracks.owner)
        count = len(tracks.owner[mask].unique())
        if int(mask.sum()) >= LEAST:
            return HeldOut(mask, count, _line(labels, tracks, mask, count))
    mask = held_out(labels, HELD_OUT, seeded(seed))
    if int(mask.sum()) < LEAST:
        raise UserError(f"{len(labels):,} labelled images are too few to hold a fifth out: give more of each class")
    if tracks.owner is None:
        return HeldOut(mask, 0, f"tracks are unknown (more than {COMPARED:,} images): {_DOUBT}")
    many = len(tracks.owner.unique())
    return HeldOut(mask, 0, f"{many:,} tracks {tracks.source} are too few to hold any out whole: {_DOUBT}")


_DOUBT = (
    "single images are held out, and where they are like training images, new ones are right less often than the "
    "figures below say"
)


def _line(labels: Int64[Tensor, " N"], tracks: Tracks, mask: Bool[Tensor, " N"], count: int) -> str:
    assert tracks.owner is not None
    line = f"held out: {count:,} of {len(tracks.owner.unique()):,} tracks {tracks.source}, whole"
    classes, calibrated = len(labels.unique()), len(labels[mask].unique())
    if calibrated == classes:
        return line
    return f"{line}; {classes - calibrated:,} of {classes:,} classes have one track each, and are in no figure below"
