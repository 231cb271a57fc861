"""An index of a table of features, kept beside it: the nearest of millions without comparing with all.

A graph of near neighbours (HNSW: Malkov and Yashunin 2018) by the library usearch. Each row has a key made of its path
and its feature, so that an index of a table that has changed is brought up to date by the rows that came and went.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from crosslevel.features.table import FeatureTable
from crosslevel.metrics.nearest import Neighbours
from crosslevel.utils.console import say
from crosslevel.utils.errors import MissingExtra, UserError
from crosslevel.utils.files import replacing, sync_folder, write
from crosslevel.utils.locks import folder_lock

GRAPH, KEYS, ABOUT = "graph.usearch", "keys.npy", "about.json"
LINKS, BUILD_WIDTH = 16, 64  # of the graph; wider candidates while it is built find better links, and take longer
WIDTHS = (64, 128, 256, 512, 1024)  # candidates of a query, from which the least that suffices is taken
WANTED, ASKED = 0.99, 200  # recall of the 10 nearest, and the rows that it is measured with
FORMAT = 1

Keys = np.ndarray[Any, np.dtype[np.uint64]]


class TableIndex:
    """The graph of a table, and which row each of its keys is."""

    def __init__(self, graph: Any, keys: Keys, metadata: dict[str, Any]) -> None:
        self.graph, self.keys, self.metadata = graph, keys, metadata
        self._order = np.argsort(keys)

    def search(self, queries: Float[Tensor, "Q D"], k: int) -> Neighbours:
        """The k nearest rows of each query by cosine, the nearest first; -1 where fewer were found."""
        self.graph.expansion_search = max(int(self.metadata["width"]), k)
        hits = self.graph.search(queries.float().numpy(), k, threads=torch.get_num_threads())
        keys, distances = np.atleast_2d(hits.keys), np.atleast_2d(hits.distances)
        positions = np.searchsorted(self.keys, keys.ravel(), sorter=self._order).clip(max=len(self.keys) - 1)
        rows = self._order[positions].reshape(keys.shape)
        valid = (self.keys[rows] == keys) & np.isfinite(distances)
        values = np.where(valid, 1 - distances, -np.inf).astype(np.float32)
        return Neighbours(torch.from_numpy(values), torch.from_numpy(np.where(valid, rows, -1)))


def opened_index(table: FeatureTable, console: Console) -> TableIndex:
    """The index of a table: as it is on disk, brought up to date, or built.

    Raises:
        MissingExtra: the library is not installed.
        FolderInUse: another process is building it.

    """
    library = _library()
    folder = table.file.with_name(f"{table.file.name}.index")
    metadata = _metadata(folder)
    if metadata is not None and metadata["checksum"] == table.checksum:
        stored = _stored(library, folder, view=True)
        if stored is not None and len(stored[0]) == table.rows:
            return TableIndex(*stored, metadata)
    with folder_lock(folder, "crosslevel search"):
        return _updated(library, table, folder, metadata, console)


def _updated(
    library: Any, table: FeatureTable, folder: Path, before: dict[str, Any] | None, console: Console
) -> TableIndex:
    """Build it, or change what there is by the rows that came and went."""
    keys = np.concatenate([_keys(paths, features) for paths, features in table.batches()])
    graph, old = None, np.zeros(0, np.uint64)
    if before is not None and before["width_of_features"] == table.width:
        graph, old = _stored(library, folder, view=False) or (None, old)
    removed, added = np.setdiff1d(old, keys), np.setdiff1d(keys, old)
    if graph is None or len(graph) != len(old) or len(removed) + len(added) > max(len(keys), 1) / 2:
        say(console, f"building an index of {table.rows:,} rows in {folder}: once")
        graph, removed, added = _empty(library, table.width), removed[:0], keys
    else:
        say(console, f"{folder} is not of the table as it is now: {len(added):,} rows added, {len(removed):,} removed")
    if len(removed):
        graph.remove(removed, threads=torch.get_num_threads())
    for part, features in _rows(table, keys, added):
        graph.add(part, features.numpy(), threads=torch.get_num_threads())
    width, recall = _measured(graph, keys, table)
    metadata = {
        "format": FORMAT, "checksum": table.checksum, "width": width, "recall": recall,
        "width_of_features": table.width, "rows": table.rows,
    }  # fmt: skip
    (folder / ABOUT).unlink(missing_ok=True)  # a kill from here on leaves an index that is built anew
    _save(graph, folder / GRAPH)
    with replacing(folder / KEYS) as file:
        np.save(file, keys)
    write(folder / ABOUT, json.dumps(metadata))
    say(console, f"the index finds {100 * recall:.1f} % of the 10 nearest of {min(ASKED, table.rows)} rows")
    return TableIndex(graph, keys, metadata)


def _stored(library: Any, folder: Path, view: bool) -> tuple[Any, Keys] | None:
    """The graph and the keys of its rows as they were left; None where they are damaged, or not of each other."""
    try:
        graph, keys = library.restore(str(folder / GRAPH), view=view), np.load(folder / KEYS)
    except (OSError, ValueError, EOFError, RuntimeError):
        return None
    return (graph, keys) if graph is not None and keys.dtype == np.uint64 and keys.shape == (len(graph),) else None


def _library() -> Any:
    try:
        from usearch.index import Index  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra(
            "an index needs usearch: pip install 'crosslevel[search]'; --index off compares with every row"
        ) from error
    return Index


def _empty(library: Any, width: int) -> Any:
    return library(ndim=width, metric="cos", dtype="f16", connectivity=LINKS, expansion_add=BUILD_WIDTH)


def _metadata(folder: Path) -> dict[str, Any] | None:
    """The index's metadata; None if there is no complete index."""
    try:
        metadata: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        complete = metadata["format"] == FORMAT and {"checksum", "width", "recall", "width_of_features"} <= set(
            metadata
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata if complete and (folder / GRAPH).is_file() and (folder / KEYS).is_file() else None


def _keys(paths: list[str], features: Float[Tensor, "B D"]) -> Keys:
    """A number for each row that no other row has: rows that are the same in all are told apart by their paths."""
    keys = np.empty(len(paths), np.uint64)
    for i, (path, feature) in enumerate(zip(paths, features.numpy(), strict=True)):
        digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8)
        digest.update(feature.tobytes())
        keys[i] = int.from_bytes(digest.digest(), "little")
    return keys


def _rows(table: FeatureTable, keys: Keys, requested: Keys) -> Iterator[tuple[Keys, Float[Tensor, "B D"]]]:
    """The features of some keys, each once, and the keys."""
    first, mask = 0, np.isin(keys, requested)
    mask &= np.isin(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
    for _, features in table.batches():
        part = mask[first : first + len(features)]
        if part.any():
            yield keys[first : first + len(features)][part], F.normalize(features[torch.from_numpy(part)], dim=1)
        first += len(features)


def _measured(graph: Any, keys: Keys, table: FeatureTable) -> tuple[int, float]:
    """The least width of a query with which enough of the 10 nearest are found, and the share that are."""
    query_rows = np.random.default_rng(0).permutation(table.rows)[:ASKED]
    first, chunks = 0, []
    for _, features in table.batches():
        local_rows = np.sort(query_rows[(query_rows >= first) & (query_rows < first + len(features))]) - first
        chunks.append(features[torch.from_numpy(local_rows)])
        first += len(features)
    queries, query_rows = F.normalize(torch.cat(chunks), dim=1), np.sort(query_rows)
    k = min(11, table.rows)  # each finds itself, which is no merit
    truth, width, share = _exact(table, queries, k), WIDTHS[0], 0.0
    for width in WIDTHS:
        indices = TableIndex(graph, keys, {"width": width}).search(queries, k).indices.numpy()
        hits = [
            len((set(a) & set(b)) - {row}) / max(1, len(set(b) - {row}))
            for a, b, row in zip(indices.tolist(), truth.tolist(), query_rows.tolist(), strict=True)
        ]
        share = float(np.mean(hits))
        if share >= WANTED:
            break
    return width, share


def _exact(table: FeatureTable, queries: Float[Tensor, "Q D"], k: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The k nearest rows, compared with every one."""
    values, rows, first = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long), 0
    for _, features in table.batches():
        part = (queries @ F.normalize(features, dim=1).T).topk(min(k, len(features)), dim=1)
        values, rows = torch.cat([values, part.values], 1), torch.cat([rows, part.indices + first], 1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        rows, first = rows.gather(1, order), first + len(features)
    return rows.numpy()


def _save(graph: Any, file: Path) -> None:
    """Put the graph in place, whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    try:
        graph.save(str(part))
        with part.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
    sync_folder(file.parent)
