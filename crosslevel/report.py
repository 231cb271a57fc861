"""Reports: one self-contained HTML page that shows what a run did, with charts and pictures.

A page is a sequence of blocks; each block function is pure and turns numbers or pictures into one section.
What users named (files, classes) is escaped by the template. The charts are SVG whose colours are the page's
CSS variables, so that they follow light and dark mode.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import interpolate, normalize

Series = Mapping[str, Sequence[tuple[float, float]]]
Best = Literal["max", "min"] | None

# These two keep a page of usual content under 5 MB.
THUMBNAIL, MAP_POINTS = 64, 2500  # pixels of a picture's longer side, points of a map
_TILE, _MONTAGE = 32, 640  # pixels: a picture on a map, the map of pictures
_MARKERS = {"●": "o", "■": "s", "▲": "^", "◆": "D", "▼": "v", "✚": "P"}  # in the legend: in matplotlib
_COLOURS = [f"#0000a{i}" for i in range(8)]
_INK, _SOFT, _RULE = "#0000b0", "#0000b1", "#0000b2"
# matplotlib takes no CSS variable for a colour: these stand in for them until _svg puts them back.
_VARIABLES = {colour: f"var(--c{i})" for i, colour in enumerate(_COLOURS)} | {
    _INK: "var(--ink)", _SOFT: "var(--soft)", _RULE: "var(--rule)",
}  # fmt: skip
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "crosslevel", "text.parse_math": False, "font.size": 9.5,
    "text.color": _INK, "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT,
    "ytick.color": _SOFT, "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": _RULE,
    "axes.linewidth": 0.8, "grid.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 3.5,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One section of a page: ``kind`` names the template's macro that draws ``content``."""

    kind: str
    heading: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class ImageRow:
    """Pictures side by side: ``marks[i]`` is printed below picture i, ``outlines[i]`` frames it.

    An outline is "query", "same" or "other" (the neighbour has the query's label, or has not), or None.
    """

    caption: str
    images: Sequence[UInt8[Tensor, "3 h w"]]
    marks: Sequence[str] | None = None
    outlines: Sequence[str | None] | None = None


def page(path: str | Path, title: str, blocks: Sequence[Block], subtitle: str = "") -> Path:
    """Write ``blocks`` as one HTML file, whole or not at all, and return its path."""
    path = Path(path)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(title=title, subtitle=subtitle, blocks=blocks)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # A file name that is not valid UTF-8 reaches Python with surrogates, which cannot be encoded.
        part.write_bytes(html.encode("utf-8", "replace"))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def text(heading: str, paragraphs: str | Sequence[str]) -> Block:
    """Plain paragraphs."""
    return Block("text", heading, {"paragraphs": [paragraphs] if isinstance(paragraphs, str) else paragraphs})


def table(
    heading: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | float | None]],
    best: Best | Sequence[Best] = "max",
    *,
    note: str = "",
    digits: int = 1,
) -> Block:
    """A table whose best numbers are marked, for each column by ``best`` (one for all, or one a column).

    Floats are shown to ``digits`` decimals; None and NaN as a dash. Numbers that look equal share the mark; a
    column with fewer than two finite numbers has none.

    Raises:
        ValueError: a row, or ``best``, has not as many entries as there are columns.

    """
    marks = [best] * len(columns) if best is None or isinstance(best, str) else list(best)
    for name, entries in [("best", marks), *((f"row {i}", row) for i, row in enumerate(rows))]:
        if len(entries) != len(columns):
            raise ValueError(f"{name} of table {heading!r} has {len(entries)} entries, need {len(columns)}")
    by_column = [[row[j] for row in rows] for j in range(len(columns))]
    content = {
        "columns": columns,
        "rows": [[_cell(value, digits) for value in row] for row in rows],
        "best": [_best(column, mark, digits) for column, mark in zip(by_column, marks, strict=True)],
        "numeric": [any(isinstance(value, Real) for value in column) for column in by_column],
        "note": note,
    }
    return Block("table", heading, content)


def curves(heading: str, series: Series, x_label: str, y_label: str, note: str = "") -> Block:
    """A line a series of (x, y): a y that is not finite leaves a gap, the legend has the last finite one."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = figure.add_subplot(xlabel=_short(x_label, 60), ylabel=_short(y_label, 40))
        axes.grid(axis="y")
        legend = []
        for i, (name, points) in enumerate(series.items()):
            x, y = _thin(points).T
            seen = np.pad(np.isfinite(y), 1)
            alone = np.flatnonzero(seen[1:-1] & ~seen[:-2] & ~seen[2:])
            dots = list(range(len(x))) if len(x) <= 30 else alone.tolist()
            colour, dash = _COLOURS[i % len(_COLOURS)], "-" if i < len(_COLOURS) else "--"
            axes.plot(x, y, dash, color=colour, marker="o", markevery=dots)
            last = next((f"{value:.4g}" for _, value in reversed(points) if math.isfinite(value)), "no value")
            symbol = "━" if dash == "-" else "╍"
            legend.append({"name": name, "symbol": symbol, "colour": _VARIABLES[colour], "value": last})
        label = f"{heading}: {y_label} over {x_label}"
        return Block("chart", heading, {"svg": _svg(figure, label), "legend": legend, "note": note})


def bars(heading: str, names: Sequence[str], values: Sequence[float], note: str = "") -> Block:
    """One bar a value: up to 24 lie, with name and number each; more stand, with a name here and there.

    Raises:
        ValueError: the numbers of names and values differ.

    """
    if len(names) != len(values):
        raise ValueError(f"bars {heading!r}: {len(names)} names, {len(values)} values: give one name a bar")
    places = np.arange(len(values))
    heights = [value if math.isfinite(value) else 0.0 for value in values]
    with mpl.rc_context(_STYLE):
        lying = len(values) <= 24
        figure = Figure(figsize=(5.0, 0.3 + 0.24 * len(values) if lying else 2.6), layout="constrained")
        axes = figure.add_subplot()
        if lying:
            drawn = axes.barh(places, heights, color=_COLOURS[0], height=0.7)
            axes.bar_label(drawn, [_cell(value, 1) for value in values], padding=4)
            axes.set_yticks(places, [_short(name, 30) for name in names])
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.xaxis.set_visible(False)
            axes.tick_params(left=False)
            axes.spines["bottom"].set_visible(False)
        else:
            axes.bar(places, heights, color=_COLOURS[0], width=0.8)
            some = places[:: math.ceil(len(values) / 8)]
            axes.set_xticks(some, [_short(names[i], 9) for i in some])
            axes.margins(x=0.01)
            axes.grid(axis="y")
        return Block("chart", heading, {"svg": _svg(figure, heading), "legend": [], "note": note})


def settings(heading: str, yaml_text: str) -> Block:
    """The settings of a run, folded until they are opened."""
    return Block("settings", heading, {"yaml": yaml_text})


def commands(heading: str, lines: Sequence[str]) -> Block:
    """Shell commands to copy, one a line."""
    return Block("commands", heading, {"lines": lines})


def image_rows(heading: str, rows: Sequence[ImageRow], note: str = "") -> Block:
    """Rows of small pictures; those under 64 pixels are enlarged by whole factors, without blur.

    Raises:
        ValueError: a picture is not uint8 (3, h, w), or a row has not one mark or outline a picture.

    """
    drawn = []
    for row in rows:
        marks, outlines = row.marks or [""] * len(row.images), row.outlines or [None] * len(row.images)
        if not len(row.images) == len(marks) == len(outlines):
            raise ValueError(
                f"row {row.caption!r}: {len(row.images)} images, {len(marks)} marks, "
                f"{len(outlines)} outlines: give one of each an image, or None"
            )
        pictures = [
            {**_picture(image), "mark": mark, "outline": outline or ""}
            for image, mark, outline in zip(row.images, marks, outlines, strict=True)
        ]
        drawn.append({"caption": row.caption, "pictures": pictures})
    used = {outline for row in rows for outline in row.outlines or ()}
    return Block("images", heading, {"rows": drawn, "outlines": used, "note": note})


def map2d(
    heading: str,
    points: Float[Tensor, "N 2"],
    images: UInt8[Tensor, "N 3 h w"] | None = None,
    labels: Int[Tensor, " N"] | None = None,
    classes: Sequence[str] | None = None,
    *,
    note: str = "",
) -> Block:
    """A map that ``project`` laid out: points coloured by label and, beside them, pictures where they lie.

    Of pictures that would overlap one is drawn; pointing anywhere shows the nearest image. Of more than 2,500
    points every n-th is drawn. Labels below 0 are unknown.

    Raises:
        ValueError: a point is not finite, or points, images and labels differ in number.

    """
    for name, other in [("images", images), ("labels", labels)]:
        if other is not None and len(other) != len(points):
            raise ValueError(f"map {heading!r}: {len(points)} points, {len(other)} {name}: give one a point")
    every = max(1, math.ceil(len(points) / MAP_POINTS))
    place = _unit_square(_finite(points)[::every])
    kind = torch.zeros(len(place), dtype=torch.int64) if labels is None else labels.cpu().long()[::every]
    names = {c: "unknown" if c < 0 else classes[c] if classes else f"label {c}" for c in set(kind.tolist())}
    svg, legend = _scatter(place, kind, names, f"{heading}: {len(place):,} images as points")
    hover: dict[str, Any] = {"names": names, "kind": kind.tolist()}
    hover["points"] = (place * 1000).round().int().tolist()
    content = {
        "svg": svg,
        "legend": [] if labels is None else legend,
        "note": note,
        "atlas": "",
        "pictures": "",
    }
    if every > 1:
        content["note"] = f"{note} Drawn: {len(place):,} of {len(points):,} images.".strip()
    if images is not None and len(place):
        tiles = torch.cat([_shrink(part, _TILE) for part in images[::every].split(256)])
        columns = math.ceil(math.sqrt(len(tiles)))
        hover |= {"columns": columns, "width": tiles.shape[3], "height": tiles.shape[2]}
        content |= {"atlas": _atlas(tiles, columns), "pictures": _data_uri(_montage(place, tiles))}
    return Block("map", heading, content | {"hover": json.dumps(hover, separators=(",", ":"))})


def project(
    features: Float[Tensor, "N D"], method: Literal["tsne", "pca"] = "tsne", seed: int = 0
) -> Float[Tensor, "N 2"]:
    """Features laid out in the plane: t-SNE of their cosine distances, begun from PCA, or PCA alone.

    t-SNE suits up to a few thousand images. With fewer than five different ones it has no neighbourhoods to
    keep, and PCA answers.

    Raises:
        ValueError: an unknown method, or a feature that is not finite.

    """
    if method not in ("tsne", "pca"):
        raise ValueError(f"method={method!r} is not known: use 'tsne' or 'pca'")
    x = _finite(features).double()
    flat = torch.zeros(len(x), 2, dtype=torch.float64)
    if len(x):
        left, scale, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        # The sign of a singular vector is arbitrary: fixed here, so that every machine draws the same map.
        sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign().squeeze(1)
        rank = min(2, len(scale))
        flat[:, :rank] = (left * scale * sign)[:, :rank]
    if method == "pca" or len(x.unique(dim=0)) < 5:
        return flat.float()
    start = (flat / flat[:, 0].std() * 1e-4).float().numpy()
    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(metric="cosine", init=start, perplexity=perplexity, random_state=seed)
    # One thread: on a busy machine several wait for each other, and take many times as long.
    with threadpool_limits(1):
        return torch.from_numpy(tsne.fit_transform(x.float().numpy()))


def group_rows(
    images: UInt8[Tensor, "N 3 h w"],
    assignment: Int[Tensor, " N"],
    similarity: Float[Tensor, " N"] | None = None,
    most: int = 12,
    per_row: int = 10,
) -> list[ImageRow]:
    """Rows for ``image_rows``: up to ``most`` groups, two thirds the largest and the rest of middle size.

    ``similarity`` of each image to its group's centroid orders a row, the most similar first.
    """
    groups, sizes = torch.unique(assignment.cpu(), return_counts=True)
    order = sizes.argsort(descending=True, stable=True)
    if len(order) > most:
        largest, rest = order.split([math.ceil(most * 2 / 3), len(order) - math.ceil(most * 2 / 3)])
        ranks = torch.linspace(0, len(rest) - 1, most - len(largest) + 2)[1:-1].long()
        order = torch.cat([largest, rest[ranks]])
    rows = []
    for group, size in zip(groups[order].tolist(), sizes[order].tolist(), strict=True):
        members = (assignment.cpu() == group).nonzero().squeeze(1)
        caption = f"Group {group}: {size:,} image{'s' if size > 1 else ''}"
        if similarity is not None:
            near = similarity.cpu()[members]
            members = members[near.argsort(descending=True, stable=True)]
            caption += f", mean similarity to the centroid {near.mean():.2f}"
        rows.append(ImageRow(caption, list(images[members[:per_row]])))
    return rows


def neighbour_rows(
    images: UInt8[Tensor, "N 3 h w"],
    features: Float[Tensor, "N D"],
    queries: Sequence[int],
    k: int = 8,
    *,
    labels: Int[Tensor, " N"] | None = None,
    classes: Sequence[str] | None = None,
    exclude: Int[Tensor, " N"] | None = None,
) -> list[ImageRow]:
    """Rows for ``image_rows``: each query, then its ``k`` nearest other images by cosine similarity.

    ``exclude`` numbers the track of each image: a query's own track is passed over, as its near-duplicates
    would be all that is found.
    """
    z = normalize(_finite(features).float(), dim=1)
    index = torch.as_tensor(queries, dtype=torch.int64)
    similarity = z[index] @ z.T
    track = torch.arange(len(z)) if exclude is None else exclude.cpu()
    similarity[track[index][:, None] == track] = -math.inf
    nearest = similarity.sort(dim=1, descending=True, stable=True)
    rows = []
    for row, query in enumerate(index.tolist()):
        values = nearest.values[row, :k]
        values = values[values > -math.inf]
        found = nearest.indices[row, : len(values)]
        caption, outlines = f"Image {query}", ["query"] + [""] * len(found)
        if labels is not None:
            same = (labels[found] == labels[query]).tolist()
            outlines[1:] = ["same" if s else "other" for s in same]
            name = classes[int(labels[query])] if classes else f"label {int(labels[query])}"
            caption = f"{name}: {sum(same)} of {len(same)} neighbours have the same label"
        marks = ["query", *(f"{value:.2f}" for value in values.tolist())]
        rows.append(ImageRow(caption, [images[query], *images[found]], marks, outlines))
    return rows


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


def _short(name: str, most: int) -> str:
    """The name on one line of at most ``most`` letters, without surrogates, which matplotlib cannot draw."""
    line = " ".join(name.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _cell(value: str | float | None, digits: int) -> str:
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool) or not isinstance(value, Real):
        return str(value)
    return f"{int(value):,}" if isinstance(value, Integral) else f"{float(value):z,.{digits}f}"


def _best(column: Sequence[Any], mark: Best, digits: int) -> set[int]:
    """The rows whose number, as it is shown, is the best of the column."""
    numbers = {i: float(v) for i, v in enumerate(column) if isinstance(v, Real) and math.isfinite(v)}
    if mark is None or len(numbers) < 2:
        return set()
    top = (max if mark == "max" else min)(numbers, key=lambda i: numbers[i])
    return {i for i in numbers if _cell(column[i], digits) == _cell(column[top], digits)}


def _thin(points: Sequence[tuple[float, float]], most: int = 600) -> np.ndarray:
    """At most ``most`` points, (n, 2): means of neighbours where there are more; not finite becomes NaN."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    table[~np.isfinite(table)] = np.nan
    every = math.ceil(len(table) / most) if len(table) else 1
    if every == 1:
        return table
    parts = np.array_split(table, math.ceil(len(table) / every))
    whole = [part[np.isfinite(part).all(1)] for part in parts]
    return np.array([(keep if len(keep) else part).mean(0) for keep, part in zip(whole, parts, strict=True)])


def _scatter(
    place: Float[Tensor, "N 2"], kind: Int[Tensor, " N"], names: Mapping[int, str], label: str
) -> tuple[Markup, list[dict[str, str]]]:
    """The points as SVG that fills its square, and the entries of its legend."""
    styles = [*itertools.product(_MARKERS, _COLOURS), ("●", _SOFT)]
    last, legend = len(styles) - 1, []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 5.6))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(1, 0))
        axes.set_axis_off()
        for c in sorted(set(kind.clamp(-1, last).tolist())):
            symbol, colour = styles[c]
            x, y = place[kind.clamp(-1, last) == c].T.numpy()
            axes.plot(x, y, _MARKERS[symbol], color=colour, alpha=0.8, markeredgewidth=0, markersize=5)
            name = "further classes" if c == last else names[c]
            legend.append({"name": name, "symbol": symbol, "colour": _VARIABLES[colour], "value": f"{len(x):,}"})
        return _svg(figure, label), legend


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG in the page's colours, with ids that no other figure has."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # Names may have letters that matplotlib's own font lacks: it only measures them, the browser draws.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    body = file.getvalue()
    own = "f" + hashlib.sha256((label + body).encode("utf-8", "replace")).hexdigest()[:8]
    view = re.search(r'viewBox="([^"]+)"', body)
    body = re.sub(r"^.*?<svg[^>]*>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'(?<=\sid=")|(?<=url\(#)|(?<=xlink:href="#)', own, body).replace("xlink:href", "href")
    body = re.sub(r"(?<=: )#0000[ab]\d(?=[;\"])", lambda found: _VARIABLES[found.group()], body)
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}"><title>{}</title>')
    return head.format(view.group(1) if view else "", label, label) + Markup(body)


def _finite(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The rows, on the CPU; ValueError where one is not finite."""
    bad = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} of {len(rows)} rows are not finite, row {bad[0]} first: leave them out")
    return rows.detach().cpu()


def _unit_square(points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
    """The points in the middle of [0, 1] x [0, 1], in their own proportions."""
    if not len(points):
        return points.double()
    low, high = points.double().aminmax(dim=0)
    extent = (high - low).max()
    return 0.5 + (points.double() - (low + high) / 2) / (extent if extent > 0 else 1) * 0.94


def _shrink(images: UInt8[Tensor, "*N 3 h w"], most: int) -> UInt8[Tensor, "*N 3 h w"]:
    """Images of at most ``most`` pixels on their longer side; smaller ones as they are."""
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3 or 0 in images.shape:
        raise ValueError(f"an image is {images.dtype} {tuple(images.shape)}, need torch.uint8 (3, h, w)")
    factor = most / max(images.shape[-2:])
    if factor >= 1:
        return images.cpu()
    size = [max(1, round(side * factor)) for side in images.shape[-2:]]
    batch = images.cpu().reshape(-1, *images.shape[-3:]).float()
    return interpolate(batch, size=size, mode="area").round().byte().reshape(*images.shape[:-2], *size)


def _picture(image: UInt8[Tensor, "3 h w"]) -> dict[str, Any]:
    """What the template needs to draw one small image."""
    small = _shrink(image, THUMBNAIL)
    longest = max(small.shape[1:])
    factor = max(1, THUMBNAIL // longest)
    height, width = (side * factor for side in small.shape[1:])
    return {"src": _data_uri(small), "width": width, "height": height, "pixelated": longest < THUMBNAIL}


def _data_uri(image: UInt8[Tensor, "c h w"], kind: Literal["png", "jpeg"] = "png") -> str:
    file = io.BytesIO()
    options = {"optimize": True} if kind == "png" else {"quality": 85, "subsampling": 0}
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _atlas(tiles: UInt8[Tensor, "N 3 h w"], columns: int) -> str:
    """All tiles in one picture, row by row: a JPEG, since thousands of tiles as PNG would fill the page."""
    padding = tiles.new_zeros(-len(tiles) % columns, *tiles.shape[1:])
    rows = torch.cat([tiles, padding]).unflatten(0, (-1, columns))
    return _data_uri(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), "jpeg")


def _montage(place: Float[Tensor, "N 2"], tiles: UInt8[Tensor, "N 3 h w"]) -> UInt8[Tensor, "4 s s"]:
    """Tiles centred at their places on a transparent square, but those that would overlap an earlier one."""
    size = torch.tensor(tiles.shape[:1:-1])
    corners = (place * _MONTAGE - size / 2).round().long()
    free = torch.ones(len(tiles), dtype=torch.bool)
    canvas = torch.zeros(4, _MONTAGE, _MONTAGE, dtype=torch.uint8)
    # In random order, as images often come sorted by class and the first class would take the crowded places.
    for i in torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0)).tolist():
        if free[i]:
            x, y = corners[i].tolist()
            window = canvas[:, y : y + tiles.shape[2], x : x + tiles.shape[3]]
            window[:3], window[3] = tiles[i], 255
            free &= ((corners - corners[i]).abs() > size).any(1)
    return canvas
