"""The output of a search: its matches as JSON, and a page of pictures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from crosslevel import report
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.table import FeatureTable
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import write

QUERIES, A_ROW = 100, 20  # on the page; the JSON file has all


def output_files(output: str) -> Path:
    """The JSON file to write, and the page beside it; their folder is created.

    Raises:
        UserError: they cannot be written there.

    """
    path = Path(output)
    if path.suffix in (".html", ".htm", ".csv", ".txt", ".parquet") and not path.is_dir():
        raise UserError(f"--output {output}: give a folder, or a file that ends in .json")
    file = path if path.suffix == ".json" else path / "search.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.filename}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output {output}: {file} cannot be written")
    return file


def write_results(
    file: Path,
    table: FeatureTable,
    results: Sequence[dict[str, Any]],
    query_pictures: Sequence[UInt8[Tensor, "3 H W"] | None],
    pictures: Pictures,
) -> list[str]:
    """Write both files, and return lines that name them.

    Args:
        file: the JSON file.
        table: the searched table.
        results: the name and matches of each query.
        query_pictures: the first queries' pictures, None for those in the table.
        pictures: the table's pictures.

    """
    header = {"table": str(table.file), "encoder": table.metadata.get("encoder"), "rows": table.rows}
    write(file, json.dumps({**header, "results": list(results)}, indent=2) + "\n")
    rows, missing = [], 0
    for result, picture in zip(results[:QUERIES], [*query_pictures, *[None] * QUERIES], strict=False):
        query_picture = picture if picture is not None else _picture_of(table, result["query"], pictures)
        entries: list[tuple[Any, str, str | None, str, str | None]] = []
        if query_picture is not None:
            entries.append((query_picture, "query", "query", result["query"], None))
        for match in result["matches"][:A_ROW]:
            image = pictures[match["row"]]
            missing += image is None
            if image is not None:
                mark = f"{match['distance']:.3f}"
                entries.append((image, mark, None, match["path"], pictures.file(match["row"])))
        if entries:
            images, marks, outlines, names, files = zip(*entries, strict=True)
            links = list(zip(names, files, strict=True))
            rows.append(report.ImageRow(result["query"], images, marks, outlines, links))
    first = results[0]["matches"]
    nearest = [f"{match['path']}, at a distance of {match['distance']:.3f}." for match in first[:1]]
    verdict = f"Nearest to {results[0]['query']}: {nearest[0]}" if nearest else ""
    note = "Below each picture its distance, 1 minus the cosine of the features."
    if len(results) > QUERIES:
        note += f" The first {QUERIES} of {len(results):,} queries; {file.name} has all."
    blocks = [report.image_rows("Queries, and what is most like each", rows, note)] if rows else []
    columns = ["query", "", "distance", "path"]
    listed = [
        [result["query"], i + 1, match["distance"], match["path"]]
        for result in results[:QUERIES]
        for i, match in enumerate(result["matches"][:A_ROW])
    ]
    if len(results) == 1:  # its name stands above
        columns, listed = ["path", "distance"], [[path, distance] for _, _, distance, path in listed]
    blocks.append(report.table("The same as a table", columns, listed, None, digits=4))
    subtitle = f"{table.rows:,} images in {table.file.name} · {time.strftime('%Y-%m-%d')}"
    page = report.page(file.with_suffix(".html"), "Similar images", blocks, subtitle, verdict)
    lost = f"{missing:,} pictures were not found: give --images, or embed with --thumbnails 96" if missing else ""
    return [line for line in (f"written: {file}, {page}", lost, f"next: look at {page}") if line]


def _picture_of(table: FeatureTable, name: str, pictures: Pictures) -> UInt8[Tensor, "3 H W"] | None:
    return pictures[table.paths.index(name)] if name in table.paths else None
