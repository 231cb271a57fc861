"""The names of a run's files, and atomic writing: after a kill, an error or a full disk, no file is incomplete.

A file appears under its name only when it is completely on disk. Until then it is ``.NAME.xxxxxxxx.part``, with eight
random digits, in the same folder, and locked while its writer lives. So the remains of a killed writer can be
distinguished from files being written; the next writer of the same name removes them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.locks import hold

CONFIG, METRICS, REPORT = "config.yaml", "metrics.csv", "report.html"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"  # folders
LAST, PREVIOUS, BEST, BEST_ENCODER = "last.ckpt", "previous.ckpt", "best.ckpt", "kept.safetensors"
ENCODER, INSTANCE, GROUP = "encoder.safetensors", "instance.safetensors", "cld.safetensors"
IMAGES, SUBSET, BAD_FILES = "images.json", "subset.txt", "bad_files.txt"
WARNINGS, LOGGERS, LAUNCH = "warnings.txt", "loggers.json", ".launch"

CHECKSUM = "crosslevel.crc32"  # its key in the metadata of a safetensors file
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)
_FORMER = re.compile(r"\.tmp[A-Za-z0-9]{6}|\..+\.\d+\.part", re.DOTALL)


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that replaces ``target`` when the block ends, and is removed if the block fails.

    Its mode follows the umask. A link is never followed: if ``target`` is a link, the link itself is replaced. File and
    folder are synced, so that a power failure leaves the old content or the new one.

    Raises:
        OSError: it cannot be written; ``target`` is unchanged.
        UserError: ``target`` is a device, a pipe or the like, which must not be replaced.

    """
    target = Path(target)
    if os.path.lexists(target) and not (target.is_symlink() or target.is_file() or target.is_dir()):
        raise UserError(f"{target} is no plain file, and is not replaced: give another name")
    sweep(target.parent, target.name)
    with _temporary(target) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
    sync_folder(target.parent)


def write(target: str | os.PathLike[str], content: str | bytes, *, private: bool = False) -> None:
    """Write ``content`` (text as UTF-8) to ``target`` atomically; ``private``: only its owner can read it."""
    with replacing(target) as file:
        if private:
            os.chmod(file.name, 0o600)
        file.write(content.encode() if isinstance(content, str) else content)


def write_tensors(
    target: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file to ``target`` atomically, with a checksum; equal content gives equal bytes.

    The library safetensors itself orders ``metadata`` differently in each process, and makes files that only their
    owner can read.
    """
    data = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {})))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:begin]))
    header["__metadata__"] = dict(sorted((metadata or {}).items()))
    with_checksum = {**header["__metadata__"], CHECKSUM: checksum(header, data[begin:])}
    header["__metadata__"] = dict(sorted(with_checksum.items()))
    text = _packed(header)
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with replacing(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(data[begin:])


def checksum(header: Mapping[str, Any], data: memoryview | bytes) -> str:
    """CRC-32 of a safetensors file: of its header without the checksum itself, then of its tensors."""
    metadata = {name: text for name, text in header.get("__metadata__", {}).items() if name != CHECKSUM}
    return f"{zlib.crc32(data, zlib.crc32(_packed({**header, '__metadata__': metadata}))):08x}"


def _packed(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the unfinished files of killed writers of ``name`` in ``folder``; without a name, those of all writers.

    Give no name for a folder that only Crosslevel writes to: this also removes temporary files of former versions and
    of safetensors, whose names do not contain the target's.
    """
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return
    for entry in entries:
        if is_unfinished(entry, name) or (name is None and _FORMER.fullmatch(entry)):
            _remove_if_left(folder / entry)


def is_unfinished(entry: str, name: str | None = None) -> bool:
    """Whether a file of this name is unfinished: being written, or left by a killed writer."""
    matched = _UNFINISHED.fullmatch(entry)
    return matched is not None and name in (None, matched[1])


def sync_folder(folder: Path) -> None:
    """Make sure that the directory entries of ``folder`` are on disk."""
    if os.name == "nt":
        return  # Windows cannot open folders
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync folders
            raise
    finally:
        os.close(opened)


def _temporary(target: Path) -> BinaryIO:
    """A new file, locked by this process."""
    while True:
        # "x" never opens an existing file, and so no link either.
        file = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part").open("x+b")
        with suppress(OSError):  # without locks, nothing is swept either
            hold(file.fileno())
        if os.fstat(file.fileno()).st_nlink:  # it was not swept before it was locked
            return file
        file.close()


def _remove_if_left(file: Path) -> None:
    with suppress(OSError):  # removed, in use or not ours: the caller goes on
        opened = os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            hold(opened)
            os.unlink(file)
        finally:
            os.close(opened)
