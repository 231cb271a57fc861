"""The nearest images among many: exact, by the index that `crosslevel search` keeps, and by other libraries.

    python benchmarks/large/search.py --rows 1000000 --libraries usearch,faiss -o benchmarks/results/search.md

Features are generated: a latent of 32 numbers in 2,000 clusters of unequal sizes goes through two random layers, and
its 384 outputs have length 1. Queries are 1,000 more of the same. One thread; times are the processor's, so that what
else runs on the machine counts little. Of each library the least setting is taken that finds 99 % of the 10 nearest.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crosslevel.features.table import open_table
from crosslevel.retrieval.index import opened_index
from crosslevel.retrieval.search import exact
from crosslevel.utils.console import printer

sys.path.append(str(Path(__file__).parents[1]))

from shared.records import options

WIDTH, QUERIES, K, SINGLE, RECALL = 384, 1000, 10, 100, 0.99


def main() -> None:
    given = options(__doc__)
    given.add_argument("--rows", type=int, default=1_000_000)
    given.add_argument("--libraries", default="usearch,faiss")
    given.add_argument("-o", "--output", default="")
    arguments = given.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{arguments.rows:,} x {WIDTH} features in float32, the {K} nearest, one thread, processor time",
        "",
        "| | built in | recall | ms a query, 1,000 at once | ms, one at a time | one at a time against exact |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        file, queries = Path(folder) / "f.parquet", made(QUERIES, 1)
        write(file, arguments.rows)
        table = open_table(file)
        keys, began = table.features, time.process_time()
        truth = exact(queries, keys, K).indices.numpy()
        together = 1000 * (time.process_time() - began) / QUERIES
        one = single(lambda x: exact(x, keys, K), queries[:20])
        lines.append(f"| every row compared | - | 1.000 | {together:.2f} | {one:.1f} | 1x |")
        print(lines[-1], flush=True)
        for name in arguments.libraries.split(","):
            lines.append(MEASURED[name](table, queries, truth, one))
            print(lines[-1], flush=True)
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")


def made(count: int, seed: int) -> torch.Tensor:
    """Features as a network's: on a curved surface of 32 dimensions, in crowds of unequal size."""
    fixed = torch.Generator().manual_seed(0)
    centres = torch.randn(2000, 32, generator=fixed)
    first = torch.randn(32, 512, generator=fixed) / 32**0.5
    second = torch.randn(512, WIDTH, generator=fixed) / 512**0.5
    sizes, own = (torch.arange(2000) + 1.0).pow(-0.7), torch.Generator().manual_seed(seed)
    latent = centres[torch.multinomial(sizes, count, True, generator=own)] + 0.6 * torch.randn(count, 32, generator=own)
    noise = 0.02 * torch.randn(count, WIDTH, generator=own)
    return torch.nn.functional.normalize((latent @ first).relu() @ second + noise, dim=1)


def write(file: Path, rows: int) -> None:
    kind = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), WIDTH))])
    with pq.ParquetWriter(file, kind, use_dictionary=False) as writer:
        for first in range(0, rows, 65_536):
            count = min(65_536, rows - first)
            flat = pa.array(made(count, first + 2).numpy().ravel())
            paths = [f"{i:09}.jpg" for i in range(first, first + count)]
            writer.write_table(pa.table([paths, pa.FixedSizeListArray.from_arrays(flat, WIDTH)], schema=kind))


def single(find: Callable[[torch.Tensor], object], queries: torch.Tensor) -> float:
    began = time.process_time()
    for query in queries.split(1):
        find(query)
    return 1000 * (time.process_time() - began) / len(queries)


def row(name: str, built: float, find: Callable, queries: torch.Tensor, truth: np.ndarray, base: float) -> tuple:
    began = time.process_time()
    found = find(queries)
    together = 1000 * (time.process_time() - began) / len(queries)
    recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))
    one = single(find, queries[:SINGLE])
    line = f"| {name} | {built:.0f} s | {recall:.3f} | {together:.2f} | {one:.2f} | {base / one:.0f}x |"
    return recall, line


def usearch(table, queries, truth, base) -> str:
    """What `crosslevel search` does, the recall that it measures itself included."""
    began = time.process_time()
    index = opened_index(table, printer())
    built = time.process_time() - began
    return row(
        "crosslevel search's index (usearch, HNSW, float16)", built, lambda x: index.search(x, K).indices.numpy(),
        queries, truth, base,
    )[1]  # fmt: skip


def faiss(table, queries, truth, base) -> str:
    """Inverted lists with 4-bit codes, and the best compared in float32."""
    import faiss as library

    library.omp_set_num_threads(1)
    lists, x, began = int(4 * table.rows**0.5), table.features.numpy(), time.process_time()
    index = library.index_factory(WIDTH, f"IVF{lists},PQ96x4fs,RFlat", library.METRIC_INNER_PRODUCT)
    inner = library.extract_index_ivf(index)
    inner.cp.niter, inner.cp.max_points_per_centroid = 6, 64
    index.train(x[np.random.default_rng(0).permutation(len(x))[: lists * 64]])
    index.add(x)
    built, line = time.process_time() - began, ""
    for probes, factor in ((8, 10), (16, 10), (32, 10), (32, 30), (64, 30), (128, 30), (256, 50)):
        inner.nprobe, index.k_factor = probes, factor
        name = f"faiss, IVF{lists}, PQ96x4fs, RFlat, {probes} lists, {factor} times k"
        recall, line = row(name, built, lambda x: index.search(x.numpy(), K)[1], queries, truth, base)
        if recall >= RECALL:
            break
    return line


MEASURED = {"usearch": usearch, "faiss": faiss}

if __name__ == "__main__":
    main()
