"""Sets of duplicates: which image of each to keep and why. Writes ``duplicates.csv``, and reads it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles, escaped, unescaped
from crosslevel.data.duplicates.alignment import agreement
from crosslevel.data.duplicates.descriptor import difference
from crosslevel.data.duplicates.detect import COPY, Kind, Pairs, duplicate_pairs, tracks
from crosslevel.data.duplicates.scan import ScanResult, scan
from crosslevel.data.images import Images
from crosslevel.data.subsets.select import take
from crosslevel.utils.errors import SourceError
from crosslevel.utils.files import write

COLUMNS = ("set", "path", "kind", "distance", "keep", "why")
NAMES = {Kind.EXACT: "exact", Kind.COPY: "recompressed or resized", Kind.EDITED: "edited", Kind.NEAR: "near"}
KEPT = "kept"  # takes the place of a kind for the image that the others of its set are compared with
_LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_GRADED = 8192  # pairs at a time
_SHOWS_COLOUR = 0.015  # mean difference of a picture's channels, as a share of a pixel's range


class Member(NamedTuple):
    """An image of a set of duplicates, with its number in the scan; kind and distance refer to the kept image."""

    set: int
    number: int
    kind: Kind | None
    distance: float
    keep: bool
    reason: str


def with_exact(scanned: ScanResult, pairs: Pairs) -> Pairs:
    """Add the images of equal pixels to the pairs, as a chain of exact ones."""
    order = scanned.content.argsort(stable=True)
    same = scanned.content[order[1:]] == scanned.content[order[:-1]]
    exact = torch.stack([order[:-1], order[1:]], dim=1)[same]
    return Pairs(
        torch.cat([exact, pairs.images]),
        torch.cat([torch.full((len(exact),), Kind.EXACT.value), pairs.kind]),
        torch.cat([torch.zeros(len(exact)), pairs.distance]),
    )


def duplicate_sets(scanned: ScanResult, pairs: Pairs, paths: Sequence[str]) -> list[Member]:
    """All sets of two images or more: first sets of copies, then sets of near-duplicates, whose images are all kept.

    The copy with the most pixels is kept; among several such, one with colours, then the one most like the others, then
    one in a lossless format, then the first. In a set of near-duplicates, each set of copies is represented by its kept
    image. Which of two edits was the original cannot be seen.

    Args:
        scanned: the pass over the images.
        pairs: all pairs found, the exact ones included.
        paths: of all images of the source.

    """
    count, copies = len(scanned.numbers), pairs.of(pairs.kind <= Kind.EDITED)
    sets = _several(tracks(count, copies.images))
    result = _copies(scanned, sets, paths)
    best = {member.set: member.number for member in result if member.keep}
    representative = torch.arange(count)
    for member in result:
        representative[member.number] = best[member.set]
    views = _several(tracks(count, representative[pairs.of(pairs.kind == Kind.NEAR).images]))
    return result + _views(scanned, views, len(sets) + 1)


def _several(owner: Int64[Tensor, " N"]) -> list[Int64[Tensor, " n"]]:
    """The members of each set of two or more; sets are ordered by their first member."""
    sizes = owner.bincount()
    sets = owner.argsort(stable=True).split(sizes.tolist())
    return sorted((part for part in sets if len(part) > 1), key=lambda part: int(part[0]))


class _Worth(NamedTuple):
    """The criteria by which the image to keep is chosen, the most important first."""

    pixels: int
    colours: bool
    typical: int
    lossless: bool


_REASONS = ("most pixels: {} x {}", "has colours", "most like the others", "a format without loss")


def _worths(scanned: ScanResult, rows: Int64[Tensor, " n"], paths: Sequence[str]) -> list[_Worth]:
    """Pixels, colours, distance from the set's median picture (in steps of 5 % of a pixel's range), lossless format."""
    pictures = scanned.pictures[rows].float() / 255
    median = torch.from_numpy(np.median(pictures.numpy(), axis=0))
    typical = -((pictures - median).square().flatten(1).mean(1).sqrt() / 0.05).round().long()
    colours = (pictures.amax(1) - pictures.amin(1)).mean((1, 2)) > _SHOWS_COLOUR
    names = [paths[i] for i in scanned.numbers[rows].tolist()]
    lossless = [os.path.splitext(name)[1].lower() in _LOSSLESS for name in names]
    columns = (scanned.shape[rows].prod(1).tolist(), colours.tolist(), typical.tolist(), lossless)
    return [_Worth(*row) for row in zip(*columns, strict=True)]


def _copies(scanned: ScanResult, sets: Sequence[Int64[Tensor, " n"]], paths: Sequence[str]) -> list[Member]:
    """The image to keep of each set, then its copies."""
    representatives = [_best(scanned, rows, paths) for rows in sets]
    copies_of = [rows[rows != best] for rows, (best, _) in zip(sets, representatives, strict=True)]
    grades = graded(scanned, _with_first([best for best, _ in representatives], copies_of))
    result = []
    for number, ((best, worth), copies) in enumerate(zip(representatives, copies_of, strict=True), 1):
        result.append(Member(number, best, None, 0.0, True, worth))
        reason = f"a copy of {paths[int(scanned.numbers[best])]}"
        result += [Member(number, i, *next(grades), False, reason) for i in copies.tolist()]
    return result


def _best(scanned: ScanResult, rows: Int64[Tensor, " n"], paths: Sequence[str]) -> tuple[int, str]:
    """The image to keep, and the reason."""
    worths = _worths(scanned, rows, paths)
    index = max(range(len(worths)), key=lambda i: (*worths[i], -i))
    best = int(rows[index])
    # The first criterion by which another image is worse decided between them.
    behind = [k for k, values in enumerate(zip(*worths, strict=True)) if min(values) < values[index]]
    height, width = scanned.shape[best].tolist()
    return best, _REASONS[behind[0]].format(width, height) if behind else "the first of its equals"


def _views(scanned: ScanResult, sets: Sequence[Int64[Tensor, " n"]], number: int) -> list[Member]:
    """Sets of near-duplicates, numbered from ``number`` on: the first image, and the others' distances from it."""
    pairs = _with_first([int(rows[0]) for rows in sets], [rows[1:] for rows in sets])
    distances = iter(difference(scanned.pictures, pairs).tolist() if len(pairs) else [])
    result = []
    for name, (first, *views) in enumerate((rows.tolist() for rows in sets), number):
        result.append(Member(name, first, None, 0.0, True, "the first of its views"))
        reason = "another view: no augmentation makes it"
        result += [Member(name, i, Kind.NEAR, next(distances), True, reason) for i in views]
    return result


def _with_first(firsts: Sequence[int], rest_of_sets: Sequence[Int64[Tensor, " n"]]) -> Int64[Tensor, "P 2"]:
    """Each of the ``rest_of_sets`` as a pair with the first of its set."""
    if not firsts:
        return torch.empty(0, 2, dtype=torch.long)
    sizes = torch.tensor([len(rows) for rows in rest_of_sets])
    return torch.stack([torch.tensor(firsts).repeat_interleave(sizes), torch.cat(list(rest_of_sets))], dim=1)


def graded(scanned: ScanResult, pairs: Int64[Tensor, "P 2"]) -> Iterator[tuple[Kind, float]]:
    """How the second image of each pair differs from the first, whose copy it is: kind and distance."""
    for chunk in pairs.split(_GRADED):
        yield from _graded(scanned, *chunk.T)


def _graded(
    scanned: ScanResult, first: Int64[Tensor, " n"], second: Int64[Tensor, " n"]
) -> Iterator[tuple[Kind, float]]:
    pictures, pairs = scanned.pictures, torch.stack([first, second], dim=1)
    shifted, unshifted = difference(pictures, pairs).tolist(), difference(pictures, pairs, reach=0).tolist()
    turned = torch.stack([edge_distance(pictures[first], side)
                          for side in (pictures[second], pictures[second].flip(3))]).amin(0).tolist()  # fmt: skip
    same = (scanned.content[second] == scanned.content[first]).tolist()
    for equal, plain, moved, edited in zip(same, unshifted, shifted, turned, strict=True):
        if equal:
            yield Kind.EXACT, 0.0
        elif plain <= COPY:
            yield Kind.COPY, moved
        else:
            yield Kind.EDITED, edited


def edge_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 minus the correlation of edges, at least 0."""
    return (1 - agreement(a, b).edges).clamp(min=0)


def described(member: Member, scanned: ScanResult, paths: Sequence[str]) -> dict[str, Any]:
    """A member of a set as a row with the names of `COLUMNS`."""
    return {
        "set": member.set,
        "path": paths[int(scanned.numbers[member.number])],
        "kind": KEPT if member.kind is None else NAMES[member.kind],
        "distance": round(member.distance, 4),
        "keep": "yes" if member.keep else "no",
        "why": member.reason,
    }


def write_csv(file: Path, duplicates: Sequence[Member], scanned: ScanResult, paths: Sequence[str]) -> None:
    """The sets, one image a line: `COLUMNS`, the path escaped as in lists (`subsets.lists`)."""
    rows = [described(member, scanned, paths) for member in duplicates]
    write_rows(file, COLUMNS, rows)


def write_rows(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A table of named columns, whole or not at all; names of files are escaped as in lists (`subsets.lists`)."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) if isinstance(value, str) else value for key, value in row.items()})
    write(file, table.getvalue().encode("utf-8", "surrogateescape"))


def _cell(text: str) -> str:
    """Escape a text, also so that a spreadsheet reads no formula in it; `unescaped` removes the backslash again."""
    return f"\\{escaped(text)}" if text[:1] in ("=", "+", "-", "@") else escaped(text)


def unique(images: Images, file: str = "") -> Images:
    """The images without copies: exact, recompressed, resized and edited copies are dropped; near-duplicates stay.

    Args:
        images: a source.
        file: a ``duplicates.csv`` as `write_csv` writes it: the images that it says not to keep are dropped. Unless
            given, the images are compared, which takes as long as `crosslevel inspect`.

    Raises:
        SourceError: the file cannot be read, or names an image that the source lacks.

    """
    mask = _by_file(images, file) if file else _by_pixels(images)
    return take(images, (~mask).nonzero()[:, 0]) if mask.any() else images


def _by_pixels(images: Images) -> Bool[Tensor, " N"]:
    """Which images are copies; an unreadable image is none."""
    scanned = scan(images, BadFiles())
    pairs = with_exact(scanned, duplicate_pairs(scanned.pictures))
    mask = torch.zeros(len(images), dtype=torch.bool)
    mask[[int(scanned.numbers[m.number]) for m in duplicate_sets(scanned, pairs, images.paths) if not m.keep]] = True
    return mask


def rows_of(file: str, column: str) -> list[tuple[str, str]]:
    """The value of ``column`` and the image's path, for each line of a ``duplicates.csv``.

    Raises:
        SourceError: it cannot be read, or has no such column.

    """
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), set(reader.fieldnames or ())
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{file}: is no duplicates.csv: {error}") from error
    if not {"path", column} <= columns or any(not row["path"] or not row[column] for row in rows):
        raise SourceError(f"{file}: is no duplicates.csv: each line needs a path, and something in the column {column}")
    return [(row[column], unescaped(row["path"])) for row in rows]


def _by_file(images: Images, file: str) -> Bool[Tensor, " N"]:
    """Which images a file says not to keep."""
    rows = rows_of(file, "keep")
    if any(keep not in ("yes", "no") for keep, _ in rows):
        raise SourceError(f"{file}: is no duplicates.csv: the column keep says yes or no")
    dropped = {path for keep, path in rows if keep == "no"}
    flags = torch.tensor([path in dropped for path in images.paths], dtype=torch.bool)
    missing = dropped - set(images.paths) if int(flags.sum()) < len(dropped) else set()
    if missing:
        raise SourceError(
            f"{file}: {len(missing):,} of its {len(dropped):,} copies name no image of {images.name}, {min(missing)} "
            f"first; its own are named like {images.paths[0]}"
        )
    return flags
