"""The series of a run, read from the metrics that Lightning wrote."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Literal


def read_metrics(csv_path: str | Path, x: Literal["epoch", "step"] = "epoch") -> dict[str, list[tuple[float, float]]]:
    """The columns of a Lightning ``metrics.csv`` as series of (x, value), empty cells left out.

    Lightning writes whole epochs; where a step stands beside them, x is the fraction (step + 1) / (steps an
    epoch), the latter taken from the furthest step that an epoch reached. Without epochs, x is the step.

    Raises:
        ValueError: there is neither an epoch nor a step, or a cell is not a number.

    """
    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        lines = enumerate(csv.DictReader(file), start=2)
        rows = [{k: _number(v, k, i, csv_path) for k, v in line.items() if k and v} for i, line in lines]
    for row in rows:
        if not row.keys() & {"epoch", "step"}:
            raise ValueError(f"{csv_path}: a row has neither an epoch nor a step: is this a metrics.csv?")
    ends = [(row["step"] + 1) / (row["epoch"] + 1) for row in rows if row.keys() >= {"epoch", "step"}]
    whole = all(row.get("epoch", 0.0).is_integer() for row in rows)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at = row.get(x, row.get("step", row.get("epoch", math.nan)))
        if x == "epoch" and whole and ends and "step" in row:
            at = (row["step"] + 1) / max(ends)
        for name in row.keys() - {"epoch", "step"}:
            series.setdefault(name, []).append((at, row[name]))
    return dict(sorted(series.items()))


def _number(cell: str, column: str, line: int, path: str | Path) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{path}, line {line}: {column} is {cell!r}, not a number") from None
