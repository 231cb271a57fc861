"""The cost of `crosslevel explore`: seconds and memory of a page of 1,000 images, 100,000, and a table of a million.

    python benchmarks/large/explore.py --rows 1000 100000 1000000 --threads 2 -o benchmarks/results/explore

Tables have features of 384 numbers, as in `search.py`, and thumbnails of 96 pixels: smooth pictures, at most 100,000
different ones. The page is written into a folder (--export), which does what serving it does and writes the pictures
besides. The map shows at most --sample images, as in the command; "the map on the clock" is finding each image's
nearest and laying them out; "neighbours kept" is the share of the 15 nearest images by features that are among the 15
nearest on the map. Each size is measured in a process of its own. OUTPUT.json keeps what is measured: called again, the
program measures what is missing, and writes OUTPUT.md. A table stays in --where until it is measured.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from crosslevel.features.columns.thumbnails import KIND

sys.path.append(str(Path(__file__).parents[1]))

from large.search import WIDTH, synthetic_features
from shared import records
from shared.beside import machine

STAGES = {
    "open_collection": "opening",
    "features_of": "reading features",
    "findings_of": "comparing",
    "lay_out": "the map",
    "columns_of": "columns",
    "export_page": "writing the page",
}
PICTURES, PART = 100_000, 8192
FINDINGS = "curation.findings"  # where the neighbours are found that the map is laid out by


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--sample", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()) / "crosslevel-explore")
    parser.add_argument("-o", "--output", default="benchmarks/results/explore")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.sample, arguments.threads)))
        return
    record = Path(arguments.output).with_suffix(".json")
    arguments.where.mkdir(parents=True, exist_ok=True)
    for rows in arguments.rows:
        name = f"{rows} rows, sample {arguments.sample}, {arguments.threads} threads"
        if name not in records.read(record, "cells"):
            file = table(arguments.where, rows)
            environment = {"OMP_NUM_THREADS": str(arguments.threads)}
            words = ["--measure", str(file), f"--sample={arguments.sample}", f"--threads={arguments.threads}"]
            cell = json.loads(records.again(__file__, *words, environment=environment).splitlines()[-1])
            records.add(record, "cells", name, cell, {})
            file.unlink()
        Path(arguments.output).with_suffix(".md").write_text(markdown(records.read(record, "cells")))
        print(f"{name}: {records.read(record, 'cells')[name]}", flush=True)


def table(where: Path, rows: int) -> Path:
    """The table of so many rows, written where it is missing."""
    file = where / f"{rows}.parquet"
    if file.is_file():
        return file
    feature = pa.list_(pa.float32(), WIDTH)
    kind = pa.schema([("path", pa.string()), ("label", pa.int64()), ("feature", feature), ("image", KIND)])
    jpegs = pictures(min(rows, PICTURES))
    part = file.with_suffix(".part")
    with pq.ParquetWriter(part, kind, use_dictionary=False) as writer:
        for first in range(0, rows, PART):
            numbers = range(first, min(rows, first + PART))
            flat = pa.array(synthetic_features(len(numbers), first + 2).numpy().ravel())
            columns = [
                [f"{i % 1000:03}/{i:07}.jpg" for i in numbers],
                [i % 50 for i in numbers],
                pa.FixedSizeListArray.from_arrays(flat, WIDTH),
                pa.array([{"bytes": jpegs[i % len(jpegs)], "path": None} for i in numbers], KIND),
            ]
            writer.write_table(pa.table(columns, schema=kind))
    os.replace(part, file)
    return file


def pictures(count: int) -> list[bytes]:
    """Smooth pictures of 96 pixels, each another one, as JPEG."""
    generator, encoded = torch.Generator().manual_seed(0), []
    for _ in range(count):
        small = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=generator)
        file = io.BytesIO()
        Image.fromarray(small.numpy()).resize((96, 96), Image.Resampling.BICUBIC).save(file, "jpeg", quality=85)
        encoded.append(file.getvalue())
    return encoded


def measured(file: Path, sample: int, threads: int) -> dict[str, Any]:
    """Seconds on the clock and of the processor, of all and of its stages; gigabytes at the most."""
    module, findings = (importlib.import_module(f"crosslevel.{name}") for name in ("exploration.explore", FINDINGS))
    torch.set_num_threads(threads)
    before = peak()
    spent: dict[str, float] = {}
    clock: dict[str, float] = {}
    maps: list[Any] = []
    began, worked = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=file.parent))
        for owner, name in [*((module, name) for name in STAGES), (findings, "nearest")]:
            instead = timed(getattr(owner, name), name, spent, clock, maps)
            stack.enter_context(mock.patch.object(owner, name, instead))
        module.explore(str(file), export=str(Path(folder) / "page"), sample=sample, device="cpu", quiet=True)
        seconds, cpu = time.monotonic() - began, time.process_time() - worked
        top = peak()
        size = sum(part.stat().st_size for part in Path(folder).rglob("*") if part.is_file())
    return {
        "rows": int(file.stem), "shown": min(sample, int(file.stem)), "threads": threads, "seconds": seconds,
        "map_seconds": clock["nearest"] + clock["lay_out"], "cpu": cpu, "peak_gb": top, "before_gb": before,
        "page_mb": size / 1e6, "stages": {name: spent.get(name, 0.0) for name in STAGES},
        "kept": neighbours_kept(*maps[0]), "machine": machine(),
    }  # fmt: skip


def timed(
    inner: Callable[..., Any], name: str, spent: dict[str, float], clock: dict[str, float], maps: list[Any]
) -> Callable[..., Any]:
    """The same function, which adds its seconds of the processor to ``spent``, and those of the clock to ``clock``.

    The map's input and output go to ``maps``.
    """

    def outer(*arguments: Any, **options: Any) -> Any:
        began, worked = time.monotonic(), time.process_time()
        result = inner(*arguments, **options)
        spent[name] = spent.get(name, 0.0) + time.process_time() - worked
        clock[name] = clock.get(name, 0.0) + time.monotonic() - began
        if name == "lay_out":
            maps.append((arguments[1].indices, result))
        return result

    return outer


def neighbours_kept(near: torch.Tensor, points: torch.Tensor, k: int = 15, sample: int = 2000) -> float:
    """The share of the k nearest by features that are among the k nearest on the map, over a sample of the points."""
    rows = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:sample]
    shares = []
    for part in rows.split(100):
        distances = torch.cdist(points[part], points)
        distances[torch.arange(len(part)), part] = torch.inf
        nearest = distances.topk(k, largest=False).indices
        shares.append((near[part, 1 : k + 1].unsqueeze(2) == nearest.unsqueeze(1)).any(2).float().mean(1))
    return float(torch.cat(shares).mean())


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def markdown(cells: dict[str, Any]) -> str:
    rows = sorted(cells.values(), key=lambda cell: (cell["rows"], cell["threads"], cell["shown"]))
    lines = [f"{where}" for where in dict.fromkeys(cell["machine"] for cell in rows)]
    lines += [
        "",
        "| images | on the map | threads | seconds | the map on the clock | of one core "
        f"| {' | '.join(STAGES.values())} | peak | page | neighbours kept |",
        "|" + "---|" * (9 + len(STAGES)),
    ]
    for cell in rows:
        of_map = f"{cell['map_seconds']:,.0f}" if "map_seconds" in cell else "-"
        stages = " | ".join(f"{cell['stages'].get(name, 0):,.1f}" for name in STAGES)
        lines.append(
            f"| {cell['rows']:,} | {cell['shown']:,} | {cell['threads']} | {cell['seconds']:,.0f} | {of_map} "
            f"| {cell['cpu']:,.0f} "
            f"| {stages} | {cell['peak_gb']:.1f} GB | {cell['page_mb']:,.0f} MB | {100 * cell['kept']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
