"""A collection as a page shows it: points, names, and columns to colour and filter by."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from crosslevel.curation.findings import Findings
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.table import FeatureTable
from crosslevel.metrics.nearest import Neighbours

MOST_NAMES = 1000  # the most distinct values of a categorical column
SIMILAR = 12
GROUPS = 20


@dataclass
class Column:
    """A column with a value for each point: an index into ``names``, or, without names, the number itself."""

    values: np.ndarray[Any, Any]
    names: list[str] = field(default_factory=list)

    def packed(self) -> dict[str, Any]:
        """Encode the column for the page."""
        kind, dtype = ("names", "<u2") if self.names else ("numbers", "<f4")
        return {"kind": kind, "names": self.names, "values": _text(self.values.astype(dtype))}


@dataclass
class Collection:
    """N points of a table; ``rows`` are their rows in it."""

    table: FeatureTable
    rows: Int64[Tensor, " N"]
    unit: Float[Tensor, "N D"]
    points: Float[Tensor, "N 2"]
    near: Neighbours
    columns: dict[str, Column]
    pictures: Pictures

    @property
    def paths(self) -> list[str]:
        """The paths of the points' images."""
        return [self.table.paths[row] for row in self.rows.tolist()]

    def data(self, served: bool) -> str:
        """All data of the page, as JSON; ``served``: whether a server can send pictures and save lists."""
        content: dict[str, Any] = {
            "title": self.table.file.name,
            "all": self.table.rows,
            "served": served,
            "paths": self.paths,
            "points": _text(_unit_square(self.points).numpy().astype("<f4")),
            "columns": {name: column.packed() for name, column in self.columns.items()},
            "similar": _text(self.similar().numpy().astype("<i4")),
            "each": self.similar().shape[1],
        }
        # Escaped, so that no name can end the page's script element.
        return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")

    def similar(self) -> Int64[Tensor, "N k"]:
        """The nearest points of each point, without itself."""
        is_other = self.near.indices != torch.arange(len(self.rows)).unsqueeze(1)
        order = is_other.int().argsort(dim=1, descending=True, stable=True)
        count = min(SIMILAR, self.near.indices.shape[1] - 1)
        return self.near.indices.gather(1, order[:, : max(0, count)])


def columns_of(
    table: FeatureTable, rows: Int64[Tensor, " N"], unit: Float[Tensor, "N D"], findings: Findings, seed: int = 0
) -> dict[str, Column]:
    """Label, track and the table's other columns; groups, near-duplicates, outliers and broken pictures."""
    columns: dict[str, Column] = {}
    if table.labels is not None:
        labels, names = table.labels
        row_labels = labels[rows]
        columns["label"] = Column(torch.where(row_labels < 0, len(names), row_labels).numpy(), [*names, "none"])
    for name in table.other_columns:
        column = _column(table.column(name).to_pylist(), rows)
        if column is not None:
            columns[name] = column
    if len(unit) >= 10 * GROUPS:
        grouped = MiniBatchKMeans(GROUPS, n_init=1, random_state=seed).fit_predict(unit.numpy())
        columns["group"] = Column(grouped, [f"group {i + 1}" for i in range(GROUPS)])
    choices = ["no", "yes"]
    columns["near-duplicate"] = Column((findings.sets >= 0).long().numpy(), choices)
    columns["outlier"] = Column(_marked(len(rows), findings.alone), choices)
    if findings.has_pictures:
        columns["broken"] = Column(_marked(len(rows), findings.broken), choices)
    return columns


def _marked(count: int, rows: dict[int, Any]) -> np.ndarray[Any, Any]:
    marks = np.zeros(count, np.int64)
    marks[list(rows)] = 1
    return marks


def _column(values: Sequence[Any], rows: Int64[Tensor, " N"]) -> Column | None:
    """A column of a table as categories or numbers; None if it is neither."""
    row_values = [values[row] for row in rows.tolist()]
    if any(isinstance(value, float) for value in row_values) and all(
        isinstance(v, int | float | None) for v in row_values
    ):
        return Column(np.array([np.nan if value is None else value for value in row_values]))
    if not all(isinstance(value, str | int | bool | None) for value in row_values):
        return None
    names = sorted({str(value) for value in row_values})
    if len(names) > MOST_NAMES:
        numbers = all(isinstance(value, int | None) for value in row_values)
        return Column(np.array([np.nan if v is None else v for v in row_values], np.float64)) if numbers else None
    number = {name: i for i, name in enumerate(names)}
    return Column(np.array([number[str(value)] for value in row_values]), names)


def _unit_square(points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
    """The points in [0, 1] x [0, 1], in their own proportions."""
    low, high = points.aminmax(dim=0)
    extent = float((high - low).max())
    return 0.5 + (points - (low + high) / 2) / (extent if extent > 0 else 1) * 0.98


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
