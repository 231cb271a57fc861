"""``crosslevel inspect``: what is in a collection: sizes, damage, duplicates, long tail, and what follows."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from crosslevel import images as image_sources
from crosslevel import report
from crosslevel.collection import Found, Looked, find, known_features, look
from crosslevel.encoder import load_encoder
from crosslevel.features import Place
from crosslevel.hardware import Device, Precision, choose
from crosslevel.images import BadFiles, Crops, Images, subsets
from crosslevel.images.health import escaped
from crosslevel.metrics import long_tail

SHOWN_BROKEN = 20
_COPY = re.compile(r"#(?:t=[\d.]+|\d+)$")  # a copy, an object or a frame of what is named before it
# Features of constructed classes: from a mean silhouette of about 0.25 on, sizes of groups ranked the true imbalance
# (Spearman at least 0.9); short runs on images reached 0.22 at most, and theirs did not.
APART = 0.25


@dataclass(frozen=True)
class Advice:
    """A setting, the value that this collection suggests (None: none), and why."""

    setting: str
    value: float | int | str
    reason: str


@dataclass(frozen=True)
class Tail:
    """Estimated groups of one kind of member (images or tracks), largest first."""

    imbalance: float
    gini: float
    sizes: list[int]


def inspect(
    images: str,
    run: str | None = None,
    output: str | None = None,
    batch_size: int = 256,
    sample: int = 100_000,
    seed: int = 0,
    groups: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
    data_root: str | None = None,
    crops: Crops | None = None,
) -> dict[str, Any]:
    """Say what is in a collection: sizes, broken files, duplicates and their tracks, the long tail; no label is read.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        run: the folder of a run, or its encoder.safetensors: near-duplicates and groups by its features as well.
        output: a .json file, or a folder for inspect.json and inspect.html; none is written unless given.
        batch_size: of the training that settings are suggested for.
        sample: the most images to look at; of more, that many are drawn.
        seed: of all draws.
        groups: the most groups to estimate; 20 unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.

    Returns:
        what the JSON file has.
    """
    if batch_size < 2 or sample < 2:
        raise ValueError(f"batch_size={batch_size}, sample={sample}: give at least 2 each")
    console, written = Console(soft_wrap=True), None if output is None else _file(Path(output))
    encoder, hardware = None if run is None else load_encoder(run), choose(device, precision)
    source = image_sources.open(images, data_root=data_root, crops=crops)
    bad, total, generator = source.bad_files(), len(source), torch.Generator().manual_seed(seed)
    part = source if total <= sample else subsets.take(source, subsets.sample(source, sample, generator))
    with _bar(console) as bar:
        task = bar.add_task("looking at images", total=len(part))
        looked = look(part, bad, workers, lambda done: bar.update(task, completed=done))
        task = bar.add_task("comparing", total=None)
        features, threshold = None, 1.0
        if encoder is not None and run is not None:
            home = Path(run) if Path(run).is_dir() else Path(run).parent
            features, threshold = known_features(encoder, part, looked, Place(hardware, workers), home, bad, seed)
        found = find(looked, features, threshold, groups, seed)
        bar.update(task, total=1, completed=1)
    limit = None if features is None else threshold
    told = summary(source.name, total, part, looked, found, bad, batch_size, run, limit)
    _print(console, told)
    if written is not None:
        _write(written, told, looked, found, console)
    return told


def summary(
    name: str, total: int, part: Images, looked: Looked, found: Found, bad: BadFiles, batch_size: int, run: str | None,
    threshold: float | None = None,
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
        "true imbalance of constructed classes; whether a group is what you call a thing, the page's pictures show."
    )


def advise(tracks: Int64[Tensor, " T"], exact: Int64[Tensor, " E"], batch_size: int) -> list[Advice]:
    """Settings that the sizes of tracks suggest.

    Args:
        tracks: images in each track.
        exact: images in each set of equal ones.
        batch_size: of the training.

    """
    count, share = int(tracks.sum()), long_tail.duplicate_share(tracks, batch_size)
    fitting = [b for b in (512, 256, 128, 64, 32) if b <= batch_size and long_tail.duplicate_share(tracks, b) <= 0.25]
    best = batch_size if share <= 0.25 or not fitting else fitting[0]
    different = long_tail.distinct_tracks(tracks, min(best, count))
    said = f"{100 * share:.1f} % of a random batch of {batch_size} have a near-duplicate in it"
    size_reason = f"{said}: few enough for instances to be told apart."
    if best < batch_size:
        size_reason = f"{said}, which an instance loss pushes apart; of {best} at most a quarter have."
    elif share > 0.25:
        size_reason = f"{said}; only batches below 32 would avoid it, which are too small to learn from."
    superfluous, near = int((exact - 1).clamp(min=0).sum()), count - len(tracks)
    drop: Literal["no", "exact copies", "one image a track"] = "no"
    why = "There is next to nothing to remove."
    if near > count / 2 and len(tracks) >= 10_000:
        drop, why = "one image a track", f"{len(tracks):,} different tracks are enough, and an epoch becomes shorter."
    elif superfluous > count / 100:
        drop, why = "exact copies", f"{superfluous:,} images teach nothing that their copies do not."
    elif near > count / 100:
        why = f"Near-duplicates are views that no augmentation makes, and {len(tracks):,} tracks alone would be few."
    return [
        Advice("batch_size", best, size_reason),
        Advice(
            "cld.groups", max(2, round(0.75 * different)),
            f"Three quarters, as by default, of the {different:.0f} different tracks that a batch of {best} holds: "
            "fewer groups the more correlated the images are.",
        ),
        Advice(
            "cld.weight", 0.25,
            "The default, as published for CIFAR-100 and ImageNet: nothing found here speaks for more or less.",
        ),
        Advice("de-duplicate", drop, why),
    ]  # fmt: skip


def _tail(groups: Int64[Tensor, " n"]) -> Tail:
    sizes = torch.bincount(groups).sort(descending=True).values
    sizes = sizes[sizes > 0]
    return Tail(long_tail.imbalance_factor(sizes), long_tail.gini(sizes), sizes.tolist())


def _quartiles(values: Int64[Tensor, " M"]) -> list[float]:
    """Smallest, quartiles, largest."""
    return [float(value) for value in np.quantile(values.numpy(), [0, 0.25, 0.5, 0.75, 1])]


def _histogram(sides: Int64[Tensor, " M"]) -> dict[str, int]:
    """How many images have a shorter side from one power of two to the next."""
    powers, counts = sides.clamp(min=1).double().log2().floor().long().unique(return_counts=True)
    return {f"{2**p} to {2 ** (p + 1) - 1}": n for p, n in zip(powers.tolist(), counts.tolist(), strict=True)}


def _formats(part: Images, places: Int64[Tensor, " M"]) -> dict[str, int]:
    """Suffixes of the readable images' names, or of the films that they are of, the most frequent first."""
    names = (_COPY.sub("", part.paths[i]) for i in places.tolist())
    suffixes = (os.path.splitext(name)[1].lower().lstrip(".") or "not in the name" for name in names)
    return dict(Counter(suffixes).most_common())


def _print(console: Console, told: dict[str, Any]) -> None:
    for heading, rows in _rows(told):
        table = Table(title=heading, show_header=False, title_justify="left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    broken = list(told["broken"].items())
    for path, reason in broken[:SHOWN_BROKEN]:
        console.print(f"{escaped(path)}: {reason}", highlight=False, markup=False)
    if len(broken) > SHOWN_BROKEN:
        console.print(f"and {len(broken) - SHOWN_BROKEN:,} more broken files", highlight=False)


def _rows(told: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
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
                *((name, f"largest / smallest group {found['imbalance']:.1f}, Gini index {found['gini']:.2f}")
                  for name, found in both if tail["separation"] >= APART),
                ("how far to trust it", tail["trust"]),
            ],
        ),
        ("Suggested settings", [(a["setting"], str(a["value"]), a["reason"]) for a in told["advice"]]),
    ]  # fmt: skip


def _file(output: Path) -> Path:
    """The JSON file to write, in a folder that is there from now on.

    Raises:
        ValueError: it cannot be written there.

    """
    if output.suffix in (".html", ".htm", ".csv", ".txt") and not output.is_dir():
        raise ValueError(f"--output {output}: give a folder, or a file that ends in .json")
    file = output if output.suffix == ".json" else output / "inspect.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.filename}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"--output {output}: {file} cannot be written")
    return file


def _write(file: Path, told: dict[str, Any], looked: Looked, found: Found, console: Console) -> None:
    """The JSON file and the page beside it, each whole or not at all."""
    # File names that are not valid UTF-8 become escapes.
    text = json.dumps(told, indent=2) + "\n"
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(file.with_suffix(".tmp"), file)
    subtitle = f"{told['count']:,} images · {time.strftime('%Y-%m-%d')}"
    title, blocks = f"What is in {told['images']}", _blocks(told, looked, found)
    page = report.page(file.with_suffix(".html"), title, blocks, subtitle)
    console.print(f"written: {file}, {page}", highlight=False, markup=False)


def _blocks(told: dict[str, Any], looked: Looked, found: Found) -> list[report.Block]:
    blocks = []
    for heading, rows in _rows(told):
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


def _track_rows(looked: Looked, found: Found) -> list[report.ImageRow]:
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


def _group_rows(looked: Looked, found: Found) -> list[report.ImageRow]:
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


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
