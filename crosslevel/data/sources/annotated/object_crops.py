"""Object crops: one image for each annotated object, cut out of the images of Pascal VOC or COCO."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths
from crosslevel.data.sources.annotated.annotations import Annotated
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import Source
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError, UserError


@dataclass(frozen=True)
class Crops:
    """How annotated objects are cut out (as Kitchen-HC was made: Wang et al. 2021, sec. 4).

    Args:
        margin: added on each side of a box, as a share of its longer side; less at the image's edge.
        min_size: pixels of a box's shorter side; objects that have fewer are left out.
        square: widen the shorter side to the longer one where the image has room. Steps that cut out the centre square,
            such as evaluation, never see the ends of an oblong image.

    Raises:
        ValueError: a negative margin, or a smallest size below 1.

    """

    margin: float = 0.1
    min_size: int = 32
    square: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise UserError(f"crops.margin={self.margin}: give a share of the box's longer side, 0 for none")
        if self.min_size < 1:
            raise UserError(f"crops.min_size={self.min_size}: give a number of pixels, at least 1")

    def options(self) -> str:
        """These settings in the form of the command line."""
        values = [(field, getattr(self, field.name)) for field in fields(self)]
        changed = [f"--crops.{field.name}={value}" for field, value in values if value != field.default]
        return " ".join(changed).lower() or "--crops"

    def windows(self, boxes: Float[Tensor, "K 4"], sizes: Int64[Tensor, "K 2"]) -> Int64[Tensor, "K 4"]:
        """The windows to crop for boxes (x1, y1, x2, y2) of images of (height, width) ``sizes``, in whole pixels."""
        low, high = boxes[:, :2].double(), boxes[:, 2:].double()
        side = (high - low).amax(1, keepdim=True)
        low, high = low - self.margin * side, high + self.margin * side
        limit = sizes.flip(1).double()
        if self.square:
            low, high = _squared(low, high, limit)
        low, high = low.floor().clamp(min=0), torch.minimum(high.ceil(), limit)
        return torch.cat([low, high], dim=1).long()


def _squared(low: Tensor, high: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The shorter side widened to the longer one, about its centre; moved into the image where it would leave it.

    Computed in whole pixels, so that rounding cannot make the sides differ. A side is never longer than the image's.
    """
    low, high = low.floor(), high.ceil()
    side = torch.minimum((high - low).amax(1, keepdim=True), limit)
    low = ((low + high - side) / 2).floor()
    low = torch.minimum(low, limit - side).clamp(min=0)
    return low, low + side


class ObjectCrops(Images):
    """N annotated objects, each cut out of its image when it is read.

    ``paths[i]`` is ``image.jpg#k`` for the k-th object in an image's annotation; k counts omitted objects too.
    ``labels`` are the objects' classes; ``classes`` lists the classes that have an object. The objects are in the order
    of the images, and the last decoded image is kept, so that each image is decoded once if they are read in order.
    Objects of one image are not a track, as they are different things.
    """

    def __init__(self, images: Annotated, crops: Crops) -> None:
        """Select the objects: ignored ones (VOC's difficult ones, COCO's crowds) and small ones are left out.

        Raises:
            SourceError: fewer than 2 objects are left.

        """
        self.images, self.crops, self.name = images, crops, images.name
        counts = torch.tensor([len(objects.labels) for objects in images.objects], dtype=torch.int64)
        boxes, labels, ignored = (torch.cat(column) for column in zip(*images.objects, strict=True))
        usable = ~ignored
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        keep = (usable & (sides >= crops.min_size)).nonzero().squeeze(1)
        if len(keep) < 2:
            raise SourceError(_too_few(images, crops, sides, usable, len(keep)))
        image = torch.arange(len(images)).repeat_interleave(counts)
        number = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
        self.image = image[keep]
        self.windows = crops.windows(boxes[keep], torch.tensor(images.sizes)[self.image])
        used, self.labels = labels[keep].unique(return_inverse=True)
        self.classes = [images.classes[c] for c in used.tolist()]
        self.paths = Paths.of(_names(images.files, self.image, number[keep]))
        self.watch = Watch.of_files(images.origin)
        self._last: tuple[int, Tensor] | None = None

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Object i and its class (-1 without labels).

        Raises:
            BadImage: its image cannot be decoded, or has another size than its annotation says.

        """
        x1, y1, x2, y2 = self.windows[i].tolist()
        # A copy: a view would keep the whole image.
        label = -1 if self.labels is None else int(self.labels[i])
        return self._image_of(i)[:, y1:y2, x1:x2].clone(), label

    def _image_of(self, i: int) -> Tensor:
        """The image that object i is in."""
        number, last = int(self.image[i]), self._last
        if last is None or last[0] != number:
            try:
                last = number, self.images[number][0]
            except BadImage as error:
                raise BadImage(self.paths[i], error.reason) from error
            self._last = last
        return last[1]

    def __getstate__(self) -> dict[str, object]:
        """Leave out the image that was decoded last: a worker process begins with its own."""
        return {**self.__dict__, "_last": None}

    def content(self) -> Iterable[bytes | memoryview]:
        """Bytes that identify the windows, and names, sizes and times of change of the images."""
        yield self.windows.numpy().tobytes()
        yield self.image.numpy().tobytes()
        for number in self.image.unique_consecutive().tolist():
            file = self.images.files[number]
            try:
                status = os.stat(file)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            yield f"{os.path.basename(file)}\0{state}\0".encode(errors="surrogateescape")


def object_crops(source: Source, crops: Crops) -> ObjectCrops:
    """The objects of the annotated images of ``source``, as `annotated` takes it.

    Raises:
        SourceError: there are no annotations, they are wrong, or fewer than 2 objects are large enough.

    """
    for part in source.parts:
        if not part.annotated:
            raise SourceError(
                f"{part}: there are no annotated objects to crop: give a VOC folder and the name of a list, "
                "VOC2007:trainval, or COCO's instances and their images, instances_val2017.json:val2017, "
                "or leave --crops out"
            )
    return ObjectCrops(annotated(source), crops)


def _names(files: list[str], image: Int64[Tensor, " N"], number: Int64[Tensor, " N"]) -> Iterator[str]:
    """The names ``image.jpg#k``, with folders if the images lie in several."""
    folders = {os.path.dirname(file) for file in files}
    shared = os.path.commonpath(folders)
    for i, k in zip(image.tolist(), number.tolist(), strict=True):
        yield f"{os.path.relpath(files[i], shared)}#{k + 1}"


def _too_few(images: Annotated, crops: Crops, sides: Tensor, usable: Tensor, usable_count: int) -> str:
    count, ignored = int(usable.sum()), int((~usable).sum())
    if count < 2:
        ignored_note = f", {ignored:,} more are ignored ({images.ignored})" if ignored else ""
        return f"{images.name}: needs at least 2 objects, it has {count}{ignored_note}"
    largest = f"{float(sides[usable].max()):g}"
    have = "1 has" if usable_count else "none have"
    return (
        f"{images.name}: of its {count:,} objects {have} a shorter side of at least {crops.min_size} pixels "
        f"(the largest: {largest}): lower --crops.min_size"
    )
