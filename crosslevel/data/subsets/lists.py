"""Lists of images and labels, one a line: written for subsets, or published."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.data.bad_files import escaped, unescaped
from crosslevel.data.images import Images
from crosslevel.data.subsets.select import of_classes, take
from crosslevel.utils.errors import SourceError, did_you_mean
from crosslevel.utils.files import replacing

MOST_CLASSES = 1_000_000
"""A larger label is a mistake, not a class."""


def write_list(images: Images, file: str | os.PathLike[str]) -> None:
    r"""Write ``path<TAB>label`` a line, in order, as UTF-8; the label is -1 where there is none.

    Backslash, tab, newline and carriage return in a path are written ``\\``, ``\t``, ``\n``, ``\r``; file names that
    are not UTF-8 keep their bytes. `listed` reads it back.
    """
    labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
    with replacing(file) as stream:
        for path, label in zip(images.paths, labels, strict=True):
            stream.write(f"{escaped(path)}\t{label}\n".encode("utf-8", "surrogateescape"))


def listed(images: Images, file: str) -> Images:
    """The images that a file names, in its order, with its labels.

    A line is ``path label``, as in the lists of ImageNet-LT and Places-LT (Liu et al., CVPR 2019), with spaces or a tab
    between them, or only a path. A list without labels leaves the source's. If all labels are those of the source, its
    class names are kept; otherwise a class is named by its number, so that lists to train and to test on agree.

    Raises:
        SourceError: the file cannot be read, names fewer than 2 images or one that the source lacks, or only some
            lines have labels.

    """
    lines = [_Line.of(line) for line in _text(file).split("\n") if line.strip()]
    if len(lines) < 2:
        raise SourceError(f"{file}: needs at least 2 images, one a line; it names {len(lines)}")
    names = {name for line in lines for name in (line.text, line.path)}
    numbers: dict[str, int] = {}
    for i, path in enumerate(images.paths):
        if path in names:
            numbers.setdefault(path, i)
    # A name that ends in a number is a name if the source has it.
    lines = [line.without_label() if line.text in numbers else line for line in lines]
    missing = [line.path for line in lines if line.path not in numbers]
    if missing:
        raise SourceError(
            f"{file}: {len(missing):,} of its {len(lines):,} lines name no image of {images.name}, {missing[0]} first; "
            f"its own are named like {images.paths[0]}"
        )
    index = torch.tensor([numbers[line.path] for line in lines])
    return take(images, index, *_labels(images, index, [line.label for line in lines], file))


def classes_of(images: Images, file: str) -> Images:
    """The images of the classes that a file names, one a line; their labels are numbered in its order.

    A line is a class, or begins with one: ``n01440764 tench``, as in lists of ImageNet-100 (Tian et al., ECCV 2020).

    Raises:
        SourceError: the source has no classes, or the file cannot be read or names no class, a class twice, or a class
            that the source lacks.

    """
    if images.labels is None or images.classes is None:
        raise SourceError(f"{images.name} has no classes to choose from: put each into a folder of its own")
    numbers = {name: c for c, name in enumerate(images.classes)}
    entries = [line.strip() for line in _text(file).split("\n") if line.strip()]
    names = [line if line in numbers else line.split()[0] for line in entries]
    duplicated = next((name for name, count in Counter(names).items() if count > 1), None)
    unknown = next((name for name in names if name not in numbers), None)
    if unknown is not None:
        hint = did_you_mean(unknown, numbers, f"it has {', '.join(images.classes[:5])}, ...")
        raise SourceError(f"{file}: {images.name} has no class {unknown}: {hint}")
    if duplicated is not None or not names:
        raise SourceError(f"{file}: {'names no class' if duplicated is None else f'names class {duplicated} twice'}")
    index, labels = of_classes(images.labels, [numbers[name] for name in names])
    return take(images, index, labels, names)


class _Line(NamedTuple):
    """A line of a list, whole and split into ``path label``."""

    text: str
    path: str
    label: int | None

    def without_label(self) -> _Line:
        """Read the whole line as a path; a tab cannot be part of it."""
        return self if self.text == self.path else _Line(self.text, self.text, None)

    @classmethod
    def of(cls, line: str) -> _Line:
        """Split a line: a tab always separates path and label, as a tab in a path would be escaped."""
        line = line.removesuffix("\r")
        path, tab, label = line.rpartition("\t")
        if tab and _is_number(label):
            return cls(unescaped(path), unescaped(path), int(label))
        fields = line.rsplit(maxsplit=1)
        if len(fields) == 2 and _is_number(fields[1]):
            return cls(line, fields[0], int(fields[1]))
        return cls(line, line, None)


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _labels(
    images: Images, index: Int64[Tensor, " M"], stated: list[int | None], file: str
) -> tuple[Int64[Tensor, " M"] | None, list[str] | None]:
    """Labels and classes of the listed images; None to use the source's."""
    if all(label in (None, -1) for label in stated):
        return None, None
    numbers = [label for label in stated if label is not None and label >= 0]
    if len(numbers) < len(stated):
        raise SourceError(
            f"{file}: {len(stated) - len(numbers):,} of its {len(stated):,} lines have no label of 0 or more"
        )
    if max(numbers) >= MOST_CLASSES:
        raise SourceError(f"{file}: label {max(numbers)} is no number of a class")
    labels = torch.tensor(numbers)
    if images.labels is not None and torch.equal(labels, images.labels[index]):
        return None, None
    return labels, [str(c) for c in range(max(numbers) + 1)]


def _text(file: str) -> str:
    try:
        return Path(file).read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror or error}") from error
