"""The series of a run, read from its metrics.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

from crosslevel.utils.errors import UserError


def read_metrics(csv_path: str | Path, x: Literal["epoch", "step"] = "epoch") -> dict[str, list[tuple[float, float]]]:
    """The columns of a run's ``metrics.csv`` as series of (x, value), empty cells left out.

    Raises:
        ValueError: a row has no ``x``, or a cell is not a number.

    """
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        lines = enumerate(csv.DictReader(file), start=2)
        rows = [{k: _number(v, k, i, csv_path) for k, v in line.items() if k and v} for i, line in lines]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if x not in row:
            raise UserError(f"{csv_path}: a row has no {x}: is this a metrics.csv?")
        for name in row.keys() - {"epoch", "step"}:
            series.setdefault(name, []).append((row[x], row[name]))
    return dict(sorted(series.items()))


def _number(cell: str, column: str, line: int, path: str | Path) -> float:
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{path}, line {line}: {column} is {cell!r}, not a number") from None
