"""What is in a collection: all figures, the tables that show them, and the blocks of a page."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel import report
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.inspection.recommend import advise
from crosslevel.inspection.scan import Found, ScanResult
from crosslevel.metrics import long_tail

_COPY = re.compile(r"#(?:t=[\d.]+|\d+)$")  # a copy, an object or a frame of what is named before it
# Features of constructed classes: from a mean silhouette of about 0.25 on, sizes of groups ranked the true imbalance
# (Spearman at least 0.9); short runs on images reached 0.22 at most, and theirs did not.
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
    name: str, total: int, part: Images, looked: ScanResult, found: Found, bad: BadFiles, batch_size: int,
    run: str | None, threshold: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All figures, as the JSON file has them."""
    by_track = found.tracks.unique(return_inverse=True)[1]
    sizes = torch.bincount(by_track)
    exact = torch.bincount(found.exact)
    share = long_tail.duplicate_share(sizes, batch_size)
    first = torch.full((len(sizes),), len(by_track)).scatter_reduce_(0, by_track, torch.arange(len(by_track)), "amin")
    tails = {"by_image": _tail(found.groups), "by_track": _tail(found.groups[first])}
    which = f"the features of {run}" if run else "an untrained descriptor: colours and edges"
    return {
        "images": name,
        "count": total,
        "looked_at": len(part),
        "readable": len(looked.places),
        "broken": dict(sorted(bad.reasons.items())),
        "width": _quartiles(looked.shape[:, 1]),
        "height": _quartiles(looked.shape[:, 0]),
        "shorter_side": _histogram(looked.shape.min(1).values),
        "formats": _formats(part, looked.places),
        "exact_duplicates": {"sets": int((exact > 1).sum()), "superfluous": int((exact - 1).clamp(min=0).sum())},
        "near_duplicates": {
            "pairs_by_pixels": found.by_pixels,
            "pairs_by_features": found.by_features if run else None,
            "cosine_threshold": threshold,
            "tracks": len(sizes),
            "images_in_tracks_of_several": int(sizes[sizes > 1].sum()),
            "largest_track": int(sizes.max()),
            "mean_track": len(by_track) / len(sizes),
        },
        "long_tail": {
            "features": which,
            "separation": found.separation,
            "trust": trust(found.separation),
            **{kind: asdict(tail) for kind, tail in tails.items()},
        },
        "batch": {"batch_size": batch_size, "duplicate_share": share},
        "advice": [asdict(advice) for advice in advise(sizes, exact, batch_size)],
    }


def trust(separation: float) -> str:
    """What the groups' mean silhouette says about their sizes."""
    if separation < APART:
        return (
            f"Not at all, so no figure is given: the groups run into one another (separation {separation:.2f}, below "
            f"{APART}). On collections of known imbalance, the sizes of such groups did not rank the truth. It takes "
            "features that tell apart what images show."
        )
    return (
        f"The groups lie apart (separation {separation:.2f}, {APART} or more). The sizes of such groups ranked the "
        "true imbalance of generated images; whether a group is what you call a thing, the page's pictures show."
    )


def tables(told: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The tables of the terminal and of the page: headings, and rows of text."""
    near, tail, exact = told["near_duplicates"], told["long_tail"], told["exact_duplicates"]
    pixels = {kind: " ".join(f"{value:,.0f}" for value in told[kind]) for kind in ("width", "height")}
    whole = told["count"] == told["looked_at"]
    both = [(name.replace("_", " "), tail[name]) for name in ("by_image", "by_track")]
    return [
        (
            "Images",
            [
                ("images", f"{told['count']:,}" + ("" if whole else f", {told['looked_at']:,} of them looked at")),
                ("broken", f"{len(told['broken']):,}"),
                ("width: least, quartiles, most", pixels["width"]),
                ("height", pixels["height"]),
                ("formats", ", ".join(f"{name} {n:,}" for name, n in told["formats"].items())),
            ],
        ),
        (
            "Duplicates",
            [
                ("exact copies", f"{exact['superfluous']:,} in {exact['sets']:,} sets"),
                ("near-duplicates", f"{near['images_in_tracks_of_several']:,} images in tracks of several"),
                ("tracks", f"{near['tracks']:,}, of {near['mean_track']:.1f} images, the largest of "
                 f"{near['largest_track']:,}"),
                (f"of a random batch of {told['batch']['batch_size']}",
                 f"{100 * told['batch']['duplicate_share']:.1f} % have a near-duplicate in it"),
            ],
        ),
        (
            f"Long tail, estimated by {tail['features']}",
            [
                *((name, f"imbalance factor {found['imbalance']:.1f}, Gini index {found['gini']:.2f}")
                  for name, found in both if tail["separation"] >= APART),
                ("how far to trust it", tail["trust"]),
            ],
        ),
        ("Suggested settings", [(a["setting"], str(a["value"]), a["reason"]) for a in told["advice"]]),
    ]  # fmt: skip


def page_blocks(told: dict[str, Any], looked: ScanResult, found: Found) -> list[report.Block]:
    """The tables, and pictures of tracks and groups."""
    blocks = []
    for heading, rows in tables(told):
        columns = ["setting", "value", "reason"] if len(rows[0]) == 3 else ["", ""]
        blocks.append(report.table(heading, columns, rows, None))
    histogram, tail = told["shorter_side"], told["long_tail"]["by_track"]
    blocks.append(report.bars("Sizes: the shorter side in pixels", list(histogram), list(histogram.values())))
    names = [str(i + 1) for i in range(len(tail["sizes"]))]
    blocks.append(report.bars("Estimated groups: tracks in each", names, tail["sizes"], told["long_tail"]["trust"]))
    blocks.append(
        report.image_rows(
            "Near-duplicates: the largest tracks, and some of two images or more", _track_rows(looked, found)
        )
    )
    blocks.append(report.image_rows("Estimated groups, the largest first", _group_rows(looked, found)))
    if told["broken"]:
        shown = list(told["broken"].items())[:200]
        note = f"{len(shown):,} of {len(told['broken']):,}" if len(shown) < len(told["broken"]) else ""
        blocks.append(report.table("Broken files", ["file", "why"], shown, None, note=note))
    return blocks


def _track_rows(looked: ScanResult, found: Found) -> list[report.ImageRow]:
    names, sizes = found.tracks.unique(return_counts=True)
    order = sizes.argsort(descending=True, stable=True)
    order = order[: int((sizes > 1).sum())]
    some = torch.linspace(0, len(order) - 1, min(len(order), 12)).long().unique()
    rows = []
    for track, size in zip(names[order[some]].tolist(), sizes[order[some]].tolist(), strict=True):
        members = (found.tracks == track).nonzero().squeeze(1)
        shown = members[torch.linspace(0, len(members) - 1, min(len(members), 10)).long()]
        rows.append(report.ImageRow(f"{size:,} images", list(looked.pictures[shown])))
    return rows


def _group_rows(looked: ScanResult, found: Found) -> list[report.ImageRow]:
    """Of each group some tracks, one image each."""
    rows = []
    for group in range(min(int(found.groups.max()) + 1, 30)):
        members = (found.groups == group).nonzero().squeeze(1)
        own = found.tracks[members].unique(return_inverse=True)[1]
        count = int(own.max()) + 1
        first = torch.full((count,), len(own)).scatter_reduce_(0, own, torch.arange(len(own)), "amin")
        shown = members[first[torch.linspace(0, count - 1, min(count, 10)).long()]]
        caption = f"Group {group + 1}: {count:,} tracks, {len(members):,} images"
        rows.append(report.ImageRow(caption, list(looked.pictures[shown])))
    return rows


def _tail(groups: Int64[Tensor, " n"]) -> Tail:
    sizes = torch.bincount(groups).sort(descending=True).values
    sizes = sizes[sizes > 0]
    return Tail(long_tail.exponential_imbalance(sizes), long_tail.gini(sizes), sizes.tolist())


def _quartiles(values: Int64[Tensor, " M"]) -> list[float]:
    """Smallest, quartiles, largest."""
    return [float(value) for value in np.quantile(values.numpy(), [0, 0.25, 0.5, 0.75, 1])]


def _histogram(sides: Int64[Tensor, " M"]) -> dict[str, int]:
    """How many images have a shorter side from one power of two to the next."""
    powers, counts = sides.clamp(min=1).double().log2().floor().long().unique(return_counts=True)
    return {f"{2**p} to {2 ** (p + 1) - 1}": n for p, n in zip(powers.tolist(), counts.tolist(), strict=True)}


def _formats(part: Images, places: Int64[Tensor, " M"]) -> dict[str, int]:
    """Suffixes of the readable images' names, or of the videos that they are of, the most frequent first."""
    names = (_COPY.sub("", part.paths[i]) for i in places.tolist())
    suffixes = (os.path.splitext(name)[1].lower().lstrip(".") or "not in the name" for name in names)
    return dict(Counter(suffixes).most_common())
