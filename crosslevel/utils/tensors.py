"""Files of tensors that may come from anybody."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.files import CHECKSUM, checksum, replacing
from crosslevel.utils.trees import json_tree, regular


def load_tensors(file: Path, mmap: bool = False) -> Any:
    """Read a file of `torch.save` with tensors and plain values; a file that would run code is refused.

    Args:
        file: the file.
        mmap: leave the tensors on the disk until they are used; for files in PyTorch's format since 1.6 only.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or contains more than tensors and plain values.

    """
    try:
        with open(regular(file), "rb") as opened:
            if zipfile.is_zipfile(opened) and (trouble := _unlike_saved(zipfile.ZipFile(opened))):
                raise UserError(f"{file} is not read: damaged, or none of PyTorch's: {trouble}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refusals are reported in one line
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, UserError):
        raise
    except Exception as error:  # a damaged file may raise any error
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {forbidden[1]}, which could run code"
            if forbidden
            else f"damaged, or none of PyTorch's ({type(error).__name__})"
        )
        raise UserError(f"{file} is not read: {reason}; only tensors and plain values are") from error


def write_saved(target: Path, state: Any) -> None:
    """Write ``state`` with `torch.save` to ``target``, atomically.

    Raises:
        OSError: it cannot be written.

    """
    with replacing(target) as file:
        save_to(file, state, target)


def save_to(file: BinaryIO, state: Any, name: Path) -> None:
    """`torch.save`, synced; the disk's error is kept, which torch's own writer loses.

    Raises:
        OSError: it cannot be written; the message calls it ``name``.

    """
    try:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        space = shutil.disk_usage(name.parent).free
        raise MachineError(f"{name} cannot be written ({space / 1e6:,.0f} MB are free on its disk)") from error


def load_saved(file: Path) -> Any:
    """Read a file of `write_saved`, after verifying all its checksums.

    Raises:
        UserError: it is damaged; the message says how to start again.

    """
    damage = damage_of(file)
    if damage:
        raise UserError(f"{file} is {damage}: delete it, and the work whose state it holds begins anew")
    return load_tensors(file)


def damage_of(file: str | os.PathLike[str] | BinaryIO) -> str:
    """Describe the damage of a `torch.save` file; empty if none: each part has a checksum (CRC-32)."""
    try:
        with zipfile.ZipFile(file) as archive:
            unlike = _unlike_saved(archive)
            broken = None if unlike else archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a flipped byte in a header may raise any error
        return f"damaged: {' '.join(str(error).split()) or type(error).__name__}"
    return f"damaged: {unlike}" if unlike else f"damaged in {broken}" if broken else ""


def _unlike_saved(archive: zipfile.ZipFile) -> str:
    """Why an archive is not from `torch.save`, and might exceed memory; empty if it looks valid."""
    listed = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in listed):
        return "it has compressed parts"
    assert archive.fp is not None
    if sum(part.file_size for part in listed) > archive.fp.seek(0, os.SEEK_END):
        return "its parts lie on each other"
    return ""


def load_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; its checksum is verified if it has one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or something else.

    """
    try:
        with safe_open(regular(file), framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        written = metadata.pop(CHECKSUM, None)
        if written is not None and written != _checksum_of(file):
            raise UserError(f"{file} is not read: it is damaged: its checksum is not that of its content")
        return load_file(file), metadata
    except (SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not read: it is damaged, or no safetensors file ({error})") from error


def _checksum_of(file: Path) -> str:
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        begin = 8 + int.from_bytes(data[:8], "little")
        return checksum(json_tree(bytes(data[8:begin])), data[begin:])


def as_rgb(images: UInt8[Tensor, "*B C H W"]) -> UInt8[Tensor, "*B 3 H W"]:
    """Images for display: the first three channels, or the first alone as brightness."""
    channels = images.shape[-3]
    if channels == 3:
        return images
    return images[..., :3, :, :] if channels > 3 else images[..., :1, :, :].expand(*images.shape[:-3], 3, -1, -1)


@contextmanager
def without_values() -> Iterator[None]:
    """Networks that are built in this context have shapes alone, on the device "meta"."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Draws nothing into a tensor without values: that alone took PyTorch most of the time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


_DRAWS = frozenset({Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_})
