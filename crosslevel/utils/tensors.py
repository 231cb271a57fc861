"""Files of tensors that may come from anybody."""

from __future__ import annotations

import json
import mmap
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.files import CHECKSUM, checksum


def load_tensors(file: Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, if it is tensors and plain values; a file that would run code is not read.

    Args:
        file: the file.
        mmap: leave the tensors on the disk until they are used; for files in PyTorch's format since 1.6 only.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or asks for more than tensors and plain values.

    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what is refused is told in one line
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in any way
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {asked[1]}, which could run code"
            if asked
            else f"damaged, or none of PyTorch's ({type(error).__name__})"
        )
        raise UserError(f"{file} is not read: {reason}; only tensors and plain values are") from error


def load_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; its checksum is looked at where it has one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or something else.

    """
    try:
        with safe_open(file, framework="pt") as opened:
            about = dict(opened.metadata() or {})
        written = about.pop(CHECKSUM, None)
        if written is not None and written != _checksum_of(file):
            raise UserError(f"{file} is not read: it is damaged: its checksum is not that of its content")
        return load_file(file), about
    except (SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not read: it is damaged, or no safetensors file ({error})") from error


def _checksum_of(file: Path) -> str:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as whole:
            begin = 8 + int.from_bytes(whole[:8], "little")
            return checksum(json.loads(bytes(whole[8:begin])), whole[begin:])
