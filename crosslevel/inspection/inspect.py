"""``crosslevel inspect``: describe a collection: sizes, damage, duplicates, long tail, and suggested settings."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from crosslevel import report
from crosslevel.data.bad_files import BadFiles, escaped
from crosslevel.data.cluster import Engine, Opened, ready
from crosslevel.data.duplicates.across import Match, matches
from crosslevel.data.duplicates.scan import ScanResult, scan
from crosslevel.data.duplicates.sets import NAMES, duplicate_sets, write_csv, write_rows
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets import select
from crosslevel.data.uri import Source, parse
from crosslevel.features.extract import Runtime
from crosslevel.features.source import check_channels, suited
from crosslevel.inspection.page import headline, matches_block, page_blocks
from crosslevel.inspection.scan import Structure, run_features, structure
from crosslevel.inspection.sketch import Sketch, sketch
from crosslevel.inspection.summary import summary, tables
from crosslevel.models.encoder import Encoder
from crosslevel.models.named import open_encoder, run_dir_of
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.device import Device, Precision, choose
from crosslevel.utils.errors import UserError, hidden
from crosslevel.utils.files import write
from crosslevel.utils.marks import verb
from crosslevel.utils.rng import seeded

MOST_BROKEN = 20
DUPLICATES, BESIDE, EXACT = "duplicates.csv", "beside.csv", "exact_copies.csv"


@verb()
def inspect(
    images: str,
    run: str | None = None,
    beside: str | None = None,
    output: str | None = None,
    batch_size: int = 256,
    sample: int = 100_000,
    seed: int = 0,
    groups: int | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: int | None = None,
    data_root: str | None = None,
    crops: Crops | None = None,
    engine: Engine = "local",
    full_scan: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Describe a collection: sizes, broken files, duplicates and their tracks, the long tail; no label is read.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        run: the folder of a run, its encoder.safetensors, or weights by name (timm:NAME, hf-hub:owner/name):
            near-duplicates and groups are then found by its features as well.
        beside: another source, such as test images: those of its images that are also in this one are reported.
        output: a .json file, or a folder for inspect.json, inspect.html and duplicates.csv (and beside.csv,
            exact_copies.csv); none is written unless given.
        batch_size: of the training that settings are suggested for.
        sample: the most images to compare with each other; from a larger collection, that many are drawn at random, and
            only these are read unless there is a full scan.
        seed: of all random numbers.
        groups: the most groups to estimate; 20 unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        engine: local reads the images on this machine; ray on all machines of a Ray cluster (RAY_ADDRESS, or this
            machine), which must find them under the same name; they are compared here.
        full_scan: read every image of a collection that is larger than the sample: sizes, formats, broken files and
            exact copies (exact_copies.csv) then cover all images; only the sample is compared, also with --beside.
        quiet: print nothing.

    Returns:
        the content of the JSON file.

    Examples:
        >>> summary = crosslevel.inspect("photos/")
        >>> suggested = {advice["setting"]: advice["value"] for advice in summary["advice"]}

    """
    if batch_size < 2 or sample < 2:
        raise UserError(f"batch_size={batch_size}, sample={sample}: give at least 2 each")
    ready(engine, workers if run is None else None)
    console, written = printer(quiet), None if output is None else _file(Path(output))
    encoder = None if run is None else open_encoder(run)
    say(console, "" if encoder is None else encoder.loaded)
    generator = seeded(seed)
    read = {"data_root": data_root, "crops": crops}
    parsed = parse(images)
    collection = _part(
        parsed if encoder is None else suited(parsed, encoder), read, sample, generator, engine, full_scan
    )
    if encoder is not None:
        check_channels(encoder, collection.images.channels, images)
    second = None if beside is None else _part(parse(beside), read, sample, generator, engine)
    runtime = Runtime(choose(device, precision), workers)
    result = _compare(collection, second, encoder, run, runtime, groups, seed, console)
    scanned, scanned_second, common = result.scanned, result.scanned_second, result.structure
    duplicates = duplicate_sets(scanned, common.pairs, collection.part.paths)
    figures = summary(
        collection.images.name, len(collection.images), collection.part, scanned, common, duplicates,
        collection.bad_files, batch_size, run, result.threshold, result.counted,
    )  # fmt: skip
    matched = [] if scanned_second is None else matches(scanned, scanned_second)
    if second is not None and scanned_second is not None:
        figures["beside"] = _matches_by_name(collection, scanned, second, scanned_second, matched)
    _print(console, figures)
    if written is not None:
        blocks = page_blocks(figures, scanned, common, duplicates, collection.part)
        if second is not None and scanned_second is not None:
            blocks.insert(2, matches_block(second.images.name, matched, scanned, scanned_second, figures))
        write_csv(written.with_name(DUPLICATES), duplicates, scanned, collection.part.paths)
        exact_copies = result.counted.exact_copies() if full_scan else None
        _write(written, figures, blocks, console, exact_copies, collection.images.paths)
    return figures


@dataclass
class _Collection:
    """A source, its compared part, and its unreadable images.

    ``sampled`` are the numbers of that part, if the other images are read as well.
    """

    images: Images
    part: Images
    bad_files: BadFiles
    elsewhere: Opened | None
    sampled: Int64[Tensor, " n"] | None = None


def _part(
    source: Source,
    read: dict[str, Any],
    limit: int,
    generator: torch.Generator,
    engine: Engine,
    full_scan: bool = False,
) -> _Collection:
    images, index = open_images(source, **read), None
    if len(images) > limit:
        index = select.sample(images, limit, generator)
    part, sampled = images if index is None else select.take(images, index), index if full_scan else None
    elsewhere = Opened.of(source, source=images, **read) if engine == "ray" else None
    if elsewhere is not None and sampled is None:
        elsewhere = elsewhere._replace(subset=index)
    return _Collection(images, part, images.bad_files(), elsewhere, sampled)


class _Compared(NamedTuple):
    """The counts, the records of the compared images and of those of the second source, and the structure found."""

    counted: Sketch
    scanned: ScanResult
    scanned_second: ScanResult | None
    structure: Structure
    threshold: float | None


def _compare(
    collection: _Collection, second: _Collection | None, encoder: Encoder | None, run: str | None, runtime: Runtime,
    groups: int | None, seed: int, console: Console,
) -> _Compared:  # fmt: skip
    """Read the images, compare them by pixels and, with a run, by its features, and read the second source."""
    features, threshold = None, None
    with progress_bar(console) as bar:
        counted, scanned = _sketched(collection, runtime.workers, bar)
        task = bar.add_task("comparing", total=None)
        if encoder is not None and run is not None:
            features, threshold = run_features(
                encoder, collection.part, scanned, runtime, run_dir_of(run), collection.bad_files, seed
            )
        common = structure(scanned, features, 1.0 if threshold is None else threshold, groups, seed)
        bar.update(task, total=1, completed=1)
        scanned_second = None if second is None else _scanned(second, runtime.workers, bar)
    return _Compared(counted, scanned, scanned_second, common, threshold)


def _sketched(collection: _Collection, workers: int | None, bar: Progress) -> tuple[Sketch, ScanResult]:
    """The counts, and the records of the images to compare."""
    if collection.sampled is None:
        scanned = _scanned(collection, workers, bar)
        return Sketch.of(scanned, collection.part.paths), scanned
    task = bar.add_task("looking at images", total=len(collection.images))
    return sketch(
        collection.images, collection.sampled, collection.bad_files, workers,
        lambda done: bar.update(task, completed=done), collection.elsewhere,
    )  # fmt: skip


def _scanned(collection: _Collection, workers: int | None, bar: Progress) -> ScanResult:
    task = bar.add_task("looking at images", total=len(collection.part))
    return scan(
        collection.part, collection.bad_files, workers, lambda done: bar.update(task, completed=done),
        collection.elsewhere,
    )  # fmt: skip


def _matches_by_name(
    collection: _Collection, scanned: ScanResult, second: _Collection, scanned_second: ScanResult, matched: list[Match]
) -> dict[str, Any]:
    """The images that both collections have in common, by name."""
    kinds = Counter(NAMES[match.kind] for match in matched)
    rows = [
        {
            "path": collection.part.paths[int(scanned.numbers[match.first])],
            "beside": second.part.paths[int(scanned_second.numbers[match.second])],
            "kind": NAMES[match.kind],
            "distance": round(match.distance, 4),
        }
        for match in matched
    ]
    return {
        "images": hidden(second.images.name),
        "count": len(second.images),
        "looked_at": len(second.part),
        "broken": dict(sorted(second.bad_files.reasons.items())),
        "copies": {name: kinds[name] for name in NAMES.values()},
        "matches": rows,
    }


def _print(console: Console, figures: dict[str, Any]) -> None:
    for heading, rows in tables(figures):
        table = Table(title=heading, show_header=False, title_justify="left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    broken = list(figures["broken"].items())
    for path, reason in broken[:MOST_BROKEN]:
        console.print(f"{escaped(path)}: {reason}", highlight=False, markup=False)
    if len(broken) > MOST_BROKEN:
        console.print(f"and {len(broken) - MOST_BROKEN:,} more broken files", highlight=False)


def _file(output: Path) -> Path:
    """The JSON file to write; its folder is created.

    Raises:
        ValueError: the file cannot be written there.

    """
    if output.suffix in (".html", ".htm", ".csv", ".txt") and not output.is_dir():
        raise UserError(f"--output {output}: give a folder, or a file that ends in .json")
    file = output if output.suffix == ".json" else output / "inspect.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.filename}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output {output}: {file} cannot be written")
    return file


def _write(
    file: Path, figures: dict[str, Any], blocks: list[report.Block], console: Console,
    exact_copies: list[list[int]] | None, paths: Sequence[str],
) -> None:  # fmt: skip
    """Write the JSON file, the page and the tables beside it, each atomically."""
    # File names that are not valid UTF-8 become escapes.
    text = json.dumps(figures, indent=2) + "\n"
    write(file, text)
    names = [str(file), str(file.with_name(DUPLICATES))]
    if "beside" in figures:
        write_rows(file.with_name(BESIDE), ("path", "beside", "kind", "distance"), figures["beside"]["matches"])
        names.append(str(file.with_name(BESIDE)))
    if exact_copies is not None:
        rows = ({"set": n, "path": paths[i]} for n, numbers in enumerate(exact_copies, 1) for i in numbers)
        write_rows(file.with_name(EXACT), ("set", "path"), rows)
        names.append(str(file.with_name(EXACT)))
    subtitle = f"{figures['count']:,} images · {time.strftime('%Y-%m-%d')}"
    page = report.page(
        file.with_suffix(".html"), f"What is in {figures['images']}", blocks, subtitle, headline(figures)
    )
    console.print(f"written: {', '.join([*names, str(page)])}", highlight=False, markup=False)
    following = f"crosslevel train {shlex.quote(figures['images'])}"
    console.print(f"look at {page}; next: {following}", highlight=False, markup=False)
