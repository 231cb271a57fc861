"""``crosslevel pack``: images decoded and resized once, to be read at memory speed from then on."""

from __future__ import annotations

import os
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from crosslevel.data.cluster import Engine, Opened, ready
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.pack_writer import USUAL, PackWriter, Sizes, clear
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.sources.containers.folders import StoredFolder
from crosslevel.data.sources.packed import (
    ABOUT,
    INDEX,
    UNFINISHED,
    VERSION,
    Decoded,
    decoded,
    is_pack,
    open_pack,
    read_about,
    shrunk,
)
from crosslevel.data.uri import Source, is_remote, parse
from crosslevel.utils.console import printer, progress_bar, say
from crosslevel.utils.errors import BadImage, UserError, hidden
from crosslevel.utils.files import is_unfinished
from crosslevel.utils.locks import LOCK, folder_lock
from crosslevel.utils.marks import verb
from crosslevel.utils.processes import keeping

_SAMPLED = 32  # images that are read to estimate the size


@verb()
def pack(
    images: str,
    output: str = "packed",
    size: int = 256,
    workers: int | None = None,
    data_root: str | None = None,
    crops: Crops | None = None,
    engine: Engine = "local",
    quiet: bool = False,
    *,
    sizes: Sizes = USUAL,
) -> Path:
    """Decode and resize images once, into a folder that every command takes as images and reads at memory speed.

    Pixels are stored uncompressed: several times the space of JPEG. A killed run continues where it was when it is
    started again with the same arguments; if the images have changed since, they are packed anew.

    Args:
        images: a folder, a .txt list of files, .tar shards, Parquet files, hf://owner/name, videos, annotations (with
            --crops), cifar10, cifar100, stl10 or turntable; a suffix such as @imbalance=100 or @list=FILE takes a part.
        output: the folder to write, also in an object store (s3://bucket/packed): it is made here first, in
            CROSSLEVEL_CACHE.
        size: pixels of the shorter side; smaller images are not enlarged.
        workers: processes that decode; 0 decodes in one thread; chosen by the size of the images unless given.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        engine: local decodes on this machine; ray on all machines of a Ray cluster (RAY_ADDRESS, or this machine),
            which must find the images under the same name; the pack is written here.
        quiet: print nothing.
        sizes: the sizes of parts and shards; no option.

    Returns:
        the folder.

    Examples:
        >>> packed = crosslevel.pack("photos/", output="packed", size=256)
        >>> run = crosslevel.train(packed)

    """
    if size < 1:
        raise UserError(f"--size {size}: give at least 1 pixel")
    ready(engine, workers)
    console, origin = printer(quiet), parse(images)
    stored = StoredFolder(output) if is_remote(output) else None
    folder = Path(output) if stored is None else stored.folder
    _check_output(folder, origin)
    source = open_images(origin, data_root=data_root, crops=crops)
    if source.channels != 3:
        raise UserError(f"{origin.text}: packs have images of 3 channels: give these to train and embed as they are")
    _check_watched(folder, source)
    metadata = {**origin_metadata(origin, crops, source), "identity": source.identity(), "size": size}
    if stored is not None and _is_stored(stored, metadata, crops, console):
        return folder
    with folder_lock(folder, "crosslevel pack", keep=False):
        elsewhere = Opened.of(origin, data_root, crops, source) if engine == "ray" else None
        _pack(PackWriter(folder, source, metadata, sizes), crops, workers, console, elsewhere)
        if stored is not None:
            stored.remove(ABOUT)  # of the former pack, which is about to be replaced
            stored.send()
            say(console, f"sent to {output}; next: crosslevel train {shlex.quote(output)}")
            _make_room(folder)
    return folder


def _is_stored(stored: StoredFolder, metadata: dict[str, Any], crops: Crops | None, console: Console) -> bool:
    """Whether the object store has exactly this pack.

    Raises:
        UserError: something else is at the address.

    """
    listed = stored.listed()
    if listed and ABOUT not in listed and not any(name == INDEX or name.endswith(".bin") for name in listed):
        raise UserError(f"--output {stored.address}: there is something else in it: give another folder")
    if ABOUT not in listed:
        return False
    copy = StoredFolder(stored.address, "seen")
    copy.fetch(lambda name: name == ABOUT)
    former, _ = _read_former(copy.folder / ABOUT)
    cut = None if crops is None else asdict(crops)
    same = former is not None and all(former.get(name) == metadata[name] for name in ("identity", "size"))
    if former is None or not same or former.get("crops") != cut:
        return False
    say(
        console,
        f"{stored.address} is complete: {former['images']:,} images of {metadata['source']}, nothing has changed",
    )
    say(console, f"next: crosslevel train {shlex.quote(stored.address)}")
    return True


def _make_room(folder: Path) -> None:
    """Remove the store's present content."""
    for file in folder.iterdir():
        if file.name != LOCK:
            file.unlink()


def _pack(
    writer: PackWriter, crops: Crops | None, workers: int | None, console: Console, elsewhere: Opened | None
) -> None:
    """Write the pack into a folder that this process has locked, unless it is complete already."""
    folder, source, metadata, start_time = writer.folder, writer.source, writer.metadata, time.monotonic()
    size, following = metadata["size"], f"next: crosslevel train {shlex.quote(str(folder))}"
    former, reason = _former(folder)
    if former is not None and (former["identity"], former["size"]) != (metadata["identity"], size):
        reason = _difference(former, size, crops, source)
    if reason:
        say(console, f"{folder}: {reason}: packed anew")
        clear(folder)
        former = None
    if former is not None and (folder / ABOUT).is_file():
        writer.tidy()
        writer.renew()
        say(console, f"{folder} is complete: {former['images']:,} images of {metadata['source']}, nothing has changed")
        say(console, following)
        return
    say(console, _space(folder, source, size, writer.start()))
    if writer.done:
        say(console, f"continuing at image {writer.done:,}")
    remaining = range(writer.done, len(source))
    _write(writer, decoded(source, size, remaining, workers, writer.sizes.at_once, elsewhere), console)
    count, seconds = writer.finish(), max(time.monotonic() - start_time, 1e-9)
    say(console, f"{count:,} images in {folder}, {writer.bytes() / 1e9:.2f} GB, {len(source) / seconds:,.0f} images/s")
    if len(writer.bad_files):
        say(console, writer.bad_files.summary(len(source)))
    say(console, following)


def _write(writer: PackWriter, pieces: Iterator[Decoded], console: Console) -> None:
    """Store all the pieces, and show how many images are done."""
    with progress_bar(console) as bar:
        task = bar.add_task("packing", total=len(writer.source), completed=writer.done)
        with keeping(lambda: f"{writer.done:,} images are done; the same command continues there"):
            for done in writer.write(pieces):
                bar.update(task, completed=done)


def _check_output(folder: Path, origin: Source) -> None:
    """Refuse a folder that holds something else, and one inside the source, which packing would change."""
    entries = folder.iterdir() if folder.is_dir() else []
    foreign = [file for file in entries if file.name != LOCK and not is_unfinished(file.name)]
    if foreign and not is_pack(str(folder)):
        raise UserError(f"--output {folder}: there is something else in it: give another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: it is a file: give a folder")
    read = origin.path
    if os.path.isdir(read) and folder.resolve().is_relative_to(Path(read).resolve()):
        raise UserError(f"--output {folder} lies inside {read}: give a folder outside of it")


def _check_watched(folder: Path, source: Images) -> None:
    """Refuse a folder inside one that the pack watches for changes: the pack itself would count as a change."""
    watch = source.watch
    if watch is None:
        return
    watched = {os.path.realpath(os.path.join(watch.root, path)) for path in watch.paths}
    for above in folder.resolve().parents:
        if str(above) in watched:
            raise UserError(f"--output {folder} lies inside {above}: give a folder outside of it")


def _former(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The metadata of the pack in ``folder``, or None; and why it cannot be used, if it is damaged."""
    name = ABOUT if (folder / ABOUT).is_file() else UNFINISHED
    if not (folder / name).is_file():
        return None, ""
    if name == ABOUT:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a change of the source is noticed and reported here
                open_pack(str(folder))
        except (OSError, ValueError) as error:
            return None, f"its content cannot be continued ({error})"
    return _read_former(folder / name)


def _read_former(file: Path) -> tuple[dict[str, Any] | None, str]:
    """The metadata of a pack; or None and why it cannot be used."""
    try:
        content = read_about(file)
    except (OSError, ValueError) as error:
        return None, f"its content cannot be continued ({error})"
    if content.get("version") != VERSION:
        return None, f"its content is of version {content.get('version')}"
    return content, ""


def origin_metadata(images: Source, crops: Crops | None, source: Images) -> dict[str, Any]:
    """The part of a pack's metadata that says where its images are from, without an address's secrets."""
    text = images.base_text
    location = os.path.abspath(text) if not images.has_subset and os.path.exists(text) else None
    cut = {} if crops is None else {"crops": asdict(crops)}
    watched = {} if source.watch is None else {"watched": source.watch.root}
    return {"version": VERSION, "source": hidden(images.text), "where": location, **cut, **watched}


def _difference(former: dict[str, Any], size: int, crops: Crops | None, source: Images) -> str:
    if former["size"] != size:
        return f"it was packed with --size {former['size']}"
    if former.get("crops") != (None if crops is None else asdict(crops)):
        return f"it was packed with {Crops(**former['crops']).options() if 'crops' in former else 'no --crops'}"
    then = f" ({former['images']:,} readable images then, {len(source):,} files now)" if "images" in former else ""
    return f"{source.name} has changed since{then}"


def _space(folder: Path, source: Images, size: int, written: int) -> str:
    """One line on the space that is needed.

    Raises:
        ValueError: there is not enough.

    """
    areas = []
    for i in torch.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).long().tolist():
        try:
            rows, columns = shrunk(source[i][0], size).shape[1:]
        except BadImage:
            continue
        areas.append(3 * rows * columns)
    needed = sum(areas) / max(1, len(areas)) * len(source) - written
    free = shutil.disk_usage(folder).free
    line = f"{len(source):,} images: needs about {max(0, needed) / 1e9:.2f} GB, {folder} has {free / 1e9:.1f} GB"
    if needed > free:
        raise UserError(f"{line}: give another --output or a smaller --size")
    return line
