"""``crosslevel compare``: the evaluations of several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from crosslevel import report
from crosslevel.evaluation.results import COLUMNS, FILE, measured, read_results
from crosslevel.report import Cell, Measured, cell
from crosslevel.utils.errors import NotThere, UserError
from crosslevel.utils.files import write
from crosslevel.utils.marks import verb
from crosslevel.utils.terminal import Terminal

TRAINED, PIXELS = "trained encoder", "raw pixels"


class Comparison(NamedTuple):
    """One protocol on the same images under the same settings: a row a run."""

    title: str
    note: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@verb()
def compare(runs: list[str], output: str = "comparison", quiet: bool = False) -> list[Comparison]:
    """Put the evaluations of several runs side by side, with the best value of each column marked.

    Only what `crosslevel evaluate` found on the same images under the same settings stands in one table.

    Args:
        runs: folders of runs, or their evaluation files.
        output: where the tables are written, as OUTPUT.md and OUTPUT.html.
        quiet: print nothing.

    Returns:
        the tables.
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run: give at least two to compare")
    tables = comparisons({name: read_results(_file(run)) for name, run in _named(runs).items()})
    console = Terminal(quiet=quiet)
    for table in tables:
        console.print(_printed(table))
        console.print(table.note, highlight=False, markup=False)
    home = Path(output)
    home.parent.mkdir(parents=True, exist_ok=True)
    write(home.with_name(f"{home.name}.md"), "\n".join(map(markdown, tables)).encode("utf-8", "surrogateescape"))
    blocks = [
        report.table(table.title, ["run", *(COLUMNS[c] for c in table.columns)], [[n, *r] for n, r in table.rows],
                     note=f"{table.note} ±: half of the 95 % interval.")
        for table in tables
    ]  # fmt: skip
    page = report.page(home.with_name(f"{home.name}.html"), "Runs side by side", blocks, ", ".join(_named(runs)))
    console.print(f"written to {home}.md and {page}; next: look at {page}", highlight=False, markup=False)
    return tables


def comparisons(results: dict[str, list[dict[str, Any]]]) -> list[Comparison]:
    """The tables of all evaluations that at least two runs share.

    Raises:
        ValueError: there is none.

    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run, own in results.items():
        for result in own:
            key = json.dumps([result[name] for name in ("protocol", "images", "test", "settings")], sort_keys=True)
            found.setdefault(key, {})[run] = result
    tables = [_table(by_run) for by_run in found.values() if len(by_run) > 1]
    if not tables:
        raise UserError(
            f"{', '.join(results)} have no evaluation in common: call crosslevel evaluate on each with the same "
            "images, --test and settings"
        )
    return tables


def _table(by_run: dict[str, dict[str, Any]]) -> Comparison:
    kinds = {run: (result, TRAINED) for run, result in by_run.items()}
    first = next(iter(by_run.values()))
    if PIXELS in first["accuracy_percent"]:
        kinds[PIXELS] = (first, PIXELS)
    figures = {name: result["accuracy_percent"][kind] for name, (result, kind) in kinds.items()}
    columns = [name for name in COLUMNS if any(name in row for row in figures.values())]
    rows = [
        (name, [measured(figures[name], result["interval_percent"].get(kind), column) for column in columns])
        for name, (result, kind) in kinds.items()
    ]
    return Comparison(first["protocol"], f"{first['images']}, tested on {first['test']}.", columns, rows)


def _best(table: Comparison, column: int) -> set[int]:
    """The rows whose figure is, as it is shown, the column's highest."""
    numbers = {i: _number(row[column]) for i, (_, row) in enumerate(table.rows) if row[column] is not None}
    if len(numbers) < 2:
        return set()
    return {i for i, number in numbers.items() if number == max(numbers.values())}


def _number(value: Cell) -> float:
    shown = value.value if isinstance(value, Measured) else value
    return round(float(shown or 0.0), 1)


def _marked(table: Comparison, before: str, after: str) -> list[list[str]]:
    """Every row as text, the best of each column between two marks."""
    best = [_best(table, j) for j in range(len(table.columns))]
    return [
        [name, *(f"{before}{cell(v, 1)}{after}" if i in best[j] else cell(v, 1) for j, v in enumerate(row))]
        for i, (name, row) in enumerate(table.rows)
    ]


def _printed(table: Comparison) -> Table:
    shown = Table(title=f"{table.title}; in %, * is best, ± half of the 95 % interval")
    shown.add_column("run")
    for name in table.columns:
        shown.add_column(COLUMNS[name], justify="right")
    for row in _marked(table, "* ", ""):
        shown.add_row(*row)
    return shown


def markdown(table: Comparison) -> str:
    """One table for a document, the best in bold."""
    names = ["run", *(COLUMNS[column] for column in table.columns)]
    lines = [
        f"## {table.title}",
        "",
        table.note,
        "",
        f"| {' | '.join(names)} |",
        "|---" + "|---:" * len(table.columns) + "|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _marked(table, "**", "**")]
    return "\n".join([*lines, ""])


def _file(run: str) -> Path:
    file = Path(run) / FILE if Path(run).is_dir() else Path(run)
    if not file.is_file():
        raise NotThere(f"{run} has no {FILE}: call crosslevel evaluate {run} first")
    return file


def _named(runs: list[str]) -> dict[str, str]:
    """Runs by their folder's name, or their path where two have the same name."""
    folders = [Path(run) if Path(run).is_dir() else Path(run).parent for run in runs]
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else run for name, run in zip(short, runs, strict=True)]
    return dict(zip(names, runs, strict=True))
