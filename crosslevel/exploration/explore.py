"""``crosslevel explore``: a collection in the browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from rich.console import Console
from torch import Tensor

from crosslevel.curation.findings import findings_of
from crosslevel.data.uri import parse
from crosslevel.exploration.collection import Collection, columns_of
from crosslevel.exploration.export import export_page
from crosslevel.exploration.layout import lay_out
from crosslevel.exploration.server import Server
from crosslevel.features.collection import open_collection
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.extract import Runtime
from crosslevel.features.table import FeatureTable
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.device import Device, choose
from crosslevel.utils.errors import UserError
from crosslevel.utils.marks import verb
from crosslevel.utils.rng import seeded


@verb("export", "images", "lists", "port", "browser", "sample", "device")
def explore(
    table: str,
    export: str | None = None,
    images: str | None = None,
    lists: str = ".",
    port: int = 0,
    browser: bool = True,
    sample: int = 100_000,
    seed: int = 0,
    device: Device = "auto",
    data_root: str | None = None,
    quiet: bool = False,
) -> str | None:
    """Show a collection in the browser: a map where similar images lie together, and the most similar ones of each.

    The page shows the image under the pointer, and the most similar ones at a click. It colours and filters by label,
    track, group, near-duplicate, outlier and the other columns of the table, and saves encircled images as a list that
    @list= reads. It is served to this machine alone until Ctrl-C.

    Args:
        table: a table that `crosslevel embed` wrote, best with --thumbnails 96; or the folder of a run, or weights by
            name (timm:NAME, hf-hub:owner/name): then their features of --images are made once and kept.
        export: write the page into this folder instead: it opens without a server, and keeps lists as downloads.
        images: of a run or of weights by name: the images to show; those that a run was trained on unless given. Of
            a table: where its images are now, if elsewhere than when it was written.
        lists: the folder that lists are saved in.
        port: of the page's address; 0 takes any that is free.
        browser: open the page; false prints its address alone.
        sample: the most images on the map; from a larger collection, that many are drawn at random.
        seed: of all random numbers.
        device: of an encoder: auto takes CUDA, then Apple's MPS, then the CPU.
        data_root: folder with the official files of cifar10, cifar100 and stl10; a run's own unless given.
        quiet: print nothing.

    Returns:
        the page in the folder; nothing if it was served.
    """
    if sample < 2 or not 0 <= port < 65_536:
        raise UserError(f"sample={sample}, port={port}: give at least 2 images, and a port from 0 to 65535")
    console = printer(quiet)
    collection = gather(table, images, sample, seed, console, device, data_root)
    if export is not None:
        with progress_bar(console) as bar:
            task = bar.add_task("writing pictures", total=len(collection.rows))
            page = export_page(collection, export, lambda done, of: bar.update(task, completed=done, total=of))
        say(console, f"written: {page} and what it shows; next: open it in a browser, or copy the folder")
        return str(page)
    with Server(collection, Path(lists), port) as server:
        say(console, f"next: look at {server.address} (Ctrl-C ends)", unbroken=True)
        if browser and not _opened(server.address):
            say(console, "no browser could be started here: open the address yourself")
        console.file.flush()  # the address must appear at once, also in a pipe
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(console, "ended")
    return None


def gather(
    table: str,
    images: str | None,
    sample: int,
    seed: int,
    console: Console,
    device: Device = "auto",
    data_root: str | None = None,
) -> Collection:
    """The points, columns and pictures of a table."""
    source, runtime = None if images is None else parse(images), Runtime(choose(device, "fp32"))
    opened, _ = open_collection(table, source, runtime, console, least=2, data_root=data_root)
    pictures, rows = Pictures(opened, source, data_root), torch.arange(opened.rows)
    if opened.rows > sample:
        generator = seeded(seed)
        rows = torch.randperm(opened.rows, generator=generator)[:sample].sort().values
        say(console, f"{sample:,} of {opened.rows:,} images are shown: --sample says how many")
    with progress_bar(console) as bar:
        task = bar.add_task("comparing images", total=None)
        unit = F.normalize(features_of(opened, rows), dim=1)
        findings = findings_of(
            unit, pictures, rows=rows, progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
        bar.update(task, description="laying out the map")
        points = lay_out(unit, findings.near, seed=seed)
    columns = columns_of(opened, rows, unit, findings, seed)
    return Collection(opened, rows, unit, points, findings.near, columns, pictures)


def features_of(table: FeatureTable, rows: Int64[Tensor, " M"]) -> Float[Tensor, "M D"]:
    """The features of these rows; only they stay in memory."""
    return table.features if len(rows) == table.rows else table.features_at(rows)


def _opened(address: str) -> bool:
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False
