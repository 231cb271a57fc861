"""Figures as tables, and in a file that later calls extend and `crosslevel compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crosslevel.evaluation.protocols import Row
from crosslevel.report import Cell, Measured, cell
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import write
from crosslevel.utils.trees import json_tree

FILE = "evaluation.json"

COLUMNS = {
    "top1": "top-1", "top5": "top-5", "balanced": "balanced", "many": "many", "medium": "medium", "few": "few",
    "recall@1": "recall@1", "recall@5": "recall@5", "recall@10": "recall@10", "map": "mAP",
    "nmi": "NMI", "ari": "ARI", "accuracy": "accuracy", "AP": "AP", "AP50": "AP50", "AP75": "AP75",
}  # fmt: skip
"""The figures that tables show, in their order."""


def print_table(console: Console, title: str, row: Row) -> None:
    """Print the figures, one row for each kind of features; each is followed by the half width of its interval."""
    table = Table(title=f"{title}; in %, ± half of the 95 % interval")
    names = columns(row)
    table.add_column("features")
    for name in names:
        table.add_column(COLUMNS[name], justify="right")
    for kind, scores in row.items():
        table.add_row(kind, *(cell(measured(scores.figures, scores.intervals, name), 1) for name in names))
    console.print(table)
    for kind, scores in row.items():
        if scores.hyperparameters:
            text = ", ".join(f"{name} {value:.4g}" for name, value in scores.hyperparameters.items())
            console.print(f"{kind}: chosen on held-out training images: {text}", highlight=False)


def measured(figures: dict[str, float], intervals: Mapping[str, Sequence[float]] | None, name: str) -> Cell:
    """One figure for a table, with half of its interval if it has one."""
    if name not in figures:
        return None
    low, high = (intervals or {}).get(name, (0.0, 0.0))
    return Measured(figures[name], (high - low) / 2) if high > low else figures[name]


def columns(row: Row) -> list[str]:
    """The names of the available figures, in the table's order."""
    return [name for name in COLUMNS if any(name in scores.figures for scores in row.values())]


def keep(file: Path, metadata: dict[str, Any], row: Row) -> None:
    """Add a result to the file; it replaces an earlier one of the same protocol, images and settings."""
    results: list[dict[str, Any]] = read_results(file) if file.is_file() else []
    new = json.loads(json.dumps(metadata))
    new["accuracy_percent"] = {kind: scores.figures for kind, scores in row.items()}
    new["interval_percent"] = {kind: scores.intervals for kind, scores in row.items() if scores.intervals}
    new["chosen"] = {kind: scores.hyperparameters for kind, scores in row.items() if scores.hyperparameters}
    same = ("protocol", "images", "test", "crops", "settings")
    results = [old for old in results if any(old.get(name) != new.get(name) for name in same)]
    text = json.dumps({"results": [*results, new]}, indent=2) + "\n"
    write(file, text)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The results in an evaluation.json; none for a file of a former version, which had a single result.

    Raises:
        UserError: the file is damaged, or something else.

    """
    try:
        results: list[dict[str, Any]] = json_tree(file.read_text(encoding="utf-8")).get("results", [])
        if all(map(_is_result, results)):
            return results
        reason = "a result lacks its figures"
    except (ValueError, AttributeError, TypeError) as error:
        reason = str(error)
    raise UserError(f"{file} is damaged, or not of crosslevel evaluate ({reason}): delete it, and evaluate again")


def _is_result(result: dict[str, Any]) -> bool:
    """Whether a result has named numbers for each kind of features, and two numbers for each interval."""
    if not {"protocol", "accuracy_percent", "interval_percent"} <= result.keys():
        return False
    figures = [figure for row in result["accuracy_percent"].values() for figure in row.values()]
    ends = [pair for row in result["interval_percent"].values() for pair in row.values()]
    numbers = [*figures, *(end for pair in ends for end in pair)]
    return all(isinstance(number, int | float) for number in numbers) and all(len(pair) == 2 for pair in ends)
