"""The page of a curated collection: what went and why, and what was chosen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from crosslevel import report
from crosslevel.curation.findings import Findings
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.table import FeatureTable

SETS, IN_A_SET, MOST = 40, 10, 60  # sets, images of a set, and images of a list on the page; the .csv has all


def write_page(
    file: Path,
    table: FeatureTable,
    findings: Findings,
    rows: Sequence[int],
    reasons: dict[int, str],
    how: str | None,
    pictures: Pictures,
) -> Path:
    """Write the page and return it; ``how`` is None if all the remaining images were taken."""
    counts: list[list[report.Cell]] = [
        ["in all", table.rows, ""],
        [
            "near-duplicates",
            len(findings.copies()),
            f"in {len(findings.representatives):,} sets; one of each is kept" if findings.representatives else "",
        ],
        [
            "broken",
            len(findings.broken),
            "" if findings.has_pictures else "not searched for: the table has no pictures",
        ],
        ["outliers", len(findings.alone), "farther from their ten nearest than any usual image"],
        ["left to choose among", table.rows - len(reasons), ""],
        ["chosen", len(rows), how or "all"],
    ]
    blocks = [report.table("What went, and what stays", ["", "images", ""], counts, None)]
    blocks += _block("Chosen" if how else "Some of what stays", _spread(table, rows, pictures))
    several = list(findings.representatives.items())
    sets = [_set(table, findings, number, representative, pictures) for number, representative in several[:SETS]]
    note = f"the first {SETS} of {len(several):,} sets; the .csv has all" if len(several) > SETS else ""
    blocks += _block("Near-duplicates: the one to keep is first", [row for row in sets if row], note)
    broken = _rows(table, pictures, findings.broken.items(), lambda row, defect: str(defect))
    blocks += _block("Broken", broken, _of(len(findings.broken)))
    alone = _rows(table, pictures, findings.alone.items(), lambda row, distance: f"{distance:.3f}")
    blocks += _block("Outliers, the farthest first", alone, _of(len(findings.alone)))
    verdict = (
        f"{len(rows):,} of {table.rows:,} images {'are chosen' if how else 'stay'}; {len(reasons):,} were left out as "
        "copies, broken or outliers."
    )
    subtitle = f"{table.file.name} · {time.strftime('%Y-%m-%d')}"
    return report.page(file, "What to keep", blocks, subtitle, verdict)


def _of(count: int) -> str:
    return f"the first {MOST} of {count:,}; the .csv has all" if count > MOST else ""


def _block(heading: str, rows: Sequence[report.ImageRow], note: str = "") -> list[report.Block]:
    return [report.image_rows(heading, rows, note)] if rows else []


def _spread(table: FeatureTable, rows: Sequence[int], pictures: Pictures) -> list[report.ImageRow]:
    """Some of the chosen, evenly over the order in which they were chosen."""
    step = max(1, len(rows) // MOST)
    sample = [(row, None) for row in rows[::step][:MOST]]
    return _rows(table, pictures, sample, lambda row, _: "")


def _set(
    table: FeatureTable, findings: Findings, number: int, representative: int, pictures: Pictures
) -> report.ImageRow | None:
    set_rows = (findings.sets == number).nonzero().flatten().tolist()
    order = [representative, *(row for row in set_rows if row != representative)]
    caption = f"{len(set_rows):,} images; keep {table.paths[representative]}"
    return _row(table, pictures, order[:IN_A_SET], caption)


def _rows(
    table: FeatureTable, pictures: Pictures, values: Iterable[tuple[int, Any]], mark: Callable[[int, Any], str]
) -> list[report.ImageRow]:
    """Pictures with a mark each, in as many rows as the page's width makes of them."""
    selected = list(itertools.islice(values, MOST))
    row = _row(table, pictures, [row for row, _ in selected], "", [mark(row, value) for row, value in selected])
    return [] if row is None else [row]


def _row(
    table: FeatureTable, pictures: Pictures, rows: Sequence[int], caption: str, marks: Sequence[str] | None = None
) -> report.ImageRow | None:
    """The available pictures; None if there are none."""
    captions = marks or ["keep" if i == 0 else "" for i in range(len(rows))]
    entries = [
        (pictures[row], mark, (table.paths[row], pictures.file(row))) for row, mark in zip(rows, captions, strict=True)
    ]
    available = [(picture, mark, file) for picture, mark, file in entries if picture is not None]
    if not available:
        return None
    images, below, files = zip(*available, strict=True)
    return report.ImageRow(caption, list(images), list(below), None, list(files))
