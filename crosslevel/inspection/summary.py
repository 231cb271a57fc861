"""The summary of a collection: all figures, and the tables that show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.detect import Kind, tracks
from crosslevel.data.duplicates.scan import ScanResult
from crosslevel.data.duplicates.sets import NAMES, Member, described
from crosslevel.data.images import Images
from crosslevel.inspection.recommend import advise
from crosslevel.inspection.scan import Structure
from crosslevel.inspection.sketch import Sketch
from crosslevel.metrics import long_tail
from crosslevel.utils.errors import hidden

# With features of constructed classes, the sizes of groups ranked the true imbalance from a mean silhouette of about
# 0.25 on (Spearman at least 0.9); short runs on images reached 0.22 at most, and theirs did not.
APART = 0.25


@dataclass(frozen=True)
class Tail:
    """Estimated groups of one kind of member (images or tracks), largest first.

    ``imbalance`` is the factor of an exponential decay with their Gini index (`long_tail.exponential_imbalance`).
    """

    imbalance: float
    gini: float
    sizes: list[int]


def summary(
    name: str, total: int, part: Images, scanned: ScanResult, structure: Structure, duplicates: list[Member],
    bad_files: BadFiles, batch_size: int, run: str | None, threshold: float | None = None,
    counted: Sketch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All figures of the JSON file.

    Args:
        name: of the source.
        total: its images.
        part: the compared images.
        scanned: the records of the compared images.
        structure: their duplicates, tracks and groups.
        duplicates: the sets of duplicates.
        bad_files: the unreadable images.
        batch_size: of the training that settings are suggested for; at most the readable images.
        run: the run whose features were used.
        threshold: the least cosine of near-duplicates by these features.
        counted: the counts of all read images; of the compared ones unless given.

    """
    counted = Sketch.of(scanned, part.paths) if counted is None else counted
    by_track = structure.tracks.unique(return_inverse=True)[1]
    sizes = torch.bincount(by_track)
    copied = copy_sizes(len(scanned.numbers), structure)
    first = torch.full((len(sizes),), len(by_track)).scatter_reduce_(0, by_track, torch.arange(len(by_track)), "amin")
    tails = {"by_image": _tail(structure.groups), "by_track": _tail(structure.groups[first])}
    which = f"the features of {run}" if run else "an untrained descriptor: colours and edges"
    batch = min(batch_size, len(by_track))
    return {
        "images": hidden(name),
        "count": total,
        "looked_at": counted.looked_at,
        "compared": len(part),
        "readable": counted.readable,
        "broken": dict(sorted(bad_files.reasons.items())),
        "width": _quartiles(counted.width),
        "height": _quartiles(counted.height),
        "shorter_side": _histogram(counted.shorter_side),
        "formats": dict(counted.formats.most_common()),
        "exact_duplicates": _exact(counted),
        "duplicates": _duplicates(scanned, duplicates, part.paths),
        "near_duplicates": {
            "pairs_by_pixels": len(structure.pairs.images),
            "pairs_by_features": structure.by_features if run else None,
            "cosine_threshold": threshold,
            "tracks": len(sizes),
            "images_in_tracks_of_several": int(sizes[sizes > 1].sum()),
            "largest_track": int(sizes.max()),
            "mean_track": len(by_track) / len(sizes),
        },
        "long_tail": {
            "features": which,
            "separation": structure.separation,
            "trust": trust(structure.separation),
            **{kind: asdict(tail) for kind, tail in tails.items()},
        },
        "batch": {"batch_size": batch, "duplicate_share": long_tail.duplicate_share(sizes, batch)},
        "advice": [asdict(advice) for advice in advise(sizes, copied, batch_size)],
    }


def copy_sizes(count: int, structure: Structure) -> Int64[Tensor, " S"]:
    """Images in each set of copies; 1 for each image that has none."""
    copies = structure.pairs.of(structure.pairs.kind <= Kind.EDITED)
    return tracks(count, copies.images).bincount()


def _exact(counted: Sketch) -> dict[str, int]:
    """The number of sets of images with equal pixels, and of images that could be deleted."""
    sizes = torch.cat(counted.content).unique(return_counts=True)[1]
    return {"sets": int((sizes > 1).sum()), "superfluous": int((sizes - 1).sum())}


def _duplicates(scanned: ScanResult, duplicates: list[Member], paths: Sequence[str]) -> dict[str, Any]:
    """The number of copies by kind, and all sets by name."""
    kinds = Counter(NAMES[member.kind] for member in duplicates if member.kind is not None)
    sets: dict[int, list[dict[str, Any]]] = {}
    for member in duplicates:
        sets.setdefault(member.set, []).append(described(member, scanned, paths))
    return {
        "copies": {name: kinds[name] for name in NAMES.values()},
        "superfluous": sum(not member.keep for member in duplicates),
        "sets": list(sets.values()),
    }


def trust(separation: float) -> str:
    """A line on the reliability of the groups' sizes, by their mean silhouette."""
    if separation < APART:
        return f"no figure: the groups overlap (separation {separation:.2f}, below {APART})"
    return f"the groups lie apart (separation {separation:.2f}): look at their pictures"


def tables(figures: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The tables of the terminal and of the page: headings, and rows of text."""
    pixels = {kind: " ".join(f"{value:,.0f}" for value in figures[kind]) for kind in ("width", "height")}
    images: list[tuple[str, ...]] = [
        ("images", f"{figures['count']:,}{_counts(figures)}"),
        ("broken", f"{len(figures['broken']):,}"),
        ("width: least, quartiles, most", pixels["width"]),
        ("height", pixels["height"]),
        ("formats", ", ".join(f"{name} {n:,}" for name, n in figures["formats"].items())),
    ]
    return [
        ("Images", images),
        ("Duplicates", _duplicate_rows(figures)),
        (f"Long tail, estimated by {figures['long_tail']['features']}", _tail_rows(figures["long_tail"])),
        ("Suggested settings", [(a["setting"], str(a["value"]), a["reason"]) for a in figures["advice"]]),
    ]


def _counts(figures: dict[str, Any]) -> str:
    """The numbers of images read and compared, if these are not all."""
    count, looked_at, compared = (figures[name] for name in ("count", "looked_at", "compared"))
    if looked_at < count:
        return f", {looked_at:,} of them read"
    return "" if compared == count else f", all read, {compared:,} of them compared with each other"


def _duplicate_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    near, exact, copies = figures["near_duplicates"], figures["exact_duplicates"], figures["duplicates"]["copies"]
    compared = " of the compared" if figures["compared"] < figures["looked_at"] else ""
    of_kind = [(f"{name} copies{compared}", f"{copies[name]:,}") for name in (NAMES[Kind.COPY], NAMES[Kind.EDITED])]
    rows: list[tuple[str, ...]] = [
        ("exact copies", f"{exact['superfluous']:,} in {exact['sets']:,} sets"),
        *of_kind,
        (f"near-duplicates{compared}", f"{near['images_in_tracks_of_several']:,} images in tracks of several"),
        (
            "tracks",
            f"{near['tracks']:,}, of {near['mean_track']:.1f} images, the largest of {near['largest_track']:,}",
        ),
        (
            f"of a random batch of {figures['batch']['batch_size']}",
            f"{100 * figures['batch']['duplicate_share']:.1f} % have a near-duplicate in it",
        ),
    ]
    if "beside" in figures:
        second = figures["beside"]
        kinds = ", ".join(f"{name} {n:,}" for name, n in second["copies"].items())
        rows.append((f"also in {second['images']}", f"{len(second['matches']):,}: {kinds}"))
    return rows


def _tail_rows(tail: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the estimated groups, or one line if there are none."""
    if tail["separation"] < APART:
        return [("imbalance", tail["trust"])]
    rows = [(name.replace("_", " "), tail[name]) for name in ("by_image", "by_track")]
    return [
        *((name, f"imbalance factor {one['imbalance']:.1f}, Gini index {one['gini']:.2f}") for name, one in rows),
        ("how far to trust it", tail["trust"]),
    ]


def _tail(groups: Int64[Tensor, " n"]) -> Tail:
    sizes = torch.bincount(groups).sort(descending=True).values
    sizes = sizes[sizes > 0]
    return Tail(long_tail.exponential_imbalance(sizes), long_tail.gini(sizes), sizes.tolist())


def _quartiles(counts: Counter[int]) -> list[float]:
    """Smallest, quartiles, largest of the counted numbers, with NumPy's interpolation between two."""
    values = np.array(sorted(counts))
    last = np.cumsum([counts[value] for value in values.tolist()]) - 1  # the last position of each number
    positions = np.array([0, 0.25, 0.5, 0.75, 1]) * last[-1]
    below, above = (values[np.searchsorted(last, ranks)] for ranks in (np.floor(positions), np.ceil(positions)))
    return [float(value) for value in below + (above - below) * (positions - np.floor(positions))]


def _histogram(sides: Counter[int]) -> dict[str, int]:
    """How many images have a shorter side from one power of two to the next."""
    powers = Counter[int]()
    for side, count in sides.items():
        powers[max(1, side).bit_length() - 1] += count
    return {f"{2**p} to {2 ** (p + 1) - 1}": n for p, n in sorted(powers.items())}
