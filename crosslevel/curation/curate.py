"""``crosslevel curate``: choose the images of a collection to keep or to label, without labels."""

from __future__ import annotations

import csv
import io
import os
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from crosslevel.curation.choose import Strategy, choose
from crosslevel.curation.findings import Findings, findings_of
from crosslevel.curation.page import write_page
from crosslevel.data.bad_files import escaped
from crosslevel.data.uri import parse
from crosslevel.features.collection import open_collection
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.extract import Runtime
from crosslevel.features.table import FeatureTable
from crosslevel.utils import device as devices
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.device import Device
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.files import write
from crosslevel.utils.marks import verb


class Curated(NamedTuple):
    """The chosen images in order, and the reason why each other image was left out."""

    paths: list[str]
    left_out: dict[str, str]


@verb("n", "how", "output", "images", "outliers", "device", output="curated.txt")
def curate(
    table: str,
    n: int | None = None,
    how: Strategy = "balanced",
    images: str | None = None,
    outliers: Literal["drop", "keep"] = "drop",
    duplicates: Literal["drop", "keep"] = "drop",
    threshold: float | None = None,
    output: str | None = None,
    seed: int = 0,
    device: Device = "auto",
    data_root: str | None = None,
    quiet: bool = False,
) -> Curated:
    """Choose what to keep or to label, without labels: no copies, nothing broken, and n images that represent the rest.

    One image of each set of near-duplicates stays. Images that look broken and images unlike all others are listed.
    Then n of the rest are chosen.

    Args:
        table: a table that `crosslevel embed` wrote; with --thumbnails 96, broken pictures are found too. Or the folder
            of a run, or weights by name (timm:NAME, hf-hub:owner/name): then their features of --images are made once
            and kept.
        n: how many to choose; all that is left unless given.
        how: balanced takes the same share of every region (hierarchical k-means, Vo et al. 2024), typical the
            image in the densest part of each of n clusters (TypiClust, Hacohen et al. 2022: for a few labels a class),
            diverse those least like the ones before (farthest-first), covering such that all others have one near
            (facility location).
        images: of a run or of weights by name: the images to choose from; those that a run was trained on unless given.
            Of a table: where its images are now, if elsewhere than when it was written.
        outliers: whether images that lie alone can be chosen: drop lists them and leaves them out.
        duplicates: whether near-duplicates can be chosen beside each other.
        threshold: the cosine from which on two images can be near-duplicates, for a table without thumbnails; estimated
            unless given.
        output: the list to write, for @list=; beside it a .csv with each image's fate, and a page that shows it. From
            Python, nothing is written unless it is given.
        seed: of all draws.
        device: of an encoder: auto takes CUDA, then Apple's MPS, then the CPU.
        data_root: folder with the official files of cifar10, cifar100 and stl10; a run's own unless given.
        quiet: print nothing.

    Returns:
        the chosen paths, and for each other path the reason why it was left out.

    Examples:
        >>> kept = crosslevel.curate("features.parquet", n=8, outliers="keep")
        >>> len(kept.paths)
        8

    """
    console, file = printer(quiet), None if output is None else _file(output, table)
    runtime = Runtime(devices.choose(device, "fp32"))
    source = None if images is None else parse(images)
    opened, _ = open_collection(table, source, runtime, console, least=2, data_root=data_root)
    if n is not None and not 1 <= n <= opened.rows:
        raise UserError(f"n={n}: {table} has {opened.rows:,} rows: give 1 to {opened.rows:,}")
    if threshold is not None and not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold}: a cosine between 0 and 1")
    pictures = Pictures(opened, source, data_root)
    with progress_bar(console) as bar:
        task = bar.add_task("looking at pictures", total=None)
        findings = findings_of(
            opened.features, pictures, threshold, progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
        bar.update(task, description="choosing")
        reasons = _left_out(opened, findings, outliers == "drop", duplicates == "drop")
        candidates = torch.tensor([row for row in range(opened.rows) if row not in reasons])
        if not len(candidates):
            raise UserError(
                f"{table}: all its {opened.rows:,} rows are copies, broken or outliers: give --outliers keep"
            )
        selected = candidates if n is None else candidates[choose(opened.features[candidates], n, how, seed)]
    rows = selected.tolist()
    stay = set(rows)
    fates = {
        row: "" if row in stay else reasons.get(row, f"not among the {len(rows):,} chosen")
        for row in range(opened.rows)
    }
    for line in _summary(opened, findings, reasons, rows, n, how):
        say(console, line)
    if file is not None:
        _write(file, opened, rows, fates)
        page = write_page(
            file.with_suffix(".html"), opened, findings, rows, reasons, how if n is not None else None, pictures
        )
        say(console, f"written: {file}, {file.with_suffix('.csv')}, {page}")
        say(console, f"look at {page}; next: {_use(opened, file, data_root)}")
    return Curated(
        [opened.paths[row] for row in rows], {opened.paths[row]: reason for row, reason in fates.items() if reason}
    )


def _file(output: str, table: str) -> Path:
    """The list to write.

    Raises:
        UserError: it cannot be written there, or has another ending.

    """
    file = Path(output)
    if file.suffix != ".txt":
        raise UserError(f"--output {output}: give a file that ends in .txt")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.filename}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--output {output}: {file} cannot be written")
    return file


def _left_out(table: FeatureTable, findings: Findings, alone: bool, copies: bool) -> dict[int, str]:
    """The reason why each excluded row cannot be chosen: broken takes precedence over copy, copy over outlier."""
    reasons = (
        {row: f"outlier: {distance:.3f} from its nearest" for row, distance in findings.alone.items()} if alone else {}
    )
    if copies:
        representatives = findings.copies().items()
        reasons |= {
            row: f"near-duplicate of {table.paths[representative]}"
            for row, representative in representatives
            if representative not in findings.broken
        }
    return reasons | {row: f"broken: {defect}" for row, defect in findings.broken.items()}


def _summary(
    table: FeatureTable, findings: Findings, reasons: dict[int, str], rows: list[int], n: int | None, how: str
) -> list[str]:
    lines = [
        f"{table.rows:,} images: {len(findings.copies()):,} near-duplicates of another one, "
        f"{len(findings.broken):,} broken, {len(findings.alone):,} outliers; {table.rows - len(reasons):,} left to "
        "choose among"
    ]
    if not findings.has_pictures:
        lines.append(
            "broken pictures were not searched for: the table has no pictures (crosslevel embed --thumbnails 96)"
        )
    if n is not None:
        short = f": {n:,} were requested" if len(rows) < n else ""
        lines.append(f"{len(rows):,} chosen ({how}){short}")
    return lines


def _write(file: Path, table: FeatureTable, rows: list[int], fates: dict[int, str]) -> None:
    """The list, and the table of every image's fate."""
    write(file, "".join(f"{escaped(table.paths[row])}\t-1\n" for row in rows))
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(("path", "kept", "why"))
    order = {row: i + 1 for i, row in enumerate(rows)}
    for row, fate in fates.items():
        writer.writerow((table.paths[row], "no" if fate else "yes", fate or f"number {order[row]}"))
    write(file.with_suffix(".csv"), lines.getvalue())


def _use(table: FeatureTable, file: Path, data_root: str | None) -> str:
    """A command that reads the list."""
    images = table.metadata.get("images")
    try:
        source = "IMAGES" if images is None else parse(images).with_list(str(file)).text
    except SourceError:
        source = "IMAGES"
    source = f"IMAGES@list={file}" if source == "IMAGES" else source
    option = "" if data_root is None else f" --data-root {shlex.quote(data_root)}"
    return f"crosslevel train {shlex.quote(source)}{option}"
