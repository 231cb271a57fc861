"""What a collection need not keep: copies, broken pictures and outliers, by features and small pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.duplicates.detect import duplicate_pairs, tracks
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.metrics.nearest import CROWD, Neighbours, mutual_pairs, nearest
from crosslevel.metrics.outliers import outliers
from crosslevel.utils.rng import seeded

NEIGHBOURS = 6  # nearest neighbours; the two of a pair must be among each other's
RARE = 0.999  # share of random pairs that are farther apart than near-duplicates
PAIRS = 200_000  # random pairs, which show which cosines are rare


@dataclass
class Findings:
    """Near-duplicates, broken pictures and outliers among N rows.

    ``near`` has the nearest rows of each row, itself included. ``sets`` numbers the sets of near-duplicates, -1 for a
    row in no set; ``representatives`` has the row of each set to keep. ``broken`` has the reason for each picture that
    is of no use; ``alone`` has the outliers, by distance to the nearest rows, farthest first. ``has_pictures``: whether
    any pictures were available.
    """

    sets: Int64[Tensor, " N"]
    near: Neighbours
    representatives: dict[int, int] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    has_pictures: bool = False

    def copies(self) -> dict[int, int]:
        """Each row that is a copy, and the row that is kept in its place."""
        numbers = enumerate(self.sets.tolist())
        return {
            row: self.representatives[number]
            for row, number in numbers
            if number >= 0 and self.representatives[number] != row
        }


def findings_of(
    features: Float[Tensor, "N D"],
    pictures: Pictures,
    threshold: float | None = None,
    rows: Int64[Tensor, " N"] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Near-duplicates, broken pictures and outliers.

    Near-duplicates are recognized by their pictures, as in `crosslevel inspect` (`duplicate_pairs`). All thumbnails of
    the table are compared. Image files are compared only if their features are among each other's nearest and have a
    cosine that one in a thousand random pairs exceeds: comparing all would take as long as decoding the collection.
    Without any pictures, the features alone decide. The row in the middle of each set is kept.

    Args:
        features: of any length.
        pictures: of the rows.
        threshold: the cosine from which on two rows without thumbnails can be near-duplicates; estimated unless given.
        rows: the rows of the table that the features belong to; all of them unless given.
        progress: called with the pictures compared so far, and their total.

    """
    unit = F.normalize(features, dim=1)
    near = nearest(unit, unit, CROWD + 1)
    pairs = mutual_pairs(unit, rare_cosine(unit) if threshold is None else threshold, NEIGHBOURS, near)
    scanned = torch.arange(len(unit)) if pictures.has_thumbnails else pairs.unique()
    small, available = _small(pictures, scanned if rows is None else rows[scanned], progress)
    result = Findings(torch.full((len(unit),), -1), near, has_pictures=pictures.has_thumbnails)
    if pictures.has_thumbnails:
        result.broken = {int(row): defect for row, defect in zip(scanned, map(broken, small), strict=True) if defect}
    positions = torch.full((len(unit),), -1)
    positions[scanned] = torch.where(available, torch.arange(len(scanned)), -1)
    unseen = (positions[pairs] < 0).any(1)
    pairs = pairs[unseen]
    if available.sum() > 1:
        visible = available.nonzero().flatten()
        pairs = torch.cat([pairs, scanned[visible[duplicate_pairs(small[visible]).images]]])
    _sets(result, unit, pairs)
    far = outliers(unit, known=near)
    order = far.distance.argsort(descending=True, stable=True)
    result.alone = {row: float(far.distance[row]) for row in order[far.far[order]].tolist()}
    return result


def rare_cosine(unit: Float[Tensor, "N D"]) -> float:
    """The cosine that one in a thousand random pairs exceeds; at most 0.999."""
    if len(unit) < 3:
        return 0.999
    generator = seeded(0)
    i, j = torch.randint(len(unit), (2, PAIRS), generator=generator)
    cosines = torch.cat([(unit[a] * unit[b]).sum(1) for a, b in zip(i.split(8192), j.split(8192), strict=True)])
    distinct = cosines[i != j].sort().values
    return min(0.999, float(distinct[int(RARE * (len(distinct) - 1))]))


def broken(picture: UInt8[Tensor, "3 32 32"]) -> str:
    """The reason why each broken picture is of no use; others have no entry."""
    x = picture.float()
    deviation = float(x.flatten(1).std(1).max())
    if deviation < 2:
        mean = float(x.mean())
        return "black" if mean < 16 else "white" if mean > 239 else "one colour"
    grey = ((x - 128).abs() <= 3).flatten(0, 0).all(0).all(1)  # rows that a decoder fills what is missing with
    missing = int(grey.flip(0).long().cumprod(0).sum())
    return "its lower part is missing" if missing >= SIDE // 4 else ""


def _small(
    pictures: Pictures, rows: Int64[Tensor, " M"], progress: Callable[[int, int], None] | None
) -> tuple[UInt8[Tensor, "M 3 32 32"], Tensor]:
    """Pictures of one small size, and which rows have one; noise stands in for a missing picture."""
    small = torch.randint(256, (len(rows), 3, SIDE, SIDE), dtype=torch.uint8, generator=seeded(0))
    available = torch.zeros(len(rows), dtype=torch.bool)
    for i, row in enumerate(rows.tolist()):
        picture = pictures[row]
        if picture is not None:
            small[i], available[i] = tvf.resize(picture, [SIDE, SIDE], antialias=True), True
        if progress is not None and i % 256 == 0:
            progress(i, len(rows))
    return small, available


def _sets(result: Findings, unit: Float[Tensor, "N D"], pairs: Int64[Tensor, "P 2"]) -> None:
    """Number the sets that pairs connect, and find the row in the middle of each, which is kept."""
    if not len(pairs):
        return
    owner = tracks(len(unit), pairs)
    several = owner.bincount()[owner] > 1
    names, result.sets[several] = owner[several].unique(return_inverse=True)
    for number in range(len(names)):
        indices = (result.sets == number).nonzero().flatten()
        middle = F.normalize(unit[indices].mean(0), dim=0)
        result.representatives[number] = int(indices[(unit[indices] @ middle).argmax()])
