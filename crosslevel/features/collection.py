"""Opens a table of features, or makes one from images and a run or weights by name; for all verbs that read tables."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import cast

from rich.console import Console

from crosslevel.data.index_cache import cache_folder
from crosslevel.data.open import open_images
from crosslevel.data.uri import Source, parse
from crosslevel.features.embed import embed
from crosslevel.features.extract import Runtime
from crosslevel.features.source import settings_of, suited
from crosslevel.features.table import FeatureTable, open_table
from crosslevel.models.named import is_by_name, open_encoder, run_dir_of
from crosslevel.utils.console import say
from crosslevel.utils.device import Device, Precision
from crosslevel.utils.errors import UserError, hidden

TABLE = "collection.parquet"  # name of the table in a run's folder
PICTURES = 96  # pixels of that table's thumbnails


def open_collection(
    table: str,
    images: Source | None,
    runtime: Runtime,
    console: Console,
    run: str | None = None,
    least: int = 1,
    data_root: str | None = None,
) -> tuple[FeatureTable, str | None]:
    """The table that ``table`` names, and the run or name whose encoder made it, if known.

    Args:
        table: a table; or a run or weights by name: then the features of ``images`` are computed once, and kept in the
            run's folder, or for weights by name in the cache (`cache_folder`), until the encoder or an image changes.
        images: the images of a run, those that it was trained on unless given; or of weights by name.
        runtime: the device and settings of the encoder.
        console: prints what is computed.
        run: the encoder of a table, if it has moved.
        least: the fewest rows allowed.
        data_root: folder with the official files of cifar10, cifar100 and stl10; a run's own unless given.

    Raises:
        UserError: there is no such table, run or name, the table has too few rows, or no images are given.

    """
    if not (is_by_name(table) or os.path.isdir(table) or Path(table).suffix == ".safetensors"):
        opened = open_table(table, least)
        return opened, run or opened.metadata.get("run")
    if run is not None:
        raise UserError(f"--run {run}: {table} is an encoder already: give a table, or leave --run out")
    if Path(table).suffix in (".lance", ".fiftyone"):
        raise UserError(f"{table} is a table for other programs: give a Parquet table, embed -o features.parquet")
    run_dir, source = run_dir_of(table), images
    if images is None and run_dir is not None:
        source, root = _trained_on(run_dir)
        data_root = root if data_root is None else data_root
    if source is None:
        raise UserError(f"{table} is an encoder, not a table: give --images, the images to look at")
    encoder = open_encoder(table)
    parsed = suited(source.absolute(), encoder)
    request = parsed.text
    file = _cached_table(encoder.identity(), request) if run_dir is None else run_dir / TABLE
    if file.is_file():
        existing = open_table(file)
        if (existing.metadata.get("encoder"), existing.metadata.get("images")) == (encoder.identity(), hidden(request)):
            if existing.metadata.get("state") == open_images(parsed, data_root=data_root).identity():
                say(console, encoder.loaded)  # embed says it where the table is made
                say(console, f"the features are those in {file}")
                return open_table(file, least), table
            say(console, f"{source.text}: images have come, gone or changed")
    say(console, f"making {file}, the features of {source.text}: once")
    file.parent.mkdir(parents=True, exist_ok=True)
    hardware = runtime.hardware
    embed(
        table, request, str(file), cast(Device, hardware.device.type), cast(Precision, hardware.precision),
        runtime.workers, runtime.batch_size, data_root, thumbnails=PICTURES, quiet=console.quiet,
    )  # fmt: skip
    return open_table(file, least), table


def _cached_table(encoder: str, images: str) -> Path:
    """The path of the cached table for an encoder without a run's folder."""
    digest = hashlib.sha256(f"{encoder} {images}".encode(errors="surrogateescape")).hexdigest()
    return cache_folder() / "collections" / f"{digest[:24]}.parquet"


def _trained_on(run_dir: Path) -> tuple[Source, str | None]:
    """The images that a run was trained on, and the folder of official files, from its settings."""
    settings = settings_of(run_dir)
    images, root = settings.get("images"), settings.get("data_root")
    if not isinstance(images, str):
        raise UserError(
            f"{run_dir} does not say which images it was trained on: give --images, or a table in its place"
        )
    if settings.get("crops") is not None:
        raise UserError(
            f"{run_dir} was trained on objects cut out of images: crosslevel embed {run_dir} {images} --crops "
            "-o features.parquet, and give that table in its place"
        )
    return parse(images), root if isinstance(root, str) else None
