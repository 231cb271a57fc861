"""``crosslevel search``: the images of a collection that are most like a given one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from rich.console import Console
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decoding.formats import can_be_image
from crosslevel.data.sources.folder import Files, folder
from crosslevel.data.uri import Source, parse
from crosslevel.features.collection import open_collection
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.extract import Runtime, extract
from crosslevel.features.pieces import text
from crosslevel.features.source import reading_of
from crosslevel.features.table import FeatureTable
from crosslevel.metrics.nearest import Neighbours, nearest
from crosslevel.models.clip.open import open_clip_of
from crosslevel.models.named import is_by_name, open_encoder
from crosslevel.retrieval.index import opened_index
from crosslevel.retrieval.page import output_files, write_results
from crosslevel.utils.console import printer, say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import NotThere, UserError
from crosslevel.utils.marks import verb

EXACT = 1_000_000  # up to this many rows, all are compared; beyond, an index is faster than reading the features
FEW, BLOCK = 16, 65_536  # queries that are compared one by one; rows compared at a time
PRINTED = 5  # queries whose matches are printed


class Queries(NamedTuple):
    """Q features to search for, their names, and their rows if they come from the table (-1: from elsewhere).

    For words, ``projection`` maps the table's features into the space of texts. ``loaded`` says which weights by name
    made the queries' features.
    """

    features: Float[Tensor, "Q E"]
    names: list[str]
    rows: list[int]
    pictures: list[UInt8[Tensor, "C H W"] | None]
    projection: Float[Tensor, "D E"] | None = None
    loaded: str = ""


@verb("k", "run", "images", "output", "index", "device", "precision")
def search(
    table: str,
    query: str,
    k: int = 10,
    run: str | None = None,
    images: str | None = None,
    index: Literal["auto", "on", "off"] = "auto",
    output: str | None = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    workers: int | None = None,
    batch_size: int = 256,
    data_root: str | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Find the images that are most like a given image, like each image of a folder, or like a description in words.

    The distance is 1 minus the cosine of two features: 0 for the same direction, 1 for features with nothing in common.
    Up to a million rows are all compared. Beyond, an index that is kept beside the table answers.

    Args:
        table: a table that `crosslevel embed` wrote; or the folder of a run, or weights by name (timm:NAME,
            hf-hub:owner/name): then their features of --images are made once and kept.
        query: an image, a folder of images, or the path of a row of the table; words, if a CLIP by name made the table.
            An image that is a row of the table, by its path, is not among its own results.
        k: how many images to find for each query.
        run: the encoder of the table, if it has moved: the folder of a run, or its encoder.safetensors, or weights by
            name.
        images: of a run or of weights by name: the images to search; those that a run was trained on unless given. Of
            a table: where its images are now, for the page.
        index: auto compares with every row up to a million of them; on and off use the index always or never.
        output: a .json file, or a folder for search.json and search.html, a page of pictures; none is written unless
            given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: fp32, so that features are the same wherever they are made; auto takes bfloat16 where the hardware
            computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        batch_size: images at a time.
        data_root: folder with the official files of cifar10, cifar100 and stl10; a run's own unless given.
        quiet: print nothing.

    Returns:
        for each query its name, and its matches: path, distance and row, the nearest first.

    Examples:
        >>> [result] = crosslevel.search("features.parquet", "photos/cat/000.png", k=5)
        >>> nearest = result["matches"][0]["path"]

    """
    if k < 1:
        raise UserError(f"k={k}: at least 1")
    console, written = printer(quiet), None if output is None else output_files(output)
    runtime = Runtime(choose(device, precision), workers, batch_size)
    source = None if images is None else parse(images)
    searched, run = open_collection(table, source, runtime, console, run, data_root=data_root)
    queries = _queries(searched, query, source, run, runtime, console)
    say(console, queries.loaded if run != table else "")  # otherwise the table's encoder has said it
    depth = min(k + any(row >= 0 for row in queries.rows), searched.rows)  # a query from the table finds itself
    find = finder(searched, index, queries.projection, console)
    start_time = time.monotonic()
    neighbours = find(queries.features, depth)
    took, results = time.monotonic() - start_time, _results(searched, queries, neighbours, k)
    _print(console, results)
    many = f"{len(results):,} {'query' if len(results) == 1 else 'queries'}"
    say(console, f"{many} among {searched.rows:,} images, {1000 * took / len(results):,.1f} ms each")
    if written is not None:
        pictures = Pictures(searched, source, data_root)
        for line in write_results(written, searched, results, queries.pictures, pictures):
            say(console, line)
    else:
        say(console, "next: the same with -o FOLDER, for a page of the pictures")
    return results


def _queries(
    table: FeatureTable, query: str, images: Source | None, run: str | None, runtime: Runtime, console: Console
) -> Queries:
    if os.path.isdir(query):
        files = folder(query).files
        if not files:
            raise UserError(f"{query} holds no image to look for")
        source = Files(query, files)
    elif os.path.exists(query):
        source = Files("", [query], name=query)
    elif query in table.paths:
        row = table.paths.index(query)
        return Queries(table.features[row : row + 1], [query], [row], [None])
    else:
        return _in_words(table, query, run)
    if run is None:
        raise UserError(f"{table.file} does not say which encoder made it: give --run, the folder of the run")
    try:
        encoder = open_encoder(run)
        source.reading = reading_of(encoder)
    except NotThere as error:
        raise NotThere(f"{table.file} was made by {run}, which is not there: give --run, its folder") from error
    table.check_encoder(encoder, run)
    bad_files = BadFiles()
    if len(source) == 1:  # for the error message
        failure = _unreadable(source)
        if failure:
            raise UserError(f"{query} is no image that can be read: {failure}")
    options = {"batch_size": runtime.batch_size, "workers": runtime.workers if len(source) > 1 else 0}
    features = extract(encoder, source, hardware=runtime.hardware, bad_files=bad_files, **options)  # type: ignore[arg-type]
    if len(bad_files):
        say(console, bad_files.summary(len(source)))
    indices = features.indices.tolist()
    names = [source.paths[i] for i in indices]
    rows = _own_rows(table, images, [os.path.join(source.root, name) for name in names])
    return Queries(features.features, names, rows, [source[i][0] for i in indices[:100]], loaded=encoder.loaded)


def _own_rows(table: FeatureTable, images: Source | None, files: list[str]) -> list[int]:
    """The row that each file's image is in the table, by its path; -1 where it is none."""
    root, row_of = Pictures(table, images).root, {path: row for row, path in enumerate(table.paths)}
    rows = []
    for file in files:
        names = [file, os.path.abspath(file)]
        if root is not None:  # a folder or an image in it may be a link
            names = [os.path.relpath(full(file), full(root)) for full in (os.path.abspath, os.path.realpath)]
        rows.append(next((row_of[name] for name in map(text, names) if name in row_of), -1))
    return rows


def _in_words(table: FeatureTable, query: str, run: str | None) -> Queries:
    """The query's words as a vector of the CLIP that made the table.

    Raises:
        NotThere: the query looks like a path, or no CLIP made the table.

    """
    lost = f"{query}: there is no such file, and no row of {table.file} has this path"
    if table.rows:
        lost += f" (its first is {table.paths[0]})"
    if "/" in query or can_be_image(query) or run is None:
        raise NotThere(lost)
    if not is_by_name(run):
        raise NotThere(f"{lost}; words are a query where a CLIP by name made the table, and {run} made this one")
    try:
        clip = open_clip_of(run, table.width)
    except UserError as error:
        raise NotThere(f"{lost}; words are a query where a CLIP made the table: {error}") from error
    encoder = open_encoder(run)
    table.check_encoder(encoder, run)
    return Queries(clip.words(query), [query], [-1], [None], clip.projection, encoder.loaded)


def _unreadable(source: Files) -> str:
    from crosslevel.utils.errors import BadImage  # noqa: PLC0415

    try:
        source[0]
    except BadImage as error:
        return error.reason
    return ""


def finder(
    table: FeatureTable, index: str, projection: Tensor | None, console: Console, most: int = EXACT
) -> Callable[[Tensor, int], Neighbours]:
    """A function that finds the k nearest rows of queries; all data that it needs is loaded.

    Args:
        table: the rows.
        index: as in `search`; auto compares with every row up to ``most`` of them.
        projection: maps the rows into the space of texts.
        console: prints that an index is built.
        most: number of rows up to which all are compared.

    """
    if projection is not None:
        if index == "on":
            raise UserError(
                "--index on: an index knows images alone, and words are compared with every row: leave it out"
            )
        return lambda queries, k: exact(queries, table.features, k, projection)
    if index == "on" or (index == "auto" and table.rows > most):
        built = opened_index(table, console)
        return lambda queries, k: built.search(F.normalize(queries, dim=1), k)
    features = table.features
    return lambda queries, k: exact(queries, features, k)


def exact(
    queries: Float[Tensor, "Q E"],
    features: Float[Tensor, "N D"],
    k: int,
    projection: Float[Tensor, "D E"] | None = None,
    block: int = BLOCK,
) -> Neighbours:
    """The k nearest rows of each query by cosine, by comparison with every feature, mapped by ``projection`` if given.

    Up to `FEW` queries are compared with ``block`` features at a time, as reading the features takes all the time. For
    more queries, the preparation in `nearest` pays off.
    """
    if len(queries) > FEW and projection is None:
        return nearest(queries, features, k)
    unit = F.normalize(queries.float(), dim=1)
    values, indices = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long)
    for first, rows in zip(range(0, len(features), block), features.split(block), strict=True):
        part = rows if projection is None else rows @ projection
        top = ((part @ unit.T) / part.norm(dim=1, keepdim=True).clamp(min=1e-12)).T.topk(min(k, len(part)), dim=1)
        values, indices = torch.cat([values, top.values], 1), torch.cat([indices, top.indices + first], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return Neighbours(values, indices)


def _results(table: FeatureTable, queries: Queries, neighbours: Neighbours, k: int) -> list[dict[str, Any]]:
    results = []
    for name, query_row, values, rows in zip(
        queries.names, queries.rows, neighbours.values.tolist(), neighbours.indices.tolist(), strict=True
    ):
        matches = [
            {"path": table.paths[row], "distance": round(max(0.0, 1 - value), 6), "row": row}
            for value, row in zip(values, rows, strict=True)
            if row not in (query_row, -1)
        ]
        results.append({"query": name, "matches": matches[:k]})
    return results


def _print(console: Console, results: list[dict[str, Any]]) -> None:
    for result in results[:PRINTED]:
        say(console, f"like {result['query']}", unbroken=True)
        say(console, f"{'distance':>12}  path")
        for i, match in enumerate(result["matches"]):
            say(console, f"{i + 1:>3} {match['distance']:>8.4f}  {match['path']}", unbroken=True)
    if len(results) > PRINTED:
        say(console, f"and {len(results) - PRINTED:,} more queries: --output has all")
