"""An index of a table of features, kept beside it: finds the nearest of millions without comparing all.

The index is a graph of near neighbours (HNSW: Malkov and Yashunin 2018) by the library usearch. Features are stored as
one byte per number: such a graph is faster to build and search, and takes less memory. Its results are ranked again by
the features in float16. Each row has a key made of its path and its feature, so that the index of a changed table is
updated by the added and removed rows. `freshness` detects the change.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from crosslevel.features.table import FeatureTable
from crosslevel.metrics.nearest import Neighbours
from crosslevel.retrieval.freshness import SETTLED, State, recognized
from crosslevel.utils.console import say
from crosslevel.utils.errors import MissingExtra, UserError
from crosslevel.utils.files import replacing, sync_folder, write
from crosslevel.utils.locks import folder_lock

GRAPH, KEYS, ROWS, ABOUT = "graph.usearch", "keys.npy", "features.npy", "about.json"
LINKS, BUILD_WIDTH = 16, 64  # of the graph; more candidates while it is built find better links, and take longer
WIDTHS = (64, 96, 128, 160, 192, 256, 512, 1024)  # candidates of a query: the smallest sufficient number is chosen
RECALL, RECALL_QUERIES = 0.99, 1000  # required recall of the 10 nearest, and the rows to measure it with
SAMPLE, INSIDE = 20_000, 0.9999  # rows that determine the coding, share of numbers in a byte's range
PART, TOGETHER = 65_536, 64  # rows that are read, and queries that are compared, at a time
FORMAT = 2

Keys = np.ndarray[Any, np.dtype[np.uint64]]
Rows = np.ndarray[Any, np.dtype[np.float16]]


class Coding(NamedTuple):
    """Coding of features as bytes: minus the mean, times a factor. Distances are multiplied by the same factor."""

    centre: np.ndarray[Any, np.dtype[np.float32]]
    factor: float

    @classmethod
    def of(cls, rows: Rows) -> Coding:
        """The coding for a table's features."""
        sample = rows[:: max(1, len(rows) // SAMPLE)].astype(np.float32)
        centre = sample.mean(axis=0)
        return cls(centre, float(127 / max(np.quantile(np.abs(sample - centre), INSIDE), 1e-6)))

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Coding:
        """The coding stored in an index's metadata."""
        return cls(np.array(metadata["centre"], np.float32), float(metadata["factor"]))

    def bytes(self, features: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Features (N, D) of length 1 as bytes."""
        moved = (features.astype(np.float32) - self.centre) * self.factor
        return np.rint(moved).clip(-127, 127).astype(np.int8)


class TableIndex:
    """The graph of a table, the row of each of its keys, and the rows' features at length 1."""

    def __init__(self, graph: Any, keys: Keys, rows: Rows, metadata: dict[str, Any]) -> None:
        self.graph, self.keys, self.rows, self.metadata = graph, keys, rows, metadata
        self._order = np.argsort(keys)
        self._coding = Coding.from_metadata(metadata)

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> Neighbours:
        """The k nearest rows of each query of length 1 by cosine, the nearest first; -1 if fewer were found."""
        chunks = [self._search(chunk, k) for chunk in queries.float().split(TOGETHER)]
        return Neighbours(torch.cat([chunk.values for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks]))

    def _search(self, queries: Float[Tensor, "Q D"], k: int) -> Neighbours:
        width = min(max(int(self.metadata["width"]), k), len(self.graph))
        self.graph.expansion_search = width
        hits = self.graph.search(self._coding.bytes(queries.numpy()), width, threads=torch.get_num_threads())
        keys, distances = np.atleast_2d(hits.keys), np.atleast_2d(hits.distances)
        positions = np.searchsorted(self.keys, keys.ravel(), sorter=self._order).clip(max=len(self.keys) - 1)
        rows = self._order[positions].reshape(keys.shape)
        valid = torch.from_numpy((self.keys[rows] == keys) & np.isfinite(distances))
        candidates = torch.from_numpy(self.rows[rows]).float()
        values = torch.bmm(candidates, queries.unsqueeze(2)).squeeze(2).masked_fill(~valid, -torch.inf)
        values, order = values.topk(min(k, width), dim=1)
        return Neighbours(values, torch.from_numpy(rows).masked_fill(~valid, -1).gather(1, order))


def opened_index(table: FeatureTable, console: Console, *, settled: float = SETTLED) -> TableIndex:
    """The index of a table: loaded from disk, updated, or built.

    ``settled``: seconds after which a file's times tell its next change from the last one.

    Raises:
        MissingExtra: the library is not installed.
        FolderInUse: another process is building it.

    """
    library = _library()
    folder = table.file.with_name(f"{table.file.name}.index")
    metadata = _metadata(folder)
    state = None if metadata is None else recognized(table, metadata, settled)
    if metadata is not None and state is not None:
        stored, rows, shape = _stored(library, folder, view=True), _rows(folder), (table.rows, table.width)
        if stored is not None and rows is not None and rows.shape == (len(stored[0]), table.width) == shape:
            _note(folder, metadata, state)
            return TableIndex(*stored, rows, metadata)
    with folder_lock(folder, "crosslevel search"):
        return _updated(library, table, folder, metadata, console, settled)


def _note(folder: Path, metadata: dict[str, Any], state: State) -> None:
    """Note the table's new times, so that its content is not compared again; where it cannot be written, it is."""
    if state.times in (None, metadata.get("times")) or not os.access(folder, os.W_OK):
        return
    with suppress(OSError, UserError), folder_lock(folder, "crosslevel search"):
        if _metadata(folder) == metadata:  # else another process has brought it up to date
            write(folder / ABOUT, json.dumps(metadata | state._asdict()))


def _updated(
    library: Any, table: FeatureTable, folder: Path, before: dict[str, Any] | None, console: Console, settled: float
) -> TableIndex:
    """Build the index, or update the existing one by the added and removed rows."""
    times, state = table.times(), State.of(table, settled)
    graph, old = None, np.zeros(0, np.uint64)
    if before is not None and before["width_of_features"] == table.width:
        graph, old = _stored(library, folder, view=False) or (None, old)
    (folder / ABOUT).unlink(missing_ok=True)  # after a kill from here on, the index is built anew
    keys, rows = _copied(table, folder)
    removed, added = np.setdiff1d(old, keys), np.setdiff1d(keys, old)
    if before is None or graph is None or len(graph) != len(old) or len(removed) + len(added) > max(len(keys), 1) / 2:
        say(console, f"building an index of {table.rows:,} rows in {folder}: once")
        coding, graph, removed, added = Coding.of(rows), _empty(library, table.width), removed[:0], keys
    elif not len(removed) + len(added):
        say(console, f"{folder}: all rows were compared with the table's, and are the same")
        coding = Coding.from_metadata(before)
    else:
        say(console, f"{folder} is not of the table as it is now: {len(added):,} rows added, {len(removed):,} removed")
        coding = Coding.from_metadata(before)
    if len(removed):
        graph.remove(removed, threads=torch.get_num_threads())
    first = np.unique(keys, return_index=True)[1]  # one of several identical rows
    missing = np.sort(first[np.isin(keys[first], added)])
    for part in np.array_split(missing, max(1, -(-len(missing) // PART))):
        graph.add(keys[part], coding.bytes(rows[part]), threads=torch.get_num_threads())
    if table.times() != times:  # it changed while it was read: the next search compares all rows
        state = state._replace(content="", times=None)
    metadata = {
        "format": FORMAT, **state._asdict(), "width": WIDTHS[0], "recall": 0.0,
        "width_of_features": table.width, "rows": table.rows,
        "centre": coding.centre.tolist(), "factor": coding.factor,
    }  # fmt: skip
    metadata["width"], metadata["recall"] = _measured(TableIndex(graph, keys, rows, metadata))
    _save(graph, folder / GRAPH)
    with replacing(folder / KEYS) as file:
        np.save(file, keys)
    write(folder / ABOUT, json.dumps(metadata))
    recall = 100 * metadata["recall"]
    say(console, f"the index finds {recall:.1f} % of the 10 nearest of {min(RECALL_QUERIES, table.rows)} rows")
    return TableIndex(graph, keys, rows, metadata)


def _copied(table: FeatureTable, folder: Path) -> tuple[Keys, Rows]:
    """The keys of the rows, and their features at length 1 in a file that is read on demand."""
    keys = []
    header = {"descr": "<f2", "fortran_order": False, "shape": (table.rows, table.width)}
    try:
        with replacing(folder / ROWS) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for paths, features in table.batches(PART):
                keys.append(_keys(paths, features))
                file.write(F.normalize(features, dim=1).half().numpy().tobytes())
    except OSError as error:
        raise _unwritten(folder / ROWS, error) from error
    rows = _rows(folder)
    if rows is None:
        raise UserError(f"{folder / ROWS} cannot be read as it was written: try again")
    return np.concatenate(keys), rows


def _stored(library: Any, folder: Path, view: bool) -> tuple[Any, Keys] | None:
    """The stored graph and the keys of its rows; None if they are damaged, or do not belong together."""
    try:
        graph, keys = library.restore(str(folder / GRAPH), view=view), np.load(folder / KEYS)
    except (OSError, ValueError, EOFError, RuntimeError):
        return None
    return (graph, keys) if graph is not None and keys.dtype == np.uint64 and keys.shape == (len(graph),) else None


def _rows(folder: Path) -> Rows | None:
    """The stored features; None if they are damaged."""
    try:
        rows = np.load(folder / ROWS, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(rows) if rows.dtype == np.float16 else None


def _library() -> Any:
    try:
        from usearch.index import Index  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra(
            "an index needs usearch: pip install 'crosslevel[search]'; --index off compares with every row"
        ) from error
    return Index


def _empty(library: Any, width: int) -> Any:
    return library(ndim=width, metric="l2sq", dtype="i8", connectivity=LINKS, expansion_add=BUILD_WIDTH)


def _metadata(folder: Path) -> dict[str, Any] | None:
    """The index's metadata; None if there is no complete index."""
    try:
        metadata: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        fields = {"checksum", "width", "recall", "width_of_features", *Coding._fields}
        complete = metadata["format"] == FORMAT and fields <= set(metadata)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata if complete and (folder / GRAPH).is_file() and (folder / KEYS).is_file() else None


def _keys(paths: list[str], features: Float[Tensor, "B D"]) -> Keys:
    """A unique number for each row; rows with equal features are distinguished by their paths."""
    keys = np.empty(len(paths), np.uint64)
    for i, (path, feature) in enumerate(zip(paths, features.numpy(), strict=True)):
        digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8)
        digest.update(feature.tobytes())
        keys[i] = int.from_bytes(digest.digest(), "little")
    return keys


def _measured(index: TableIndex) -> tuple[int, float]:
    """The smallest number of candidates that finds enough of the 10 nearest, and the recall."""
    rows, width, share = index.rows, WIDTHS[0], 0.0
    query_rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:RECALL_QUERIES])
    queries, k = torch.from_numpy(rows[query_rows]).float(), min(11, len(rows))  # each finds itself: not counted
    truth = _exact(rows, queries, k)
    for width in WIDTHS:
        index.metadata["width"] = width
        indices = index.search(queries, k).indices.numpy()
        hits = [
            len((set(a) & set(b)) - {row}) / max(1, len(set(b) - {row}))
            for a, b, row in zip(indices.tolist(), truth.tolist(), query_rows.tolist(), strict=True)
        ]
        share = float(np.mean(hits))
        if share >= RECALL:
            break
    return width, share


def _exact(rows: Rows, queries: Float[Tensor, "Q D"], k: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The k nearest rows, by comparison with all rows."""
    values, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for first in range(0, len(rows), PART):
        keys = torch.from_numpy(rows[first : first + PART].astype(np.float32))
        part = (queries @ keys.T).topk(min(k, len(keys)), dim=1)
        values, indices = torch.cat([values, part.values], 1), torch.cat([indices, part.indices + first], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return indices.numpy()


def _save(graph: Any, file: Path) -> None:
    """Write the graph atomically."""
    part = file.with_name(f"{file.name}.part")
    try:
        graph.save(str(part))
        with part.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unwritten(file, error) from error
    sync_folder(file.parent)


def _unwritten(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be written: {error.strerror or error}")
