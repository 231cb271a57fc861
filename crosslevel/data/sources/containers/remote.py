"""Local and remote files: names with patterns, and files that are read from beginning to end."""

from __future__ import annotations

import contextlib
import glob
import gzip
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from crosslevel.data.sources.braces import expanded
from crosslevel.data.sources.containers.patience import FINAL, patiently, pauses, request_bytes
from crosslevel.data.uri import is_remote
from crosslevel.utils.errors import SourceError

PROTOCOLS = (
    "https", "http", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oci", "ftp", "sftp", "ssh", "file",
    "memory", "hdfs", "webhdfs",
)  # fmt: skip
"""The protocols of fsspec that only read bytes; others can run templates or code from a file."""
INSTALL = "pip install 'crosslevel[remote]'"
_ALSO = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub"}
_AT_ONCE = 2**20  # bytes that are read at once, on demand
_MOST = 1_000_000  # names that one pattern may stand for


class Damage(Exception):
    """A file that cannot be read to its end; the message is the reason."""


def expand(pattern: str, limit: int = _MOST) -> list[str]:
    """The files that ``pattern`` names: ``{000..009}`` and ``{a,b}`` written out, in order; ``*`` looked up, sorted.

    Args:
        pattern: of names or addresses.
        limit: names that it may stand for.

    Raises:
        SourceError: there is no such file, protocol or package, or the pattern names too many files.

    """
    too_many = SourceError(f"{pattern}: may stand for at most {limit:,} names")
    written = list(islice(expanded(pattern), limit + 1))
    if len(written) > limit:
        raise too_many
    names: list[str] = []
    for name in written:
        if not is_remote(name):
            files = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        else:
            files = _remote_files(name)
        # A plain name is not checked here: a missing file is reported when it is read, like a file that vanishes later.
        if not files and "*" in name:
            raise SourceError(f"{name}: no file matches this pattern")
        names += files or [name]
        if len(names) > limit:
            raise too_many
    for name in names:
        if not is_remote(name) and os.path.exists(name) and not stat.S_ISREG(os.stat(name).st_mode):
            raise SourceError(f"{name}: not a file: each epoch reads its shards anew, so write them to files")
    return names


class FileState(NamedTuple):
    """A file in a store: its size in bytes, and a state that changes when it is written anew."""

    size: int
    state: str


def stat_of(name: str) -> FileState:
    """The size and state of the file at an address.

    Raises:
        SourceError: the file is missing, or its state cannot be requested.

    """
    system, path = system_of(name)
    try:
        info = patiently(lambda: system.info(path))
        if info.get("size") is None:
            raise SourceError(f"{name}: the server does not say how large it is: it can only be streamed, by train")
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{name}: cannot be opened: {reason(error)}") from error
    return FileState(int(info["size"]), state_of(info))


def sizes_of(names: Sequence[str]) -> list[int]:
    """The bytes of each local or remote file, by one listing of each folder; 0 for a missing file.

    Every size is 1 if a file lies on a web server, which cannot list, or if the store gives no sizes or forbids
    listing.

    Raises:
        SourceError: the store does not answer.

    """
    listed: dict[str, dict[str, int | None]] = {}
    sizes: list[int | None] = []
    for name in names:
        if not is_remote(name):
            sizes.append(os.path.getsize(name) if os.path.isfile(name) else 0)
        elif name.lower().startswith("http"):
            return [1] * len(names)
        else:
            system, path = system_of(name)
            folder = name.rpartition("/")[0]
            if folder not in listed:
                in_folder = _listing(system, path.rpartition("/")[0], folder)
                if in_folder is None:
                    return [1] * len(names)
                listed[folder] = in_folder
            sizes.append(listed[folder].get(path, 0))
    return [1] * len(names) if None in sizes else [size or 0 for size in sizes]


def _listing(system: Any, path: str, name: str) -> dict[str, int | None] | None:
    """The size of each file in a folder of a store; empty if the folder is missing, None if listing is forbidden."""
    try:
        sizes = {str(info["name"]): info.get("size") for info in patiently(lambda: system.ls(path, detail=True))}
        system.invalidate_cache(path)  # so that a shard that is rewritten meanwhile is listed anew
        return sizes
    except FileNotFoundError:
        return {}
    except PermissionError:
        return None
    except Exception as error:
        raise SourceError(f"{name}: cannot be listed: {reason(error)}") from error


def state_of(info: Mapping[str, Any]) -> str:
    """The part of a store's metadata that changes when a file is written anew."""
    marks = ("ETag", "etag", "LastModified", "mtime", "last_modified", "updated", "created", "VersionId")
    state = {mark: str(info[mark]) for mark in marks if info.get(mark) is not None}
    return f"{info['size']} {state}"


def exists(name: str) -> bool:
    """Whether there is a file at this address.

    Raises:
        SourceError: the store does not answer.

    """
    system, path = system_of(name)
    try:
        return bool(patiently(lambda: system.exists(path)))
    except Exception as error:
        raise SourceError(f"{name}: cannot be looked for: {reason(error)}") from error


class Tape:
    """A file that is read once, from its beginning to its end; ``.gz`` and ``.tgz`` are unpacked on the way.

    If a read fails, or ends before the file does, the file is opened again and read from the same byte, after each of
    the `pauses`; setting ``closing`` ends a pause. ``packed`` leaves what is compressed as it is. ``opened`` opens the
    file, as `open_file` does.
    """

    def __init__(
        self,
        name: str,
        closing: threading.Event,
        packed: bool = False,
        opened: Callable[[str, bool, bool], Any] | None = None,
    ) -> None:
        self.name, self.closing, self.at, self.packed = name, closing, 0, packed
        self.opened = opened or open_file
        self._file: Any = None
        self._in_blocks = True

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer only at the end.

        Raises:
            Damage: it cannot be opened or read.

        """
        seconds = pauses()
        remaining = iter(seconds)
        while True:
            try:
                data = self._read(count)
            except FINAL as error:
                raise Damage(f"cannot be opened: {reason(error)}") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise Damage(f"damaged or truncated: {reason(error)}") from error
            except Exception as error:  # every protocol has exceptions of its own
                self.close()
                if self._in_blocks and isinstance(error, ValueError):
                    self._in_blocks = False  # a server without range requests sends the whole file
                    continue
                pause = next(remaining, None)
                if pause is None or self.closing.wait(pause):
                    raise Damage(f"cannot be read, tried {len(seconds) + 1} times: {reason(error)}") from error
                continue
            self.at += len(data)
            return data

    def skip(self, count: int) -> int:
        """Skip the next ``count`` bytes; return the number of bytes skipped, fewer at the end."""
        skipped = 0
        for size in _pieces(count):
            got = len(self.read(size))
            skipped += got
            if got < size:  # a damaged shard may claim that petabytes follow
                break
        return skipped

    def close(self) -> None:
        """Close the file, whatever state it is in."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):
                file.close()

    def _read(self, count: int) -> bytes:
        if self._file is None:
            self._file = self.opened(self.name, self._in_blocks, self.packed)
            for size in _pieces(self.at):  # not all of them can seek
                _all_of(self._file, size)
        return _all_of(self._file, count)


def _all_of(file: Any, count: int) -> bytes:
    # Piece by piece: ``count`` may come from a malicious file and exceed its real size by far.
    chunks, missing = [], count
    while missing:
        part = file.read(min(missing, _AT_ONCE))
        if not part:
            break
        chunks.append(part)
        missing -= len(part)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _pieces(count: int) -> Iterator[int]:
    while count > 0:
        yield min(count, _AT_ONCE)
        count -= _AT_ONCE


def open_file(name: str, in_blocks: bool, packed: bool) -> Any:
    """Open a local or remote file to be read once; in blocks if the server supports range requests."""
    if is_remote(name):
        system, path = system_of(name)
        block = request_bytes() if in_blocks or not name.lower().startswith("http") else 0
        file: Any = _SizedFile(system.open(path, "rb", block_size=block, cache_type="readahead" if block else "none"))
    else:
        file = open(name, "rb")  # noqa: SIM115 - the tape closes it
    unpacked = not packed and name.partition("?")[0].lower().endswith((".gz", ".tgz"))
    return gzip.GzipFile(fileobj=file) if unpacked else file


class _SizedFile:
    """A remote file of known size. An answer may be cut short: an early end counts as a failed read."""

    def __init__(self, file: Any) -> None:
        self.file, self.size = file, getattr(file, "size", None)

    def read(self, count: int = -1) -> bytes:
        """Up to ``count`` bytes, none only at the end."""
        data: bytes = self.file.read(count)
        if not data and count and isinstance(self.size, int) and self.file.tell() < self.size:
            raise OSError(f"the answer ended at byte {self.file.tell():,} of {self.size:,}")
        return data

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _remote_files(name: str) -> list[str]:
    """The files that match an address with ``*``; protocol and package are checked for every address."""
    system, path = system_of(name)
    if "*" not in name.partition("?")[0]:
        return [name]
    try:
        return sorted(system.unstrip_protocol(file) for file in patiently(lambda: system.glob(path)))
    except Exception as error:
        raise SourceError(f"{name}: cannot be listed: {reason(error)}") from error


def system_of(name: str) -> tuple[Any, str]:
    """The file system of an address in fsspec, and the path in it.

    Raises:
        SourceError: an unsupported protocol, or one whose package is missing.

    """
    try:
        import fsspec  # noqa: PLC0415
    except ImportError as error:
        raise SourceError(f"{name}: reading remote files needs fsspec: {INSTALL}") from error
    protocol = name.partition("://")[0].lower()
    if "::" in name or (protocol not in PROTOCOLS and protocol in fsspec.available_protocols()):
        raise SourceError(f"{name}: {'::' if '::' in name else protocol} is not read: give {', '.join(PROTOCOLS)}")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        install = f"{INSTALL} {_ALSO.get(protocol, '')}".rstrip()
        raise SourceError(f"{name}: {reason(error).rstrip('.')}: {install}") from error
    except ValueError as error:
        raise SourceError(f"{name}: {reason(error)}") from error
    system, path = fsspec.core.url_to_fs(name)
    return system, path


def reason(error: BaseException) -> str:
    """A store's error in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
