"""Sharded checkpoints, by torch.distributed.checkpoint: each process writes its part; any number of processes can read.

Reading such a folder runs no code: its index is unpickled with only the classes that describe tensors, and the files
hold tensors alone.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.files import sync_folder
from crosslevel.utils.tensors import damage_of
from crosslevel.utils.trees import regular

SUFFIX = ".shards"
_INDEX = ".metadata"
_DESCRIBING = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "pathlib": ("PosixPath", "WindowsPath"),
}  # fmt: skip


class Shards:
    """A folder of parts to read.

    Attributes:
        sizes: the full shape of each tensor, by name.

    Raises:
        UserError: it is missing, or no such folder.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = _Describing(io.BytesIO(regular(folder / _INDEX).read_bytes())).load()
            tensors = self._index.state_dict_metadata
            self.sizes = {name: list(tensor.size) for name, tensor in tensors.items()}
            all_tensors = all(isinstance(tensor, TensorStorageMetadata) for tensor in tensors.values())
            entries = [entry for entry in self._index.storage_data.values()]
            inside = all(Path(entry.relative_path).name == entry.relative_path for entry in entries)
            plain = not any(getattr(entry, "transform_descriptors", None) for entry in entries)
        except Exception as error:  # a damaged index may raise any error
            raise UserError(f"{folder} is not read: {' '.join(str(error).split())}") from error
        if not (all_tensors and inside and plain):
            raise UserError(f"{folder} is not read: it holds other things than tensors")

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors of the same names, full ones or this process's parts; all processes must call it.

        Raises:
            UserError: the folder's files are damaged.

        """
        alone = not torch.distributed.is_initialized()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a single process
                dcp.load(dict(targets), storage_reader=_Reader(self.folder, self._index), no_dist=alone)
        except dcp.api.CheckpointException as error:
            raise UserError(f"{self.folder} is not read: {_cause(error)}") from error

    def damage(self, process: int | None = None) -> str:
        """Describe the damage of its files, or of one process's files; empty if there is none."""
        for entry in self._index.storage_data.values():
            if process is not None and not entry.relative_path.startswith(f"__{process}_"):
                continue
            with open(regular(self.folder / entry.relative_path), "rb") as file:
                file.seek(entry.offset)
                damage = damage_of(io.BytesIO(file.read(entry.length)))
            if damage:
                return f"{damage} ({entry.relative_path})"
        return ""


def write(folder: Path, tensors: dict[str, Tensor], process: int) -> None:
    """Write each process's parts, synced, and read them back; all processes must call it.

    Raises:
        MachineError: a process could not write, or did not read back what it wrote.

    """
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
    except dcp.api.CheckpointException as error:
        raise MachineError(f"{folder} cannot be written: {_cause(error)}") from error
    damage = Shards(folder).damage(process)
    if damage:
        raise MachineError(f"{folder}: it reads back differently from what was written ({damage}): check the disk")
    sync_folder(folder)


def sweep(folder: Path, referenced: set[str]) -> None:
    """Remove all such folders except those of these names, which checkpoints refer to."""
    for old in folder.glob(f"*{SUFFIX}"):
        if old.name not in referenced and not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)


class _Describing(pickle.Unpickler):
    """Unpickles descriptions of tensors only; all other classes are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIBING.get(module, ()):
            raise UserError(f"its index asks for {module}.{name}, which could run code")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """A reader with an index that was loaded and checked before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._checked = index

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self._checked


def _cause(error: dcp.api.CheckpointException) -> str:
    """The error of the first process that failed."""
    causes = [str(failure[0]) for failure in error.failures.values()]
    return " ".join((causes or [str(error)])[0].split())
