"""STL-10 (Coates, Ng, Lee, AISTATS 2011) from its official binary files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.images import InMemoryImages
from crosslevel.utils.errors import SourceError

FOLDER, ARCHIVE = "stl10_binary", "stl10_binary.tar.gz"
ADDRESS = f"http://ai.stanford.edu/~acoates/stl10/{ARCHIVE}"
SIDE = 96
BYTES = 3 * SIDE * SIDE  # of an image
COUNTS = {"train": 5000, "test": 8000, "unlabeled": 100_000}


class Stl10(InMemoryImages):
    """STL-10: 5,000 + 8,000 labelled images of 96x96 in 10 classes, and 100,000 unlabelled ones of these and others.

    ``data_root`` is the folder that holds ``stl10_binary`` (or that folder itself). The files are memory-mapped: images
    are read on demand, and the system can free their memory at any time. Only ``train+unlabeled`` is read into memory,
    2.9 GB.

    ``unlabeled`` and ``train+unlabeled`` have no labels, so that they cannot be used for evaluation: `Images` have
    labels for all images or for none.

    Raises:
        SourceError: a file is missing, or has the wrong size.

    """

    def __init__(
        self,
        split: Literal["train", "test", "unlabeled", "train+unlabeled"] = "train",
        *,
        data_root: str | None = None,
    ) -> None:
        splits = split.split("+")
        if split != "train+unlabeled" and split not in COUNTS:
            raise SourceError(f"stl10:{split}: there is no split {split!r}: use {', '.join(COUNTS)} or train+unlabeled")
        folder = _folder(data_root)
        images = [_images(folder / f"{part}_X.bin", COUNTS[part]) for part in splits]
        paths = [f"{part}/{i:06d}" for part in splits for i in range(COUNTS[part])]
        labelled = len(splits) == 1 and split != "unlabeled"
        labels = _labels(folder / f"{split}_y.bin", COUNTS[split]) if labelled else None
        classes = _classes(folder / "class_names.txt") if labelled else None
        data = images[0] if len(images) == 1 else torch.cat(images)
        super().__init__(data, paths, labels, classes, f"stl10:{split}")


def _folder(data_root: str | None) -> Path:
    if data_root is None:
        raise SourceError(f"stl10: --data-root is missing: the folder that holds {FOLDER}/ (from {ADDRESS})")
    root = Path(data_root)
    for folder in (root / FOLDER, root):
        if folder.name == FOLDER and folder.is_dir():
            return folder
    if (root / ARCHIVE).is_file():
        raise SourceError(f"stl10: {root / ARCHIVE} is still packed: tar -xzf {ARCHIVE} in {root}")
    raise SourceError(f"stl10: {root / FOLDER} is not there: unpack {ADDRESS} in {root}")


def _images(file: Path, count: int) -> UInt8[Tensor, "N 3 96 96"]:
    """Map the images without reading them; an image is stored as three colours, each column by column."""
    _check_size(file, count * BYTES)
    mapped = torch.from_file(str(file), shared=False, size=count * BYTES, dtype=torch.uint8)
    return mapped.view(count, 3, SIDE, SIDE).transpose(2, 3)


def _labels(file: Path, count: int) -> Int64[Tensor, " N"]:
    _check_size(file, count)
    labels = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long() - 1  # the file counts from 1
    if int(labels.min()) < 0 or int(labels.max()) > 9:
        raise SourceError(f"{file}: labels outside of 1 to 10: unpack the official {ARCHIVE} again")
    return labels


def _classes(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").split()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}: unpack the official {ARCHIVE} again") from error
    if len(names) != 10:
        raise SourceError(f"{file}: {len(names)} names of classes, not 10: unpack the official {ARCHIVE} again")
    return names


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}: unpack the official {ARCHIVE} again") from error
    if size != expected:
        raise SourceError(f"{file}: {size:,} bytes, not {expected:,}: unpack the official {ARCHIVE} again")
