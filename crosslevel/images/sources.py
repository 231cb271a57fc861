"""Where images come from: folders, lists of files, CIFAR."""

from __future__ import annotations

import codecs
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.images.health import PIXEL_LIMIT, BadImage, read_image

__all__ = ["EXTENSIONS", "BadImage", "Cifar10", "Cifar100", "Files", "Images", "Packed", "SourceError"]

EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"))


class SourceError(ValueError):
    """A source that gives no images: what is wrong with it and what to do, in one line."""


class Images(Dataset[tuple[Tensor, int]]):
    """N images as uint8 (3, H, W), with labels only where the source has them.

    ``name`` is the source as the user wrote it; ``paths[i]`` names image i relative to the source;
    ``labels`` is None where the source has none; ``classes[c]`` names label c.
    """

    name: str
    paths: Sequence[str]
    labels: Int64[Tensor, " N"] | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be decoded.

        """
        raise NotImplementedError


class Packed(Images):
    """Images of one size in one uint8 tensor in memory: a batch is one index operation."""

    def __init__(
        self,
        data: UInt8[Tensor, "N 3 S S"],
        paths: Sequence[str],
        labels: Int64[Tensor, " N"] | None = None,
        classes: list[str] | None = None,
        name: str = "packed",
    ) -> None:
        if len(data) != len(paths) or (labels is not None and len(labels) != len(data)):
            raise ValueError(f"{len(data)} images, {len(paths)} paths: the lengths must agree")
        self.data, self.paths, self.labels, self.classes, self.name = data, paths, labels, classes, name

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 S S"], int]:
        """Image i and its label (-1 without labels)."""
        return self.data[i], -1 if self.labels is None else int(self.labels[i])

    def batch(self, index: Int64[Tensor, " B"]) -> UInt8[Tensor, "B 3 S S"]:
        """The images of ``index``, copied once."""
        return torch.index_select(self.data, 0, index)


class Files(Images):
    """Image files, decoded when they are asked for.

    ``files`` are relative to ``root`` (absolute ones stand for themselves); a file with more than
    ``max_pixels`` pixels is bad.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        labels: Int64[Tensor, " N"] | None = None,
        classes: list[str] | None = None,
        *,
        name: str | None = None,
        max_pixels: int = PIXEL_LIMIT,
    ) -> None:
        if labels is not None and len(labels) != len(files):
            raise ValueError(f"{len(files)} files, {len(labels)} labels: the lengths must agree")
        self.root, self.paths, self.labels, self.classes = root, files, labels, classes
        self.name, self.max_pixels = root if name is None else name, max_pixels

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the file cannot be opened or decoded.

        """
        image = read_image(os.path.join(self.root, self.paths[i]), self.paths[i], self.max_pixels)
        return image, -1 if self.labels is None else int(self.labels[i])

    @classmethod
    def from_folder(cls, root: str) -> Files:
        """Every image under ``root``, sorted by path; its classes where the layout has them.

        If every image lies in a sub-folder, and at least two top-level sub-folders hold images, the
        top-level sub-folder is the class.

        Raises:
            SourceError: ``root`` cannot be listed, or holds fewer than 2 images.

        """
        files = _image_files(root)
        if not files:
            known = ", ".join(sorted(EXTENSIONS))
            raise SourceError(f"{root}: no image found in this folder or below it (looked for {known})")
        if len(files) < 2:
            raise SourceError(f"{root}: needs at least 2 images, found only {files[0]}")
        return cls(root, files, *_labels(files))

    @classmethod
    def from_list(cls, files: Sequence[str | os.PathLike[str]]) -> Files:
        """The listed files, in the order given, relative to the working directory.

        Raises:
            SourceError: fewer than 2 files.

        """
        if len(files) < 2:
            raise SourceError(f"a list of {len(files)} files: needs at least 2 images")
        return cls("", [os.fspath(file) for file in files], name=f"a list of {len(files):,} files")

    @classmethod
    def from_text(cls, file: str) -> Files:
        """The files that a text file names, one a line, relative to its own folder.

        Classes come from the folders below the one that all files share, as in `from_folder`.

        Raises:
            SourceError: the text file cannot be read, or names fewer than 2 files.

        """
        try:
            text = Path(file).read_text("utf-8-sig", "surrogateescape")
        except OSError as error:
            raise SourceError(f"{file}: {error.strerror or error}") from error
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise SourceError(f"{file}: needs at least 2 images, one path a line; it names {len(lines)}")
        return cls(os.path.dirname(file), lines, *_labels(_below_shared_folder(lines)), name=file)


class Cifar10(Packed):
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


class Cifar100(Packed):
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


def _labels(files: Sequence[str]) -> tuple[Int64[Tensor, " N"] | None, list[str] | None]:
    """Labels and classes by the top-level folders; none if there are fewer than two, or a file lies outside."""
    tops = [file.split("/", 1)[0] if "/" in file else "" for file in files]
    classes = sorted(set(tops))
    if "" in classes or ".." in classes or len(classes) < 2:
        return None, None
    label = {top: c for c, top in enumerate(classes)}
    return torch.tensor([label[top] for top in tops]), classes


def _below_shared_folder(paths: Sequence[str]) -> list[str]:
    """The paths relative to the deepest folder that holds them all; unchanged where there is none."""
    plain = [os.path.normpath(path) for path in paths]
    if len({os.path.isabs(path) for path in plain}) > 1:
        return plain
    shared = os.path.commonpath([os.path.dirname(path) for path in plain])
    return [path.removeprefix(shared).removeprefix("/") for path in plain]


def _image_files(root: str) -> list[str]:
    """Paths relative to ``root``, "/" between folders, sorted; no system call for a single file.

    Linked folders come after all real ones, and no folder is entered twice: so links cannot make
    loops, and a link to a folder inside the source does not list its images again.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        prefix = folders.pop() if folders else links.pop()
        try:
            status = os.stat(os.path.join(root, prefix))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    _sort_in(entry, prefix, found, folders, links)
        except OSError as error:
            if not prefix:
                raise SourceError(f"{root}: {error.strerror or error}") from error
            warnings.warn(f"{root}/{prefix} is left out: {error.strerror or error}", stacklevel=4)
    return sorted(found)


def _sort_in(entry: os.DirEntry[str], prefix: str, found: list[str], folders: list[str], links: list[str]) -> None:
    name = entry.name
    if name.startswith("."):
        return
    if entry.is_dir(follow_symlinks=False):
        folders.append(f"{prefix}{name}/")
    elif name.rpartition(".")[2].lower() in EXTENSIONS and "." in name:
        # A link that leads nowhere is listed, so that it is named among the bad files.
        if entry.is_file(follow_symlinks=False) or entry.is_symlink():
            found.append(prefix + name)
    elif entry.is_symlink() and os.path.isdir(entry.path):  # entry.is_dir() raises on a link to itself
        links.append(f"{prefix}{name}/")


def _of_split(source: str, split: str, parts: dict[str, list[str]]) -> list[str]:
    if split not in parts:
        raise SourceError(f"{source}:{split}: there is no split {split!r}: use {' or '.join(parts)}")
    return parts[split]


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}/{i:05d}" for i in range(count)]


def _cifar_folder(source: str, folder: str, archive: str, data_root: str | None) -> Path:
    get = f"https://www.cs.toronto.edu/~kriz/{archive}"
    if data_root is None:
        raise SourceError(f"{source}: --data-root is missing: the folder that holds {folder}/ (from {get})")
    root = Path(data_root)
    for place in (root / folder, root):
        if place.name == folder and place.is_dir():
            return place
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


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays: a CIFAR file from anywhere cannot run code."""

    def find_class(self, module: str, name: str) -> object:
        """The few names that an array's pickle needs."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
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
        # Unpickling a damaged file fails in any way.
        raise SourceError(f"{file}: damaged ({error}): unpack the official archive again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: not an official CIFAR file")
    # Files written by Python 3 have str keys where the official ones have bytes.
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
