"""Writes a page as one self-contained HTML file, and makes blocks of text, tables and code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from crosslevel.utils.errors import UserError, hidden
from crosslevel.utils.files import write

Best = Literal["max", "min"] | None


class Measured(NamedTuple):
    """A figure and half of its interval; shown as 48.4 ±2.2."""

    value: float
    half: float


Cell = str | float | Measured | None


@dataclass(frozen=True)
class Block:
    """One section of a page: ``kind`` names the template's macro that draws ``content``."""

    kind: str
    heading: str
    content: Mapping[str, Any]


def page(path: str | Path, title: str, blocks: Sequence[Block], subtitle: str = "", verdict: str = "") -> Path:
    """Write ``blocks`` as one HTML file, atomically, and return its path; ``verdict`` stands at the top.

    As a page may be sent to others, secrets in addresses are hidden everywhere.
    """
    path = Path(path)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_published
    )
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(title=title, subtitle=subtitle, verdict=verdict, blocks=blocks)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name that is not valid UTF-8 reaches Python with surrogates, which cannot be encoded.
    write(path, html.encode("utf-8", "replace"))
    return path


def _published(value: Any) -> Any:
    return hidden(value) if type(value) is str else value  # only the template contains markup


def text(heading: str, paragraphs: str | Sequence[str]) -> Block:
    """Plain paragraphs."""
    return Block("text", heading, {"paragraphs": [paragraphs] if isinstance(paragraphs, str) else paragraphs})


def table(
    heading: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    best: Best | Sequence[Best] = "max",
    *,
    note: str = "",
    digits: int = 1,
) -> Block:
    """A table whose best numbers are marked, for each column by ``best`` (one for all, or one a column).

    Floats are shown to ``digits`` decimals; None and NaN as a dash. Numbers that look equal share the mark; a
    column with fewer than two finite numbers has none. A `Measured` number that is not clearly behind the best is a
    tie.

    Raises:
        ValueError: the number of entries in a row, or in ``best``, differs from the number of columns.

    """
    marks = [best] * len(columns) if best is None or isinstance(best, str) else list(best)
    for name, entries in [("best", marks), *((f"row {i}", row) for i, row in enumerate(rows))]:
        if len(entries) != len(columns):
            raise UserError(f"{name} of table {heading!r} has {len(entries)} entries, need {len(columns)}")
    by_column = [[_plain(row[j]) for row in rows] for j in range(len(columns))]
    content = {
        "columns": columns,
        "rows": [[cell(value, digits) for value in row] for row in rows],
        "best": [_best(column, mark, digits) for column, mark in zip(by_column, marks, strict=True)],
        "tied": [ties([row[j] for row in rows], mark, digits) for j, mark in enumerate(marks)],
        "numeric": [any(isinstance(value, Real) for value in column) for column in by_column],
        "note": note,
    }
    return Block("table", heading, content)


def settings(heading: str, yaml_text: str) -> Block:
    """The settings of a run, collapsed at first."""
    return Block("settings", heading, {"yaml": yaml_text})


def commands(heading: str, lines: Sequence[str]) -> Block:
    """Shell commands to copy, one a line."""
    return Block("commands", heading, {"lines": lines})


def cell(value: Cell, digits: int) -> str:
    """A value as a table shows it."""
    if isinstance(value, Measured):
        return f"{cell(value.value, digits)} ±{cell(value.half, digits)}"
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool) or not isinstance(value, Real):
        return str(value)
    return f"{int(value):,}" if isinstance(value, Integral) else f"{float(value):z,.{digits}f}"


def _plain(value: Cell) -> str | float | None:
    return value.value if isinstance(value, Measured) else value


def _best(column: Sequence[Any], mark: Best, digits: int) -> set[int]:
    """The rows with the best number of the column, as rounded for display."""
    numbers = {i: float(v) for i, v in enumerate(column) if isinstance(v, Real) and math.isfinite(v)}
    if mark is None or len(numbers) < 2:
        return set()
    top = (max if mark == "max" else min)(numbers, key=lambda i: numbers[i])
    return {i for i in numbers if cell(column[i], digits) == cell(column[top], digits)}


def ties(column: Sequence[Cell], mark: Best, digits: int = 1) -> set[int]:
    """The rows, other than the best, whose distance from the best of the column is within the interval of both.

    That interval is the root of the sum of the squared half widths, as for independent measurements.
    """
    best = _best([_plain(value) for value in column], mark, digits)
    tops = [top for i in best if isinstance(top := column[i], Measured)]
    if not tops:
        return set()
    return {
        i
        for i, value in enumerate(column)
        if i not in best
        and isinstance(value, Measured)
        and any(abs(top.value - value.value) <= math.hypot(top.half, value.half) for top in tops)
    }
