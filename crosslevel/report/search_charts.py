"""Charts of a search: how the score grew, and which settings led to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crosslevel.report.charts import _COLOURS, _STYLE, _VARIABLES, WIDTH, _short, _svg, two_widths
from crosslevel.report.page import Block


class Axis(NamedTuple):
    """The axis of a parameter: from ``low`` to ``high``, logarithmic with ``log``; or its ``choices``."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()

    def position(self, value: Any) -> float:
        """The position of a value in [0, 1], from low to high."""
        if self.choices:
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        low, high, at = np.log([self.low, self.high, value]) if self.log else (self.low, self.high, value)
        return float((at - low) / (high - low)) if high > low else 0.5


def history(
    heading: str, points: Sequence[tuple[int, float, bool]], x_label: str, y_label: str, note: str = ""
) -> Block:
    """A dot for each trial (number, score, whether it was completed: filled or hollow), and the best score so far."""
    complete = np.array([done for *_, done in points], dtype=bool)
    x, y = np.array([point[:2] for point in points], dtype=np.float64).reshape(-1, 2).T
    best = np.maximum.accumulate(np.where(complete, y, -np.inf))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.step(x[np.isfinite(best)], best[np.isfinite(best)], where="post", color=_COLOURS[1])
        for mask, face in ((complete, _COLOURS[0]), (~complete, "none")):
            axes.plot(x[mask], y[mask], "o", color=_COLOURS[0], markerfacecolor=face)
        last = f"{best[-1]:.4g}" if len(best) and np.isfinite(best[-1]) else "none"
        legend = [
            {"name": "trials", "symbol": "●", "colour": _VARIABLES[_COLOURS[0]], "value": f"{len(points):,}"},
            {"name": "best so far", "symbol": "━", "colour": _VARIABLES[_COLOURS[1]], "value": last},
        ]
        return Block("chart", heading, {**two_widths(figure, f"{heading}: {y_label} by {x_label}"), "legend": legend,
                                        "note": note})  # fmt: skip


def parallel(
    heading: str,
    axes: Mapping[str, Axis],
    lines: Sequence[tuple[Mapping[str, Any], float, bool]],
    score: str,
    note: str = "",
) -> Block:
    """A line for each trial (settings, score, whether it was completed: solid or dashed) across one axis per parameter.

    The higher the score, the stronger the line; values outside an axis interrupt it.
    """
    scores = np.array([value for _, value, _ in lines], dtype=np.float64)
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    scales = {**axes, score: Axis(low, high)}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(WIDTH, 1.1 * len(scales)), 3.8), layout="constrained")
        plot = figure.add_subplot(xlim=(-0.3, len(scales) - 0.7), ylim=(-0.04, 1.04))
        # Every other name is a line lower: long ones side by side would overlap.
        names = ["\n" * (i % 2) + _short(name, 28) for i, name in enumerate(scales)]
        plot.set_xticks(range(len(scales)), names)
        plot.set_yticks([])
        for spine in plot.spines.values():
            spine.set_visible(False)
        plot.tick_params(length=0)
        for x, scale in enumerate(scales.values()):
            _draw(plot, x, scale)
        for index in np.argsort(scores, kind="stable"):
            settings, value, complete = lines[index]
            rank = 0.5 if high == low else (value - low) / (high - low)
            heights = [
                scale.position(settings[name]) if name in settings else np.nan for name, scale in axes.items()
            ] + [scales[score].position(value)]
            plot.plot(range(len(scales)), heights, "-" if complete else "--", color=_COLOURS[0],
                      alpha=0.15 + 0.85 * rank**2, linewidth=0.8 + 1.2 * rank)  # fmt: skip
        label = f"{heading}: the settings of {len(lines)} trials and their {score}"
        return Block("chart", heading, {"svg": _svg(figure, label), "narrow": "", "legend": [], "note": note})


def _draw(plot: Any, x: int, scale: Axis) -> None:
    """Draw one axis, with the values at its ends, or its choices."""
    plot.axvline(x, 0.04, 0.96, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    marks = scale.choices or (f"{scale.low:.3g}", f"{scale.high:.3g}")
    for i, mark in enumerate(marks):
        height = i / max(1, len(marks) - 1)
        plot.annotate(_short(mark, 14), (x, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
