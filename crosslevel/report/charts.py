"""Charts: inline SVG whose colours are the page's CSS variables, so that they follow light and dark mode.

matplotlib draws them, and the page needs no script for it. Ours is what matplotlib has not: colours that are CSS
variables, ids that no other figure of a page has, and a second width for telephones.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from crosslevel.report.page import Block, cell
from crosslevel.utils.errors import UserError

WIDTH = 9.6  # inches of a chart that fills the page, so that its letters are as large as the text
NARROW = 4.8  # likewise, for a page of 400 pixels
Series = Mapping[str, Sequence[tuple[float, float]]]

_MARKERS = {"●": "o", "■": "s", "▲": "^", "◆": "D", "▼": "v", "✚": "P"}  # in the legend: in matplotlib
_COLOURS = [f"#0000a{i}" for i in range(8)]
_INK, _SOFT, _RULE = "#0000b0", "#0000b1", "#0000b2"
# matplotlib takes no CSS variable for a colour: these stand in for them until _svg puts them back.
_VARIABLES = {colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)} | {
    _INK: "var(--ink)", _SOFT: "var(--soft)", _RULE: "var(--rule)",
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "crosslevel", "text.parse_math": False, "font.size": 10.5,
    "text.color": _INK, "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT,
    "ytick.color": _SOFT, "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": _RULE,
    "axes.linewidth": 0.8, "grid.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 3.5,
}  # fmt: skip


def curves(heading: str, series: Series, x_label: str, y_label: str, note: str = "") -> Block:
    """Draw a line for each series of (x, y): a y that is not finite leaves a gap; the legend has the last other one."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel=_short(x_label, 60), ylabel=_short(y_label, 40))
        axes.grid(axis="y")
        if x_label == "epoch":  # integers, since a reader looks for the end of an epoch
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend = []
        for i, (name, points) in enumerate(series.items()):
            x, y = thinned(points).T
            finite = np.pad(np.isfinite(y), 1)
            alone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
            dots = list(range(len(x))) if len(x) <= 30 else alone.tolist()
            colour, dash = _COLOURS[i % len(_COLOURS)], "-" if i < len(_COLOURS) else "--"
            axes.plot(x, y, dash, color=colour, marker="o", markevery=dots)
            last = next((f"{value:.4g}" for _, value in reversed(points) if math.isfinite(value)), "no value")
            symbol = "━" if dash == "-" else "╍"
            legend.append({"name": name, "symbol": symbol, "colour": _VARIABLES[colour], "value": last})
        label = f"{heading}: {y_label} over {x_label}"
        return Block("chart", heading, {**two_widths(figure, label), "legend": legend, "note": note})


def bars(heading: str, names: Sequence[str], values: Sequence[float], note: str = "") -> Block:
    """Draw a bar for each value: up to 24 are horizontal, with names and numbers; more are vertical, with some names.

    Raises:
        ValueError: the numbers of names and values differ.

    """
    if len(names) != len(values):
        raise UserError(f"bars {heading!r}: {len(names)} names, {len(values)} values: give one name a bar")
    positions = np.arange(len(values))
    heights = [value if math.isfinite(value) else 0.0 for value in values]
    with mpl.rc_context(_STYLE):
        lying = len(values) <= 24
        figure = Figure(figsize=(WIDTH, 0.3 + 0.26 * len(values) if lying else 2.6), layout="constrained")
        axes = figure.add_subplot()
        if lying:
            containers = axes.barh(positions, heights, color=_COLOURS[0], height=0.7)
            axes.bar_label(containers, [cell(value, 1) for value in values], padding=4)
            axes.set_yticks(positions, [_short(name, 30) for name in names])
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.xaxis.set_visible(False)
            axes.tick_params(left=False)
            axes.spines["bottom"].set_visible(False)
        else:
            axes.bar(positions, heights, color=_COLOURS[0], width=0.8)
            ticks = positions[:: math.ceil(len(values) / 8)]
            axes.set_xticks(ticks, [_short(names[i], 9) for i in ticks])
            axes.margins(x=0.01)
            axes.grid(axis="y")
        return Block("chart", heading, {**two_widths(figure, heading), "legend": [], "note": note})


def scatter(
    points: Float[Tensor, "N 2"], kind: Int[Tensor, " N"], names: Mapping[int, str], label: str
) -> tuple[Markup, list[dict[str, str]]]:
    """Draw points as an SVG that fills its square; return it and the entries of its legend."""
    styles = [*itertools.product(_MARKERS, _COLOURS), ("●", _SOFT)]
    last, legend = len(styles) - 1, []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 5.6))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(1, 0))
        axes.set_axis_off()
        for c in sorted(set(kind.clamp(-1, last).tolist())):
            symbol, colour = styles[c]
            x, y = points[kind.clamp(-1, last) == c].T.numpy()
            axes.plot(x, y, _MARKERS[symbol], color=colour, alpha=0.8, markeredgewidth=0, markersize=5)
            name = "further classes" if c == last else names[c]
            legend.append({"name": name, "symbol": symbol, "colour": _VARIABLES[colour], "value": f"{len(x):,}"})
        return _svg(figure, label), legend


def two_widths(figure: Figure, label: str) -> dict[str, Markup]:
    """The figure twice: for a wide page, and for a phone, where its letters would be too small."""
    wide, height = _svg(figure, label), figure.get_figheight()
    figure.set_size_inches(NARROW, max(2.6, height))
    return {"svg": wide, "narrow": _svg(figure, label)}


def _short(name: str, most: int) -> str:
    """The name on one line of at most ``most`` letters, without surrogates, which matplotlib cannot draw."""
    line = " ".join(name.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def thinned(points: Sequence[tuple[float, float]], most: int = 600) -> np.ndarray:
    """At most ``most`` points, (n, 2): means of neighbours where there are more; not finite becomes NaN."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table[~np.isfinite(table)] = np.nan
    every = math.ceil(len(table) / most) if len(table) else 1
    if every == 1:
        return table
    chunks = np.array_split(table, math.ceil(len(table) / every))
    finite_parts = [part[np.isfinite(part).all(1)] for part in chunks]
    return np.array([(keep if len(keep) else part).mean(0) for keep, part in zip(finite_parts, chunks, strict=True)])


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG in the page's colours, with ids that no other figure has."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # Names may have letters that matplotlib's font lacks; this does not matter, as the browser draws them.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    body = file.getvalue()
    prefix = "f" + hashlib.sha256((label + body).encode("utf-8", "replace")).hexdigest()[:8]
    view = re.search(r'viewBox="([^"]+)"', body)
    body = re.sub(r"^.*?<svg[^>]*>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(?<=\sid=")|(?<=url\(#)|(?<=xlink:href="#)', prefix, body).replace("xlink:href", "href")
    body = re.sub(r"(?<=: )#0000[ab]\d(?=[;\"])", lambda match: _VARIABLES[match.group()], body)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}"><title>{}</title>')
    return head.format(view.group(1) if view else "", label, label) + Markup(body)
