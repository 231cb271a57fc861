"""Annotated images: the common parts of the layouts of Pascal VOC and COCO, and checks of their boxes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.decode import read_image
from crosslevel.data.decoding.reading import USUAL
from crosslevel.utils.errors import BadImage, SourceError

Ignored = Literal["difficult", "crowd"]


class Objects(NamedTuple):
    """The K annotated objects of one image.

    ``boxes`` are (x1, y1, x2, y2) in pixels, from the upper left corner of the image; ``labels`` are numbers of
    classes. ``ignored`` objects (VOC: difficult, COCO: a crowd) are not trained on, and detections of
    them do not count.
    """

    boxes: Float[Tensor, "K 4"]
    labels: Int64[Tensor, " K"]
    ignored: Bool[Tensor, " K"]

    @property
    def usable(self) -> Objects:
        """The objects that are not ignored."""
        return Objects(*(column[~self.ignored] for column in self))


class Annotated(Dataset[tuple[Tensor, Objects]]):
    """N images with objects.

    ``objects[i]`` are those of ``files[i]``; ``classes[c]`` names label c; ``ignored`` is the kind of ignored objects:
    "difficult" (VOC) or "crowd" (COCO); ``sizes`` are (height, width) if the annotation has them. ``origin`` are the
    annotations, lists and folders of images that all this was read from.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        objects: Sequence[Objects],
        classes: Sequence[str],
        ignored: Ignored,
        sizes: Sequence[tuple[int, int]],
        origin: Sequence[str] = (),
    ) -> None:
        self.name, self.files, self.objects, self.classes = name, list(files), list(objects), list(classes)
        self.ignored: Ignored = ignored
        self.sizes, self.origin = list(sizes), list(origin)
        self.reading = USUAL

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], Objects]:
        """Image i and its objects.

        Raises:
            BadImage: the file cannot be decoded, or has another size than its annotation says.

        """
        image, size = read_image(self.files[i], reading=self.reading), self.sizes[i]
        if tuple(image.shape[1:]) != size:
            read = "{2}x{1}".format(*image.shape)
            raise BadImage(self.files[i], f"its annotation says {size[1]}x{size[0]} pixels, the image has {read}")
        return image, self.objects[i]

    def names(self) -> set[str]:
        """The classes that have an object that is not ignored."""
        used = {int(label) for objects in self.objects for label in objects.usable.labels}
        return {self.classes[label] for label in used}

    def with_examples(self) -> Annotated:
        """Only the images with an object that is not ignored: a detector is trained on these.

        Raises:
            SourceError: there are none.

        """
        keep = [i for i, objects in enumerate(self.objects) if not objects.ignored.all()]
        if not keep:
            raise SourceError(f"{self.name}: not one of its {len(self)} images has an object that is not ignored")
        return self._replaced([self.files[i] for i in keep], [self.objects[i] for i in keep], self.classes, keep)

    def numbered_as(self, train: Annotated) -> Annotated:
        """Return these images with the class numbers of ``train``.

        Raises:
            SourceError: some objects are of classes that ``train`` lacks; the message names them.

        """
        unknown = sorted(self.names() - train.names())
        if unknown:
            class_names = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
            raise SourceError(f"{self.name} has classes that {train.name} lacks: {class_names}")
        number_of = {name: c for c, name in enumerate(train.classes)}
        # A class without a number has ignored objects only, so that there is nothing to detect.
        number = torch.tensor([number_of.get(name, -1) for name in self.classes], dtype=torch.int64)
        renumbered = []
        for objects in self.objects:
            labels = number[objects.labels]
            mask = labels >= 0
            renumbered.append(Objects(objects.boxes[mask], labels[mask], objects.ignored[mask]))
        return self._replaced(self.files, renumbered, train.classes, range(len(self)))

    def _replaced(self, files: list[str], objects: list[Objects], classes: list[str], keep: Sequence[int]) -> Annotated:
        sizes = [self.sizes[i] for i in keep]
        result = Annotated(self.name, files, objects, classes, self.ignored, sizes, self.origin)
        result.reading = self.reading
        return result


class Row(NamedTuple):
    """One object, as read from its file."""

    corners: tuple[float, float, float, float]
    label: int
    ignored: bool
    number: object  # its number or name, for messages


def objects_of(rows: list[Row], size: tuple[int, int], location: str) -> Objects:
    """Checked rows as tensors; ``location`` begins the message about a bad one."""
    checked = [(_clipped(row, size, f"{location} {row.number}"), row) for row in rows]
    valid = [(box, row.label, row.ignored) for box, row in checked if box is not None]
    boxes = torch.tensor([box for box, _, _ in valid], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in valid], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([ignored for _, _, ignored in valid], dtype=torch.bool))


def _clipped(row: Row, size: tuple[int, int], location: str) -> tuple[float, float, float, float] | None:
    """The box within its image of (height, width) ``size``; None if it has no area."""
    (x1, y1, x2, y2), (height, width) = row.corners, size
    box = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not (x2 >= x1 and y2 >= y1):
        raise SourceError(f"{location}: {box} ends before it begins: correct or remove it")
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise SourceError(f"{location}: {box} lies outside its image of {width}x{height} pixels: correct or remove it")
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x2 > x1 and y2 > y1:
        return x1, y1, x2, y2
    warnings.warn(f"{location}: {box} has no area and is left out", stacklevel=2)
    return None


def file_names(folder: Path) -> set[str]:
    """The files of ``folder``: one listing is faster than 100,000 checks for single images."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror or error}: the images are expected there") from error
