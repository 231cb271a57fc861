"""Reports: one self-contained HTML page that shows what a run did, with charts and pictures.

A page is a sequence of blocks; each block function is pure and turns numbers or pictures into one section.
Names given by users (files, classes) are escaped by the template. The charts are SVG whose colours are the page's CSS
variables, so that they follow light and dark mode.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crosslevel.report.metrics_csv import read_metrics
from crosslevel.report.page import Best, Block, Cell, Measured, cell, commands, page, settings, table, text, ties
from crosslevel.report.pictures import MAP_POINTS, THUMBNAIL, ImageRow, image_rows, map2d
from crosslevel.report.selection import group_rows, neighbour_rows, project

if TYPE_CHECKING:
    from crosslevel.report.charts import Series, bars, curves
    from crosslevel.report.search_charts import Axis, history, parallel

__all__ = [
    "MAP_POINTS",
    "THUMBNAIL",
    "Axis",
    "Best",
    "Block",
    "Cell",
    "ImageRow",
    "Measured",
    "Series",
    "bars",
    "cell",
    "commands",
    "curves",
    "group_rows",
    "history",
    "image_rows",
    "map2d",
    "neighbour_rows",
    "page",
    "parallel",
    "project",
    "read_metrics",
    "settings",
    "table",
    "text",
    "ties",
]

_CHARTS = {
    "Axis": "search_charts", "Series": "charts", "bars": "charts", "curves": "charts", "history": "search_charts",
    "parallel": "search_charts",
}  # fmt: skip
"""Functions that need matplotlib, imported on first use: most runs draw nothing before their end."""


def __getattr__(name: str) -> Any:
    if name not in _CHARTS:
        raise AttributeError(f"module 'crosslevel.report' has no attribute {name!r}")
    return getattr(import_module(f"crosslevel.report.{_CHARTS[name]}"), name)
