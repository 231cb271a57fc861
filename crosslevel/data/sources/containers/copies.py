"""Files of object stores, copied once into the cache: for sources that read files at any offset."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from crosslevel.data.index_cache import cache_folder
from crosslevel.data.sources.containers.remote import Damage, Tape, exists, expand, stat_of
from crosslevel.data.sources.packed import ABOUT, INDEX, read_about, shard_name
from crosslevel.data.uri import CONTAINER, Source, parse
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.files import replacing, write
from crosslevel.utils.locks import folder_lock

FOLDER = "copies"
_AT_ONCE = 4  # files
_PIECE = 2**22  # bytes
_ORIGIN = ".origin.json"
_SPARE = 2**28  # bytes of a disk that stay free


Fetch = Callable[[str, Path, int, threading.Event], None]
"""A function that copies a file, such as `download`."""


class RemoteFile(NamedTuple):
    """One file: its address, the path of its copy, its size in bytes, and a state that changes when it is rewritten."""

    address: str
    copy: Path
    size: int
    state: str


def local(source: Source) -> Source:
    """Copy a pack, tar shards or Parquet files from an address to this machine, and return them as a source.

    Each file is copied once, and again when its size or its version in the store has changed. A copy appears when it is
    complete; a killed command starts again with the file that it was copying.

    Raises:
        SourceError: the address is none of these or cannot be read, or the disk has no room for it.

    """
    path, marked, options = source.path.partition(",")
    if CONTAINER.search(path.partition("?")[0]):
        names = copied_paths([_file(name, _folder(name)) for name in expand(path)], source.base_text)
        folders = {os.path.dirname(name) for name in names}
        if len(names) == 1:
            copied = parse(names[0] + marked + options)
        elif len(folders) == 1 and set(names) == _containers(folders.pop()):
            copied = parse(os.path.dirname(names[0]) + marked + options)
        else:
            copied = parse("{" + ",".join(names) + "}" + marked + options)
        return dataclasses.replace(copied, reading=source.reading)
    if marked or not exists(f"{path.rstrip('/')}/{ABOUT}"):
        raise SourceError(
            f"{source.base_text}: no pack and no .tar or .parquet files: single images are not read from addresses; "
            "pack them, or write them to shards"
        )
    address = path.rstrip("/")
    folder = _folder(f"{address}/{ABOUT}")
    first = copied_paths([_file(f"{address}/{ABOUT}", folder)], source.base_text)[0]
    files = [_file(f"{address}/{name}", folder) for name in [INDEX, *_shards(first, source.base_text)]]
    copied_paths(files, source.base_text)
    return dataclasses.replace(parse(str(folder)), reading=source.reading)


def _shards(about_pack: str, name: str) -> list[str]:
    """The names of a pack's shards."""
    try:
        return [shard_name(number) for number in range(len(read_about(Path(about_pack))["shards"]))]
    except (UserError, OSError, KeyError, TypeError) as error:
        raise SourceError(f"{name}: its {ABOUT} is damaged: {error}") from error


def _folder(address: str) -> Path:
    """The cache folder for copies from the folder of this address."""
    parent = address.partition("?")[0].rpartition("/")[0]
    return cache_folder() / FOLDER / hashlib.sha256(parent.encode(errors="surrogateescape")).hexdigest()[:24]


def _file(address: str, folder: Path) -> RemoteFile:
    status = stat_of(address)
    return RemoteFile(address, folder / address.partition("?")[0].rpartition("/")[2], status.size, status.state)


def _containers(folder: str) -> set[str]:
    return {os.path.join(folder, name) for name in os.listdir(folder) if CONTAINER.search(name)}


def copied_paths(files: Iterable[RemoteFile], name: str, fetch: Fetch | None = None) -> list[str]:
    """The copies' paths; missing or outdated copies are made, once for all processes of this machine.

    Args:
        files: in any folders.
        name: of the source, for errors.
        fetch: copies one file; `download` unless given.

    Returns:
        a path for each of ``files``, in their order.

    Raises:
        SourceError: the disk has no room for them, or as from ``fetch``.

    """
    files = list(files)
    with ExitStack() as locks:
        if not all(map(_is_there, files)):
            for folder in sorted({file.copy.parent for file in files}):
                locks.enter_context(folder_lock(folder, "a copy", patient=True))
        _make([file for file in files if not _is_there(file)], name, fetch or download)
    return [str(file.copy) for file in files]


def _make(missing: list[RemoteFile], name: str, fetch: Fetch) -> None:
    check_room(sum(file.size for file in missing), name)
    closing = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE, "crosslevel-copy") as pool:
        try:
            list(pool.map(lambda file: _copy(file, closing, fetch), missing))
        except BaseException:
            closing.set()
            pool.shutdown(cancel_futures=True)
            raise


def _is_there(file: RemoteFile) -> bool:
    try:
        origin = json.loads(_origin(file).read_text(encoding="utf-8"))
        return bool(origin == {"state": file.state} and file.copy.stat().st_size == file.size)
    except (OSError, ValueError):
        return False


def check_room(size: int, name: str) -> None:
    """Refuse to copy more bytes than the cache's disk has room for."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size + _SPARE > free:
        raise SourceError(
            f"{name}: {size / 1e9:.1f} GB have to be copied once, and {cache} has {free / 1e9:.1f} GB left: set "
            "CROSSLEVEL_CACHE to a larger disk"
        )


def _copy(file: RemoteFile, closing: threading.Event, fetch: Fetch) -> None:
    file.copy.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        _origin(file).unlink()
    fetch(file.address, file.copy, file.size, closing)
    # The copy's time of change identifies its version: it is the same on every machine, and differs between versions.
    digest = hashlib.sha256(file.state.encode(errors="surrogateescape")).digest()
    seconds = 2 * (int.from_bytes(digest[:4], "little") >> 3)  # even seconds, which every file system can store
    os.utime(file.copy, (seconds, seconds))
    write(_origin(file), json.dumps({"state": file.state}))


def download(address: str, target: Path, size: int, closing: threading.Event) -> None:
    """Copy the file at an address to ``target``, which appears when it is complete; setting ``closing`` ends a pause.

    Raises:
        SourceError: it cannot be read, or does not have ``size`` bytes.

    """
    tape = Tape(address, closing, packed=True)
    try:
        with replacing(target) as out:
            while part := tape.read(_PIECE):
                out.write(part)
            if tape.at != size:
                raise Damage(f"has {tape.at:,} bytes instead of {size:,}")
    except Damage as error:
        raise SourceError(f"{address}: {error}") from error
    finally:
        tape.close()


def _origin(file: RemoteFile) -> Path:
    return file.copy.with_name(f".{file.copy.name}{_ORIGIN}")
