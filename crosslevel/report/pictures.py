"""Pictures: rows of small images, and a map of features with images at their positions."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from crosslevel.report.page import Block
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded
from crosslevel.utils.tensors import as_rgb

# These two limits keep a typical page under 5 MB.
THUMBNAIL, MAP_POINTS = 64, 2500  # pixels of a picture's longer side, points of a map
_TILE, _MONTAGE = 32, 640  # pixels: a picture on a map, the map of pictures


@dataclass(frozen=True)
class ImageRow:
    """Pictures side by side: ``marks[i]`` is printed below picture i, ``outlines[i]`` frames it.

    An outline is "query", "same" or "other" (whether the neighbour has the query's label), or None. ``files``: the
    image's name and path, for a link, or None if it is no file of its own.
    """

    caption: str
    images: Sequence[UInt8[Tensor, "C h w"]]
    marks: Sequence[str] | None = None
    outlines: Sequence[str | None] | None = None
    files: Sequence[tuple[str, str | None]] | None = None


def image_rows(heading: str, rows: Sequence[ImageRow], note: str = "") -> Block:
    """Rows of small pictures; those under 64 pixels are enlarged by whole factors, without blur.

    Raises:
        ValueError: a picture is not uint8 (3, h, w), or a row does not have one mark and one outline for each picture.

    """
    blocks = []
    for row in rows:
        marks, outlines = row.marks or [""] * len(row.images), row.outlines or [None] * len(row.images)
        files = row.files or [("", None)] * len(row.images)
        if not len(row.images) == len(marks) == len(outlines):
            raise UserError(
                f"row {row.caption!r}: {len(row.images)} images, {len(marks)} marks, "
                f"{len(outlines)} outlines: give one of each an image, or None"
            )
        pictures = [
            {**_picture(image), "mark": mark, "outline": outline or "", "name": name, "link": _link(file)}
            for image, mark, outline, (name, file) in zip(row.images, marks, outlines, files, strict=True)
        ]
        blocks.append({"caption": row.caption, "pictures": pictures})
    used = {outline for row in rows for outline in row.outlines or ()}
    return Block("images", heading, {"rows": blocks, "outlines": used, "note": note})


def map2d(
    heading: str,
    points: Float[Tensor, "N 2"],
    images: UInt8[Tensor, "N 3 h w"] | None = None,
    labels: Int[Tensor, " N"] | None = None,
    classes: Sequence[str] | None = None,
    *,
    note: str = "",
    paths: Sequence[str] | None = None,
) -> Block:
    """A map of points laid out by ``project``: once coloured by label, once with pictures at their positions.

    If pictures would overlap, only one is drawn; pointing anywhere shows the nearest image and its path. If there are
    more than 2,500 points, every n-th is drawn. Labels below 0 are unknown.

    Raises:
        ValueError: a point is not finite, or points, images and labels differ in number.

    """
    for name, values in [("images", images), ("labels", labels)]:
        if values is not None and len(values) != len(points):
            raise UserError(f"map {heading!r}: {len(points)} points, {len(values)} {name}: give one a point")
    every = max(1, math.ceil(len(points) / MAP_POINTS))
    positions = _unit_square(finite(points)[::every])
    kind = torch.zeros(len(positions), dtype=torch.int64) if labels is None else labels.cpu().long()[::every]
    names = {c: "unknown" if c < 0 else classes[c] if classes else f"label {c}" for c in set(kind.tolist())}
    from crosslevel.report.charts import scatter  # noqa: PLC0415 - matplotlib takes seconds to import

    svg, legend = scatter(positions, kind, names, f"{heading}: {len(positions):,} images as points")
    hover: dict[str, Any] = {"names": names, "kind": kind.tolist()}
    if paths is not None:
        hover["paths"] = list(paths[::every])
    hover["points"] = (positions * 1000).round().int().tolist()
    content = {
        "svg": svg,
        "legend": [] if labels is None else legend,
        "note": note,
        "atlas": "",
        "pictures": "",
    }
    if every > 1:
        content["note"] = f"{note} Drawn: {len(positions):,} of {len(points):,} images.".strip()
    if images is not None and len(positions):
        tiles = torch.cat([_shrink(part, _TILE) for part in images[::every].split(256)])
        columns = math.ceil(math.sqrt(len(tiles)))
        hover |= {"columns": columns, "width": tiles.shape[3], "height": tiles.shape[2]}
        content |= {"atlas": _atlas(tiles, columns), "pictures": _data_uri(montage(positions, tiles))}
    return Block("map", heading, content | {"hover": json.dumps(hover, separators=(",", ":"))})


def finite(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The rows, on the CPU; ValueError where one is not finite."""
    bad = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{len(bad)} of {len(rows)} rows are not finite, row {bad[0]} first: leave them out")
    return rows.detach().cpu()


def _unit_square(points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
    """The points in the middle of [0, 1] x [0, 1], in their own proportions."""
    if not len(points):
        return points.double()
    low, high = points.double().aminmax(dim=0)
    extent = (high - low).max()
    return 0.5 + (points.double() - (low + high) / 2) / (extent if extent > 0 else 1) * 0.94


def _shrink(images: UInt8[Tensor, "*N C h w"], most: int) -> UInt8[Tensor, "*N 3 h w"]:
    """Images in colour, of at most ``most`` pixels on their longer side; smaller ones as they are."""
    if images.dtype != torch.uint8 or images.ndim < 3 or 0 in images.shape:
        raise UserError(f"an image is {images.dtype} {tuple(images.shape)}, need torch.uint8 (C, h, w)")
    images = as_rgb(images)
    factor = most / max(images.shape[-2:])
    if factor >= 1:
        return images.cpu()
    size = [max(1, round(side * factor)) for side in images.shape[-2:]]
    batch = images.cpu().reshape(-1, *images.shape[-3:]).float()
    return interpolate(batch, size=size, mode="area").round().byte().reshape(*images.shape[:-2], *size)


def _picture(image: UInt8[Tensor, "3 h w"]) -> dict[str, Any]:
    """The template's data for one small image."""
    small = _shrink(image, THUMBNAIL)
    longest = max(small.shape[1:])
    factor = max(1, THUMBNAIL // longest)
    height, width = (side * factor for side in small.shape[1:])
    return {"src": _data_uri(small), "width": width, "height": height, "pixelated": longest < THUMBNAIL}


def _link(file: str | None) -> str:
    """The address of a file; None if there is no file, or its name is no valid text."""
    try:
        return "" if file is None else Path(os.path.abspath(file)).as_uri()
    except UnicodeEncodeError:
        return ""


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


def montage(positions: Float[Tensor, "N 2"], tiles: UInt8[Tensor, "N 3 h w"]) -> UInt8[Tensor, "4 s s"]:
    """Tiles centred at their positions on a transparent square; those that would overlap earlier ones are left out."""
    size = torch.tensor(tiles.shape[:1:-1])
    corners = (positions * _MONTAGE - size / 2).round().long()
    free = torch.ones(len(tiles), dtype=torch.bool)
    canvas = torch.zeros(4, _MONTAGE, _MONTAGE, dtype=torch.uint8)
    # In random order, as images often come sorted by class and the first class would take the crowded places.
    for i in torch.randperm(len(tiles), generator=seeded(0)).tolist():
        if free[i]:
            x, y = corners[i].tolist()
            window = canvas[:, y : y + tiles.shape[2], x : x + tiles.shape[3]]
            window[:3], window[3] = tiles[i], 255
            free &= ((corners - corners[i]).abs() > size).any(1)
    return canvas
