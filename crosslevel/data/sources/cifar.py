"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official files."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.images import InMemoryImages
from crosslevel.utils.errors import SourceError


class Cifar10(InMemoryImages):
    """CIFAR-10 (Krizhevsky 2009) from its official files for Python: 50,000 + 10,000 images of 32x32.

    ``data_root`` is the folder that holds ``cifar-10-batches-py`` (or that folder itself).

    Raises:
        SourceError: the files are not there, or are not what they should be.

    """

    def __init__(self, split: Literal["train", "test"] = "train", *, data_root: str | None = None) -> None:
        batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        folder = _cifar_folder("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz", data_root)
        files = [folder / batch for batch in _of_split("cifar10", split, batches)]
        data, labels, classes = _read_cifar(files, "labels", folder / "batches.meta", "label_names")
        super().__init__(data, _numbered(split, len(data)), labels, classes, f"cifar10:{split}")


class Cifar100(InMemoryImages):
    """CIFAR-100 (Krizhevsky 2009) from its official files for Python: 50,000 + 10,000 images of 32x32.

    ``data_root`` is the folder that holds ``cifar-100-python`` (or that folder itself); ``labels`` are
    the 100 ``fine`` classes or the 20 ``coarse`` ones.

    Raises:
        SourceError: the files are not there, or are not what they should be.

    """

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        labels: Literal["fine", "coarse"] = "fine",
        *,
        data_root: str | None = None,
    ) -> None:
        folder = _cifar_folder("cifar100", "cifar-100-python", "cifar-100-python.tar.gz", data_root)
        files = [folder / name for name in _of_split("cifar100", split, {"train": ["train"], "test": ["test"]})]
        keys = f"{labels}_labels", f"{labels}_label_names"
        data, numbers, classes = _read_cifar(files, keys[0], folder / "meta", keys[1])
        super().__init__(data, _numbered(split, len(data)), numbers, classes, f"cifar100:{split}")


def _of_split(source: str, split: str, splits: dict[str, list[str]]) -> list[str]:
    if split not in splits:
        raise SourceError(f"{source}:{split}: there is no split {split!r}: use {' or '.join(splits)}")
    return splits[split]


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}/{i:05d}" for i in range(count)]


def _cifar_folder(source: str, folder: str, archive: str, data_root: str | None) -> Path:
    get = f"https://www.cs.toronto.edu/~kriz/{archive}"
    if data_root is None:
        raise SourceError(f"{source}: --data-root is missing: the folder that holds {folder}/ (from {get})")
    root = Path(data_root)
    for path in (root / folder, root):
        if path.name == folder and path.is_dir():
            return path
    if (root / archive).is_file():
        raise SourceError(f"{source}: {root / archive} is still packed: tar -xzf {archive} in {root}")
    raise SourceError(f"{source}: {root / folder} is not there: unpack {get} in {root}")


def _read_cifar(
    files: Sequence[Path], label_key: str, meta: Path, names_key: str
) -> tuple[UInt8[Tensor, "N 3 32 32"], Int64[Tensor, " N"], list[str]]:
    images, labels = [], []
    for file in files:
        content = _unpickled(file)
        data, numbers = content.get(b"data"), content.get(label_key.encode())
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
            raise SourceError(f"{file}: no uint8 'data' of 3,072 columns: not an official CIFAR file")
        if not isinstance(numbers, list) or len(numbers) != len(data):
            raise SourceError(f"{file}: no '{label_key}', one for each of its {len(data)} images")
        images.append(torch.from_numpy(data))
        labels += numbers
    names = _unpickled(meta).get(names_key.encode())
    if not isinstance(names, list):
        raise SourceError(f"{meta}: no '{names_key}': not an official CIFAR file")
    return torch.cat(images).view(-1, 3, 32, 32), torch.tensor(labels), [name.decode() for name in names]


class _Dtype:
    """A stand-in for a pickled dtype, whose flags could make NumPy take bytes for the addresses of objects."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, where only uint8 is read")

    def __setstate__(self, state: object) -> None:
        """Do nothing: single bytes have no byte order."""


class _Array:
    """A stand-in for a pickled array: a uint8 array from its bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        """Read what NumPy writes: version, shape, dtype, whether columns come first, bytes."""
        _, shape, _, columns_first, data = state
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if columns_first else "C").copy()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles only plain values and arrays of uint8, so that no CIFAR file can run code."""

    def find_class(self, module: str, name: str) -> object:
        """Allow only the few names that an array's pickle needs."""
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")


def _unpickled(file: Path) -> dict[bytes, object]:
    try:
        with open(file, "rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}: unpack the official archive again") from error
    except Exception as error:
        # Unpickling a damaged file may raise any error.
        raise SourceError(f"{file}: damaged ({error}): unpack the official archive again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: not an official CIFAR file")
    # Files written by Python 3 have str keys where the official ones have bytes.
    return {
        key.encode() if isinstance(key, str) else key: value.array if isinstance(value, _Array) else value
        for key, value in content.items()
    }
