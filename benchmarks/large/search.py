"""The nearest images among many: all compared, by the index that `crosslevel search` keeps, and by libraries alone.

    python benchmarks/large/search.py --rows 100000 1000000 -o benchmarks/results/search

Features are generated: a latent of 32 numbers in 2,000 clusters of unequal sizes goes through two random layers, and
its 384 outputs have length 1. Queries are 1,000 more of the same. One thread; times are the processor's, so that what
else runs on the machine counts little. Each library has the least setting that finds 99 % of the 10 nearest.

Each way is measured in a process of its own, and OUTPUT.json keeps what is measured: called again, the program measures
what is missing, and writes OUTPUT.md. The tables and indexes stay in --where.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crosslevel.features.table import FeatureTable, open_table
from crosslevel.retrieval.index import opened_index
from crosslevel.retrieval.search import exact
from crosslevel.utils.console import printer

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import machine

WIDTH, QUERIES, K, SINGLE, RECALL = 384, 1000, 10, 100, 0.99
ONE = {"OMP_NUM_THREADS": "1"}
Find = Callable[[torch.Tensor], np.ndarray[Any, Any]]


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--ways", nargs="+", default=["exact", "index", "usearch"], choices=list(WAYS))
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()) / "crosslevel-search")
    parser.add_argument("-o", "--output", default="benchmarks/results/search")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.ways[0])))
        return
    record = Path(arguments.output).with_suffix(".json")
    for rows in arguments.rows:
        folder = arguments.where / str(rows)
        folder.mkdir(parents=True, exist_ok=True)
        for way in arguments.ways:
            name = f"{rows} {way}"
            if name not in records.read(record, "cells"):
                written(folder / "features.parquet", rows)
                if way != "exact" and not (folder / "truth.npy").is_file():
                    measured(folder, "exact")
                output = records.again(__file__, "--measure", str(folder), "--ways", way, environment=ONE)
                cell = {"rows": rows, "way": way, **json.loads(output.splitlines()[-1])}
                records.add(record, "cells", name, cell, {})
            print(f"{name}: {records.read(record, 'cells')[name]}", flush=True)
            Path(arguments.output).with_suffix(".md").write_text(markdown(records.read(record, "cells")))


def synthetic_features(count: int, seed: int) -> torch.Tensor:
    """Features as a network's: on a curved surface of 32 dimensions, in crowds of unequal size."""
    fixed = torch.Generator().manual_seed(0)
    centres = torch.randn(2000, 32, generator=fixed)
    first = torch.randn(32, 512, generator=fixed) / 32**0.5
    second = torch.randn(512, WIDTH, generator=fixed) / 512**0.5
    sizes, own = (torch.arange(2000) + 1.0).pow(-0.7), torch.Generator().manual_seed(seed)
    latent = centres[torch.multinomial(sizes, count, True, generator=own)] + 0.6 * torch.randn(count, 32, generator=own)
    noise = 0.02 * torch.randn(count, WIDTH, generator=own)
    return torch.nn.functional.normalize((latent @ first).relu() @ second + noise, dim=1)


def written(file: Path, rows: int) -> None:
    """Write the table of so many rows, complete or not at all."""
    if file.is_file():
        return
    kind = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), WIDTH))])
    part = file.with_suffix(".part")
    with pq.ParquetWriter(part, kind, use_dictionary=False) as writer:
        for first in range(0, rows, 65_536):
            count = min(65_536, rows - first)
            flat = pa.array(synthetic_features(count, first + 2).numpy().ravel())
            paths = [f"{i:09}.jpg" for i in range(first, first + count)]
            writer.write_table(pa.table([paths, pa.FixedSizeListArray.from_arrays(flat, WIDTH)], schema=kind))
    os.replace(part, file)


def measured(folder: Path, way: str) -> dict[str, Any]:
    """The time that one way takes to build and to answer, and its recall."""
    table, queries = open_table(folder / "features.parquet"), synthetic_features(QUERIES, 1)
    began = time.process_time()
    name, settings = WAYS[way](table)
    built, result = time.process_time() - began, {}
    for setting, find in settings:
        began = time.process_time()
        indices = find(queries)
        together = 1000 * (time.process_time() - began) / QUERIES
        if way == "exact":
            np.save(folder / "truth.npy", indices)
        recall = recall_of(indices, np.load(folder / "truth.npy"))
        began = time.process_time()
        for query in queries[:SINGLE].split(1):
            find(query)
        single = 1000 * (time.process_time() - began) / SINGLE
        result = {"name": name + setting, "recall": recall, "together_ms": together, "single_ms": single}
        if recall >= RECALL:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {**result, "built_s": built, "peak_gb": peak, "machine": machine()}


def recall_of(indices: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """The share of the nearest that were found."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(indices.tolist(), truth.tolist(), strict=True)]))


def all_compared(table: FeatureTable) -> tuple[str, list[tuple[str, Find]]]:
    keys = table.features
    return "every row compared", [("", lambda x: exact(x, keys, K).indices.numpy())]


def index(table: FeatureTable) -> tuple[str, list[tuple[str, Find]]]:
    """The index of `crosslevel search`, with the recall that it measures itself."""
    shutil.rmtree(table.file.with_name(f"{table.file.name}.index"), ignore_errors=True)
    opened = opened_index(table, printer(quiet=True))
    return "`crosslevel search`'s index", [("", lambda x: opened.search(x, K).indices.numpy())]


def usearch(table: FeatureTable, **options: Any) -> tuple[str, list[tuple[str, Find]]]:
    """The library with its own settings or ``options``, at several numbers of candidates a query."""
    from usearch.index import Index

    graph, first = Index(ndim=WIDTH, metric="cos", **options), 0
    for _, features in table.batches():
        graph.add(np.arange(first, first + len(features), dtype=np.uint64), features.numpy(), threads=1)
        first += len(features)

    def find(queries: torch.Tensor, width: int) -> np.ndarray[Any, Any]:
        graph.expansion_search = width  # type: ignore[misc]  # mypy misses its setter: it does not follow the getter
        return np.atleast_2d(graph.search(queries.numpy(), K, threads=1).keys).astype(np.int64)

    name = f"usearch alone ({graph.dtype.name.lower()}, {graph.connectivity} links, built with {graph.expansion_add}"
    return name, [(f"; {width} candidates)", partial(find, width=width)) for width in (64, 128, 256, 512, 1024)]


def float16(table: FeatureTable) -> tuple[str, list[tuple[str, Find]]]:
    """The library alone, built as the index of `crosslevel search` is, but for its bytes."""
    return usearch(table, dtype="f16", connectivity=16, expansion_add=64)


def faiss(table: FeatureTable) -> tuple[str, list[tuple[str, Find]]]:
    """Inverted lists with 4-bit codes, and the best compared in float32."""
    import faiss as library

    library.omp_set_num_threads(1)
    lists, x = int(4 * table.rows**0.5), table.features.numpy()
    quick = library.index_factory(WIDTH, f"IVF{lists},PQ96x4fs,RFlat", library.METRIC_INNER_PRODUCT)
    inner = library.extract_index_ivf(quick)
    inner.cp.niter, inner.cp.max_points_per_centroid = 6, 64
    quick.train(x[np.random.default_rng(0).permutation(len(x))[: lists * 64]])
    quick.add(x)

    def find(queries: torch.Tensor, probes: int, factor: int) -> np.ndarray[Any, Any]:
        inner.nprobe, quick.k_factor = probes, factor
        return quick.search(queries.numpy(), K)[1]

    candidates = ((8, 10), (16, 10), (32, 10), (32, 30), (64, 30), (128, 30), (256, 50))
    name = f"faiss alone (IVF{lists}, PQ96x4fs, RFlat"
    return name, [(f", {p} lists, {f} times k)", partial(find, probes=p, factor=f)) for p, f in candidates]


WAYS: dict[str, Callable[[FeatureTable], tuple[str, list[tuple[str, Find]]]]] = {
    "exact": all_compared, "index": index, "usearch": usearch, "float16": float16, "faiss": faiss,
}  # fmt: skip


def markdown(cells: dict[str, Any]) -> str:
    """A row a way; speeds against comparing with every row, of the same table."""
    lines = [
        "; ".join(dict.fromkeys(cell["machine"] for cell in cells.values())),
        "",
        f"| rows of {WIDTH} | | built in | recall of the {K} nearest | ms a query, {QUERIES:,} at once "
        "| ms, one at a time | against exact, one at a time | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells.values(), key=lambda cell: (cell["rows"], list(WAYS).index(cell["way"]))):
        base = cells.get(f"{cell['rows']} exact")
        against = "-" if base is None else f"{base['single_ms'] / cell['single_ms']:.0f}x"
        built = "-" if cell["way"] == "exact" else f"{cell['built_s']:,.0f} s"
        lines.append(
            f"| {cell['rows']:,} | {cell['name']} | {built} | {cell['recall']:.3f} | {cell['together_ms']:.2f} "
            f"| {cell['single_ms']:.2f} | {against} | {cell['peak_gb']:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
