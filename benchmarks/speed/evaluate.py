"""Evaluation at the size of ImageNet: kNN beside bare matrix products and faiss, and a sweep of linear classifiers.

python benchmarks/speed/evaluate.py [--queries 10000] [--bank 1281167] [--rounds 1]   # faiss: pip install faiss-cpu
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from crosslevel.evaluation.linear import Linear, train_sweep
from crosslevel.metrics.knn import weighted_knn

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated, median

SIZE, CLASSES, TILE = 512, 1000, 4096


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=1_281_167)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    print(dated())
    neighbours(arguments.bank, arguments.queries, arguments.rounds)
    sweeps()


def neighbours(count: int, query_count: int, rounds: int) -> None:
    """KNN of k = 200 in a bank of float16, its matrix products alone, and faiss's exact index, in turns."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.empty(count, SIZE, dtype=torch.float16)
    for part in bank.split(65_536):
        part.copy_(torch.randn(part.shape, generator=generator))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    queries = torch.randn(query_count, SIZE, generator=generator)
    ours: list[float] = []
    by_faiss: list[float] = []
    bare: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds):
        ours.append(seconds(lambda: weighted_knn(bank, labels, queries, CLASSES)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for dtype, times in bare.items():
            times.append(seconds(partial(products, count, queries, dtype)))
        searched = faiss_search(bank, queries)
        if searched is not None:
            by_faiss.append(searched)
    print(f"kNN of {query_count:,} queries in {count:,} x {SIZE} float16 features, k = 200 (seconds)")
    print(f"crosslevel {median(ours):.1f}, peak {peak:.1f} GiB")
    for dtype, times in bare.items():
        ratio = median([a / b for a, b in zip(ours, times, strict=True)])
        print(f"bare matrix products in {str(dtype)[6:]} {median(times):.1f}; crosslevel / products {ratio:.2f}")
    if by_faiss:
        ratio = median([a / b for a, b in zip(ours, by_faiss, strict=True)])
        print(f"faiss IndexFlatIP {median(by_faiss):.1f}; crosslevel / faiss {ratio:.2f}")


def products(count: int, queries: torch.Tensor, dtype: torch.dtype) -> None:
    """The same number of products of ready tensors, in blocks of a size that suits them."""
    tile, part = torch.randn(TILE, SIZE).to(dtype), queries.to(dtype)
    out = torch.empty(2048, TILE, dtype=dtype)
    for block in part.split(2048):
        for _ in range(0, count, TILE):
            torch.mm(block, tile.T, out=out[: len(block)])


def faiss_search(bank: torch.Tensor, queries: torch.Tensor) -> float | None:
    """Seconds of faiss's exact index; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(SIZE)
    for part in bank.split(65_536):
        index.add(F.normalize(part.float(), dim=1).numpy())
    unit = F.normalize(queries, dim=1).numpy()
    return seconds(lambda: index.search(unit, 200))


def sweeps(count: int = 45_000, classes: int = 10, rounds: int = 5) -> None:
    """One epoch of twelve settings together, and of one."""
    generator = torch.Generator().manual_seed(0)
    features, labels = (
        torch.randn(count, SIZE, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )
    settings = Linear()
    twelve = [(lr, decay) for lr in settings.lrs for decay in settings.weight_decays]
    together, alone = [], []
    for _ in range(rounds):
        together.append(seconds(lambda: train_sweep(features, labels, classes, twelve, epochs=1)))
        alone.append(seconds(lambda: train_sweep(features, labels, classes, twelve[:1], epochs=1)))
    ratio = median([a / b for a, b in zip(together, alone, strict=True)])
    print(f"linear sweep, {count:,} x {SIZE} features, {classes} classes, an epoch (seconds)")
    print(f"{len(twelve)} settings {median(together):.2f}, one {median(alone):.2f}; ratio {ratio:.2f}")


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
