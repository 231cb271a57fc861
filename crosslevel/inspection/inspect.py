"""``crosslevel inspect``: what is in a collection: sizes, damage, duplicates, long tail, and what follows."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crosslevel import report
from crosslevel.data.bad_files import escaped
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets import select
from crosslevel.features.extract import Runtime
from crosslevel.inspection.scan import Found, ScanResult, find, known_features, look
from crosslevel.inspection.summary import page_blocks, summary, tables
from crosslevel.models.encoder import load_encoder
from crosslevel.utils.device import Device, Precision, choose

SHOWN_BROKEN = 20


def inspect(
    images: str,
    run: str | None = None,
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
) -> dict[str, Any]:
    """Say what is in a collection: sizes, broken files, duplicates and their tracks, the long tail; no label is read.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        run: the folder of a run, or its encoder.safetensors: near-duplicates and groups by its features as well.
        output: a .json file, or a folder for inspect.json and inspect.html; none is written unless given.
        batch_size: of the training that settings are suggested for.
        sample: the most images to look at; of more, that many are drawn.
        seed: of all draws.
        groups: the most groups to estimate; 20 unless given.
        device: auto takes CUDA, then Apple's MPS, then the CPU.
        precision: auto takes bfloat16 where the hardware computes it.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.

    Returns:
        what the JSON file has.
    """
    if batch_size < 2 or sample < 2:
        raise ValueError(f"batch_size={batch_size}, sample={sample}: give at least 2 each")
    console, written = Console(soft_wrap=True), None if output is None else _file(Path(output))
    encoder, hardware = None if run is None else load_encoder(run), choose(device, precision)
    source = open_images(images, data_root=data_root, crops=crops)
    bad, total, generator = source.bad_files(), len(source), torch.Generator().manual_seed(seed)
    part = source if total <= sample else select.take(source, select.sample(source, sample, generator))
    with _bar(console) as bar:
        task = bar.add_task("looking at images", total=len(part))
        looked = look(part, bad, workers, lambda done: bar.update(task, completed=done))
        task = bar.add_task("comparing", total=None)
        features, threshold = None, 1.0
        if encoder is not None and run is not None:
            home = Path(run) if Path(run).is_dir() else Path(run).parent
            features, threshold = known_features(encoder, part, looked, Runtime(hardware, workers), home, bad, seed)
        found = find(looked, features, threshold, groups, seed)
        bar.update(task, total=1, completed=1)
    limit = None if features is None else threshold
    told = summary(source.name, total, part, looked, found, bad, batch_size, run, limit)
    _print(console, told)
    if written is not None:
        _write(written, told, looked, found, console)
    return told


def _print(console: Console, told: dict[str, Any]) -> None:
    for heading, rows in tables(told):
        table = Table(title=heading, show_header=False, title_justify="left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    broken = list(told["broken"].items())
    for path, reason in broken[:SHOWN_BROKEN]:
        console.print(f"{escaped(path)}: {reason}", highlight=False, markup=False)
    if len(broken) > SHOWN_BROKEN:
        console.print(f"and {len(broken) - SHOWN_BROKEN:,} more broken files", highlight=False)


def _file(output: Path) -> Path:
    """The JSON file to write, in a folder that is there from now on.

    Raises:
        ValueError: it cannot be written there.

    """
    if output.suffix in (".html", ".htm", ".csv", ".txt") and not output.is_dir():
        raise ValueError(f"--output {output}: give a folder, or a file that ends in .json")
    file = output if output.suffix == ".json" else output / "inspect.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.filename}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"--output {output}: {file} cannot be written")
    return file


def _write(file: Path, told: dict[str, Any], looked: ScanResult, found: Found, console: Console) -> None:
    """The JSON file and the page beside it, each whole or not at all."""
    # File names that are not valid UTF-8 become escapes.
    text = json.dumps(told, indent=2) + "\n"
    file.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(file.with_suffix(".tmp"), file)
    subtitle = f"{told['count']:,} images · {time.strftime('%Y-%m-%d')}"
    title, blocks = f"What is in {told['images']}", page_blocks(told, looked, found)
    page = report.page(file.with_suffix(".html"), title, blocks, subtitle)
    console.print(f"written: {file}, {page}", highlight=False, markup=False)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
