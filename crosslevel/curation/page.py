"""The page of a curated collection: what went and why, and what was chosen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from crosslevel import report
from crosslevel.curation.looks import Looks
from crosslevel.features.table import FeatureTable
from crosslevel.features.thumbnails import Pictures

SETS, A_ROW, ROWS = 40, 10, 6  # on the page; the .csv has all


def write_page(
    file: Path,
    table: FeatureTable,
    seen: Looks,
    rows: Sequence[int],
    why: dict[int, str],
    how: str | None,
    pictures: Pictures,
) -> Path:
    """Write the page and return it; ``how`` is None where all that is left was taken."""
    counts: list[list[report.Cell]] = [
        ["images", table.rows, ""],
        ["near-duplicates", len(seen.copies()), f"in {len(seen.kept):,} sets; one of each is kept"],
        ["broken", len(seen.broken), "" if seen.seen else "not looked for: the table has no pictures"],
        ["outliers", len(seen.alone), "farther from their ten nearest than any usual image"],
        ["left to choose among", table.rows - len(why), ""],
        ["chosen", len(rows), how or "all"],
    ]
    blocks = [report.table("What went, and what stays", ["", "images", ""], counts, None)]
    blocks += _block("Chosen" if how else "Some of what stays", _spread(table, rows, pictures))
    several = list(seen.kept.items())
    sets = [_set(table, seen, number, kept, pictures) for number, kept in several[:SETS]]
    note = f"the first {SETS} of {len(several):,} sets; the .csv has all" if len(several) > SETS else ""
    blocks += _block("Near-duplicates: the one to keep is first", [row for row in sets if row], note)
    broken = _rows(table, pictures, seen.broken.items(), lambda row, what: str(what))
    blocks += _block("Broken", broken, _of(len(seen.broken)))
    alone = _rows(table, pictures, seen.alone.items(), lambda row, distance: f"{distance:.3f}")
    blocks += _block("Outliers, the farthest first", alone, _of(len(seen.alone)))
    verdict = (
        f"{len(rows):,} of {table.rows:,} images {'are chosen' if how else 'stay'}: {len(why):,} are copies, broken or "
        "outliers."
    )
    subtitle = f"{table.file.name} · {time.strftime('%Y-%m-%d')}"
    return report.page(file, "What to keep", blocks, subtitle, verdict)


def _of(count: int) -> str:
    return f"the first {ROWS * A_ROW} of {count:,}; the .csv has all" if count > ROWS * A_ROW else ""


def _block(heading: str, rows: Sequence[report.ImageRow], note: str = "") -> list[report.Block]:
    return [report.image_rows(heading, rows, note)] if rows else []


def _spread(table: FeatureTable, rows: Sequence[int], pictures: Pictures) -> list[report.ImageRow]:
    """Some of the chosen, evenly over the order in which they were chosen."""
    step = max(1, len(rows) // (ROWS * A_ROW))
    some = [(row, None) for row in rows[::step][: ROWS * A_ROW]]
    return _rows(table, pictures, some, lambda row, _: "")


def _set(table: FeatureTable, seen: Looks, number: int, kept: int, pictures: Pictures) -> report.ImageRow | None:
    members = (seen.sets == number).nonzero().flatten().tolist()
    order = [kept, *(row for row in members if row != kept)]
    caption = f"{len(members):,} images; keep {table.paths[kept]}"
    return _row(table, pictures, order[:A_ROW], caption)


def _rows(
    table: FeatureTable, pictures: Pictures, found: Iterable[tuple[int, Any]], mark: Callable[[int, Any], str]
) -> list[report.ImageRow]:
    """Pictures with a mark each, `A_ROW` side by side."""
    some = list(itertools.islice(found, ROWS * A_ROW))
    made = []
    for first in range(0, len(some), A_ROW):
        part = some[first : first + A_ROW]
        row = _row(table, pictures, [row for row, _ in part], "", [mark(row, value) for row, value in part])
        made += [] if row is None else [row]
    return made


def _row(
    table: FeatureTable, pictures: Pictures, rows: Sequence[int], caption: str, marks: Sequence[str] | None = None
) -> report.ImageRow | None:
    """The pictures that there are; None where there are none."""
    told = marks or ["keep" if i == 0 else "" for i in range(len(rows))]
    found = [
        (pictures[row], mark, (table.paths[row], pictures.file(row))) for row, mark in zip(rows, told, strict=True)
    ]
    shown = [(picture, mark, file) for picture, mark, file in found if picture is not None]
    if not shown:
        return None
    images, below, files = zip(*shown, strict=True)
    return report.ImageRow(caption, list(images), list(below), None, list(files))
