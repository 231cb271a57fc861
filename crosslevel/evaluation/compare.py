"""``crosslevel compare``: the evaluations of several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from crosslevel import report
from crosslevel.evaluation.results import COLUMNS, FILE, measured, read_results
from crosslevel.report import Cell, Measured, cell, ties
from crosslevel.runs import Run
from crosslevel.utils.console import printer
from crosslevel.utils.errors import NotThere, UserError
from crosslevel.utils.files import write
from crosslevel.utils.marks import verb

TRAINED, UNTRAINED, PIXELS = "trained encoder", "untrained encoder", "raw pixels"
NOTE = "±: half of the 95 % interval. ≈: tied with the best, as the difference lies within the interval of both."


class Comparison(NamedTuple):
    """The table of one protocol on the same images with the same settings: a row for each run, then the baselines."""

    title: str
    note: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]

    def best(self, column: int) -> set[int]:
        """The rows with the highest figure of the column, as rounded for display."""
        numbers = {i: _number(row[column]) for i, (_, row) in enumerate(self.rows) if row[column] is not None}
        if len(numbers) < 2:
            return set()
        return {i for i, number in numbers.items() if number == max(numbers.values())}

    def ties(self, column: int) -> set[int]:
        """The rows whose distance from the best is within the interval of both."""
        return ties([row[column] for _, row in self.rows], "max")

    def verdict(self) -> str:
        """A sentence that names the best row by the first column, or the tied ones."""
        best, tied = sorted(self.best(0)), sorted(self.ties(0))
        name, figure = COLUMNS[self.columns[0]], cell(self.rows[best[0]][1][0], 1) if best else "–"
        leaders = [self.rows[i][0] for i in (*best, *tied)]
        if len(leaders) < 2:
            return f"{self.title}: best is {leaders[0] if leaders else 'no row'}, with {name} {figure} %."
        return (
            f"{self.title}: no difference beyond chance between {', '.join(leaders)}; the highest {name} is {figure} %."
        )


@verb()
def compare(runs: list[str], output: str = "comparison", quiet: bool = False) -> list[Comparison]:
    """Put the evaluations of several runs side by side, with the best value of each column, and its ties, marked.

    One table contains only results of `crosslevel evaluate` on the same images with the same settings. A further table
    has the settings in which the runs differ.

    Args:
        runs: folders of runs, or their evaluation files.
        output: the tables are written as OUTPUT.md and OUTPUT.html.
        quiet: print nothing.

    Returns:
        the tables.
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run: give at least two to compare")
    runs_by_name = _by_name(runs)
    tables, differing = (
        comparisons({name: read_results(_file(run)) for name, run in runs_by_name.items()}),
        _differing(runs_by_name),
    )
    console = printer(quiet)
    for table in tables:
        console.print(_printed(table))
        console.print(table.verdict(), table.note, highlight=False, markup=False)
    for name, values in differing.items():
        console.print(f"{name}: {', '.join(map('{}: {}'.format, runs_by_name, values))}", highlight=False, markup=False)
    output_dir = Path(output)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    written = [*map(markdown, tables), *([_settings_markdown(differing, list(runs_by_name))] if differing else [])]
    write(output_dir.with_name(f"{output_dir.name}.md"), "\n".join(written).encode("utf-8", "surrogateescape"))
    verdict = " ".join(table.verdict() for table in tables)
    page = report.page(
        output_dir.with_name(f"{output_dir.name}.html"), "Runs side by side",
        _blocks(tables, differing, list(runs_by_name)), ", ".join(runs_by_name), verdict,
    )  # fmt: skip
    console.print(f"written to {output_dir}.md and {page}; next: look at {page}", highlight=False, markup=False)
    return tables


def comparisons(results: dict[str, list[dict[str, Any]]]) -> list[Comparison]:
    """The tables of all evaluations that at least two runs share.

    Raises:
        ValueError: no two runs share an evaluation.

    """
    by_title: dict[str, dict[str, dict[str, Any]]] = {}
    for run, evaluations in results.items():
        for result in evaluations:
            key = json.dumps([result.get(name) for name in ("protocol", "images", "test", "settings")], sort_keys=True)
            by_title.setdefault(key, {})[run] = result
    tables = [_table(by_run) for by_run in by_title.values() if len(by_run) > 1]
    if not tables:
        raise UserError(
            f"{', '.join(results)} have no evaluation in common: call crosslevel evaluate on each with the same "
            "images, --test and settings"
        )
    return tables


def _table(by_run: dict[str, dict[str, Any]]) -> Comparison:
    kinds = {run: (result, TRAINED) for run, result in by_run.items()} | _baselines(by_run)
    figures = {name: result["accuracy_percent"].get(kind, {}) for name, (result, kind) in kinds.items()}
    columns = [name for name in COLUMNS if any(name in row for row in figures.values())]
    rows = [
        (name, [measured(figures[name], result["interval_percent"].get(kind), column) for column in columns])
        for name, (result, kind) in kinds.items()
    ]
    first = next(iter(by_run.values()))
    note = f"{first.get('images')}, tested on {first.get('test')}."
    return Comparison(str(first["protocol"]), note, columns, rows)


def _baselines(by_run: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], str]]:
    """Raw pixels once; the untrained network once if all runs have the same one, otherwise that of each run."""
    have = {run: result for run, result in by_run.items() if UNTRAINED in result["accuracy_percent"]}
    different = {json.dumps(result["accuracy_percent"][UNTRAINED], sort_keys=True) for result in have.values()}
    rows = {f"{UNTRAINED}, {run}" if len(different) > 1 else UNTRAINED: (r, UNTRAINED) for run, r in have.items()}
    pixels = [result for result in by_run.values() if PIXELS in result["accuracy_percent"]]
    return rows | ({PIXELS: (pixels[0], PIXELS)} if pixels else {})


def _differing(runs_by_name: Mapping[str, str]) -> dict[str, list[str]]:
    """The settings in which the runs differ, one value for each run; runs without a config.yaml have none."""
    flat = []
    for run in runs_by_name.values():
        folder = Run(run if Path(run).is_dir() else Path(run).parent)
        flat.append(_flat(folder.settings()) if folder.config.is_file() else {})
    if not all(flat):
        return {}
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    values = {name: [str(settings.get(name, "–")) for settings in flat] for name in names}
    return {name: distinct for name, distinct in values.items() if len(set(distinct)) > 1}


def _flat(tree: Any, before: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {before: tree}
    out: dict[str, Any] = {}
    for name, value in tree.items():
        step = "" if name == "init_args" else name
        out |= _flat(value, ".".join(filter(None, (before, step))))
    return out


def _number(value: Cell) -> float:
    number = value.value if isinstance(value, Measured) else value
    return round(float(number or 0.0), 1)


def _marked(table: Comparison, before: str, after: str) -> list[list[str]]:
    """Every row as text; the best of each column stands between two marks, ties are followed by a third."""
    best, tied = ([pick(j) for j in range(len(table.columns))] for pick in (table.best, table.ties))

    def formatted(value: Cell, i: int, j: int) -> str:
        text = cell(value, 1)
        return f"{before}{text}{after}" if i in best[j] else f"≈ {text}" if i in tied[j] else text

    return [[name, *(formatted(v, i, j) for j, v in enumerate(row))] for i, (name, row) in enumerate(table.rows)]


def _printed(table: Comparison) -> Table:
    printed = Table(title=f"{table.title}; in %, * is best, ≈ tied with it, ± half of the 95 % interval")
    printed.add_column("run")
    for name in table.columns:
        printed.add_column(COLUMNS[name], justify="right")
    for row in _marked(table, "* ", ""):
        printed.add_row(*row)
    return printed


def _blocks(tables: list[Comparison], differing: Mapping[str, list[str]], runs: list[str]) -> list[report.Block]:
    blocks = [
        report.table(table.title, ["run", *(COLUMNS[c] for c in table.columns)], [[n, *r] for n, r in table.rows],
                     note=f"{table.note} ±: half of the 95 % interval.")
        for table in tables
    ]  # fmt: skip
    if differing:
        rows: list[list[Cell]] = [[name, *values] for name, values in differing.items()]
        blocks.append(report.table("Settings in which they differ", ["setting", *runs], rows, None))
    return blocks


def markdown(table: Comparison) -> str:
    """One table for a document, the best in bold, its ties marked."""
    names = ["run", *(COLUMNS[column] for column in table.columns)]
    head = [f"## {table.title}", "", table.verdict(), "", f"{table.note} {NOTE}", ""]
    return "\n".join([*head, *_rows(names, _marked(table, "**", "**")), ""])


def _settings_markdown(differing: Mapping[str, list[str]], runs: list[str]) -> str:
    rows = [[name, *values] for name, values in differing.items()]
    return "\n".join(["## Settings in which they differ", "", *_rows(["setting", *runs], rows), ""])


def _rows(names: list[str], rows: list[list[str]]) -> list[str]:
    rule = "|---" + "|---:" * (len(names) - 1) + "|"
    return [f"| {' | '.join(names)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def _file(run: str) -> Path:
    file = Path(run) / FILE if Path(run).is_dir() else Path(run)
    if not file.is_file():
        raise NotThere(f"{run} has no {FILE}: call crosslevel evaluate {run} first")
    return file


def _by_name(runs: list[str]) -> dict[str, str]:
    """Runs by their folder's name, or their path where two have the same name."""
    folders = [Path(run) if Path(run).is_dir() else Path(run).parent for run in runs]
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else run for name, run in zip(short, runs, strict=True)]
    return dict(zip(names, runs, strict=True))
