"""Annotated images: boxes and classes from the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.decode import read_image
from crosslevel.data.sources.folder import EXTENSIONS
from crosslevel.utils.errors import BadImage, SourceError

Ignored = Literal["difficult", "crowd"]


class Objects(NamedTuple):
    """The K annotated objects of one image.

    ``boxes`` are (x1, y1, x2, y2) in pixels, from the upper left corner of the image; ``labels`` are numbers of
    classes; ``ignored`` ones (VOC: difficult, COCO: a crowd) are no examples, and no mistakes where they are found.
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

    ``files`` and ``objects`` belong together; ``classes[c]`` names label c; ``ignored`` says what an ignored object
    is: "difficult" (VOC) or a "crowd" (COCO); ``sizes`` are (height, width) where an annotation says so. ``origin``
    are the annotations, the lists and the folders of images that all this was read from.
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

    def __len__(self) -> int:
        """The number of images, N."""
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], Objects]:
        """Image i and its objects.

        Raises:
            BadImage: the file cannot be decoded, or has another size than its annotation says.

        """
        image, size = read_image(self.files[i]), self.sizes[i]
        if tuple(image.shape[1:]) != size:
            found = "{2}x{1}".format(*image.shape)
            raise BadImage(self.files[i], f"its annotation says {size[1]}x{size[0]} pixels, the image has {found}")
        return image, self.objects[i]

    def names(self) -> set[str]:
        """The classes of which there is an object that is not ignored."""
        used = {int(label) for found in self.objects for label in found.usable.labels}
        return {self.classes[label] for label in used}

    def with_examples(self) -> Annotated:
        """Only the images that have an object that is not ignored: those that a detector is trained on.

        Raises:
            SourceError: there are none.

        """
        keep = [i for i, found in enumerate(self.objects) if not found.ignored.all()]
        if not keep:
            raise SourceError(f"{self.name}: not one of its {len(self)} images has an object that is not ignored")
        return self._replaced([self.files[i] for i in keep], [self.objects[i] for i in keep], self.classes, keep)

    def numbered_as(self, train: Annotated) -> Annotated:
        """The same images with the class numbers of ``train``.

        Raises:
            SourceError: there are objects of classes of which ``train`` has none; the message names them.

        """
        unknown = sorted(self.names() - train.names())
        if unknown:
            named = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
            raise SourceError(f"{self.name} has classes that {train.name} lacks: {named}")
        place = {name: c for c, name in enumerate(train.classes)}
        # A class without number has ignored objects only: there is nothing to find.
        number = torch.tensor([place.get(name, -1) for name in self.classes], dtype=torch.int64)
        objects = []
        for found in self.objects:
            labels = number[found.labels]
            objects.append(Objects(found.boxes[labels >= 0], labels[labels >= 0], found.ignored[labels >= 0]))
        return self._replaced(self.files, objects, train.classes, range(len(self)))

    def _replaced(self, files: list[str], objects: list[Objects], classes: list[str], keep: Sequence[int]) -> Annotated:
        sizes = [self.sizes[i] for i in keep]
        return Annotated(self.name, files, objects, classes, self.ignored, sizes, self.origin)


def annotated(source: str) -> Annotated:
    """The annotated images of ``source``.

    - Pascal VOC: ``VOCdevkit/VOC2007:trainval``, a folder with JPEGImages, Annotations and ImageSets/Main, and the
      name of a list there;
    - COCO: ``annotations/instances_val2017.json:val2017``, a file of instances and the folder of its images, which
      may be left out where the folders are named as in the official data set;
    - several of one kind, joined by ``+``: ``VOC2007:trainval+VOC2012:trainval``.

    Coordinates become zero-based: VOC's xmin and ymin count from 1 and its xmax and ymax include the last pixel, so
    the former are lowered by one, as usual. A box that reaches over the edge of its image by up to one pixel is
    clipped, by more is an error, as is one that ends before it begins. A box without any area, of which COCO has a
    few, is left out with a warning.

    Raises:
        SourceError: a file is missing or is not what it should be, an annotation points at a missing image, a box is
            impossible, or there is nothing in it; one line that names it and says what to do.

    """
    parts = [_part(text) for text in source.split("+")] if not os.path.exists(source) else [_part(source)]
    kinds = {part.ignored for part in parts}
    if len(kinds) > 1:
        raise SourceError(f"{source}: parts in the layouts of VOC and COCO cannot be joined by +")
    classes = list(dict.fromkeys(name for part in parts for name in part.classes))
    # VOC has no order of classes but the alphabet; COCO's is that of its categories.
    classes = classes if parts[0].ignored == "crowd" else sorted(classes)
    whole = Annotated(source, [], [], classes, parts[0].ignored, [])
    place = {name: c for c, name in enumerate(classes)}
    for part in parts:
        number = torch.tensor([place[name] for name in part.classes], dtype=torch.int64)
        whole.files += part.files
        whole.sizes += part.sizes
        whole.origin += part.origin
        whole.objects += [found._replace(labels=number[found.labels]) for found in part.objects]
    if not any(len(found.labels) for found in whole.objects):
        raise SourceError(f"{source}: not one object in its {len(whole)} images")
    return whole


def _part(text: str) -> Annotated:
    path, colon, rest = (text, "", "") if os.path.exists(text) else text.rpartition(":")
    if os.path.isfile(path) and path.lower().endswith(".json"):
        return _coco(Path(path), Path(rest) if colon else None)
    if os.path.isdir(path):
        return _voc(Path(path), rest, text)
    raise SourceError(
        f"{text}: there is no such folder or file: give a VOC folder and the name of a list, VOC2007:trainval, "
        "or COCO's instances and their images, instances_val2017.json:val2017"
    )


def _voc(root: Path, split: str, name: str) -> Annotated:
    lists = root / "ImageSets" / "Main"
    if not split:
        known = ", ".join(sorted(file.stem for file in lists.glob("*.txt"))[:8]) or "none"
        raise SourceError(f"{name}: the name of a list is missing, as {root}:trainval; there are: {known}")
    listed = [line.split()[0] for line in _text(lists / f"{split}.txt").splitlines() if line.strip()]
    if not listed:
        raise SourceError(f"{lists / split}.txt: an empty list: name one image a line, without .jpg")
    pictures = _names(root / "JPEGImages")
    classes: dict[str, int] = {}
    files, objects, sizes = [], [], []
    for key in listed:
        file = root / "Annotations" / f"{key}.xml"
        if not file.is_file():
            raise SourceError(f"{lists / split}.txt names {key}, but there is no {file}")
        tree = _xml(file)
        picture = _voc_picture(tree, key, pictures)
        if picture is None:
            wanted = tree.findtext("filename") or f"{key}.jpg"
            raise SourceError(f"{file}: its image {root / 'JPEGImages' / wanted} is missing: restore it or its name")
        files.append(str(root / "JPEGImages" / picture))
        sizes.append(_voc_size(tree) or _measured(files[-1]))
        rows = [_voc_object(item, i, classes, file) for i, item in enumerate(tree.iterfind("object"), 1)]
        objects.append(_objects(rows, sizes[-1], f"{file}, object"))
    origin = [str(lists / f"{split}.txt"), *(str(root / "Annotations" / f"{key}.xml") for key in listed)]
    origin.append(str(root / "JPEGImages"))
    return Annotated(name, files, objects, list(classes), "difficult", sizes, origin)


def _voc_picture(tree: ElementTree.Element, key: str, pictures: set[str]) -> str | None:
    """The image that an annotation names; that of the same name where it names none."""
    named = tree.findtext("filename", "").strip()
    if named:
        return named if named in pictures else None
    return next((f"{key}.{ending}" for ending in sorted(EXTENSIONS) if f"{key}.{ending}" in pictures), None)


def _voc_size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width); None where the annotation does not say, or says 0 as some programs write."""
    try:
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _measured(file: str) -> tuple[int, int]:
    """(height, width) of an image as it is read."""
    try:
        height, width = read_image(file).shape[1:]
    except BadImage as error:
        raise SourceError(f"{error}; its annotation gives no <size> either: restore the image") from error
    return height, width


def _voc_object(item: ElementTree.Element, number: int, classes: dict[str, int], file: Path) -> _Row:
    try:
        name = item.findtext("name", "").strip()
        corners = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = int(item.findtext("difficult") or 0) == 1
    except ValueError as error:
        raise SourceError(f"{file}: an object without a complete <bndbox> of numbers: correct it") from error
    if not name:
        raise SourceError(f"{file}: an object without <name>: give its class")
    x1, y1, x2, y2 = corners
    return _Row((x1 - 1, y1 - 1, x2, y2), classes.setdefault(name, len(classes)), difficult, number)


def _coco(file: Path, images: Path | None) -> Annotated:
    content = _json(file)
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise SourceError(f"{file}: no list of {missing[0]}: give a COCO file of instances")
    folder = images or _coco_folder(file, content["images"])
    if not content["images"]:
        raise SourceError(f"{file}: an empty set: it lists no images")
    try:
        return _coco_rows(file, folder, content)
    except SourceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{file}: an entry lacks what COCO files have ({error!r})") from error


def _coco_rows(file: Path, folder: Path, content: dict[str, Any]) -> Annotated:
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    place = {entry["id"]: c for c, entry in enumerate(categories)}
    pictures = _names(folder)
    entries = {entry["id"]: entry for entry in content["images"]}
    rows: dict[Any, list[_Row]] = {key: [] for key in entries}
    for entry in content["annotations"]:
        key = entry["image_id"]
        if key not in entries or entry["category_id"] not in place:
            lost = f"image {key}" if key not in entries else f"category {entry['category_id']}"
            raise SourceError(f"{file}: annotation {entry['id']} points at {lost}, which the file does not list")
        x, y, width, height = entry["bbox"]
        corners = (x, y, x + width, y + height)
        rows[key].append(_Row(corners, place[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry["id"]))
    files, objects, sizes = [], [], []
    for key, entry in entries.items():
        if entry["file_name"] not in pictures and not (folder / entry["file_name"]).is_file():
            raise SourceError(
                f"{file}: its image {folder / entry['file_name']} is missing: restore it, or name its folder"
            )
        files.append(str(folder / entry["file_name"]))
        sizes.append((int(entry["height"]), int(entry["width"])))
        objects.append(_objects(rows[key], sizes[-1], f"{file}, annotation"))
    names = [str(entry["name"]) for entry in categories]
    origin = [str(file), *sorted({os.path.dirname(picture) for picture in files})]
    return Annotated(f"{file}:{folder}", files, objects, names, "crowd", sizes, origin)


def _coco_folder(file: Path, images: list[dict[str, Any]]) -> Path:
    """Where the images are in the official layout, or beside the file."""
    split = file.stem.removeprefix("instances_")
    places = [file.parent.parent / split, file.parent / split, file.parent, file.parent / "images"]
    first = str(images[0].get("file_name", "")) if images else ""
    return next((place for place in places if (place / first).is_file()), places[0])


class _Row(NamedTuple):
    corners: tuple[float, float, float, float]
    label: int
    ignored: bool
    number: object  # what its file calls it


def _objects(rows: list[_Row], size: tuple[int, int], where: str) -> Objects:
    """Checked rows as tensors; ``where`` begins the message about a bad one."""
    checked = [(_clipped(row, size, f"{where} {row.number}"), row) for row in rows]
    kept = [(box, row.label, row.ignored) for box, row in checked if box is not None]
    boxes = torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in kept], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([ignored for _, _, ignored in kept], dtype=torch.bool))


def _clipped(row: _Row, size: tuple[int, int], where: str) -> tuple[float, float, float, float] | None:
    """The box within its image of (height, width) ``size``; None if it has no area."""
    (x1, y1, x2, y2), (height, width) = row.corners, size
    box = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not (x2 >= x1 and y2 >= y1):
        raise SourceError(f"{where}: {box} ends before it begins: correct or remove it")
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        raise SourceError(f"{where}: {box} lies outside its image of {width}x{height} pixels: correct or remove it")
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x2 > x1 and y2 > y1:
        return x1, y1, x2, y2
    warnings.warn(f"{where}: {box} has no area and is left out", stacklevel=2)
    return None


def _names(folder: Path) -> set[str]:
    """The files of ``folder``: one listing is faster than a question for each of 100,000 images."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise SourceError(f"{folder}: {error.strerror or error}: the images are expected there") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(other.stem for other in file.parent.glob(f"*{file.suffix}"))[:8]) or "none"
        raise SourceError(f"{file}: {getattr(error, 'strerror', None) or error}; there are: {known}") from error


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise SourceError(f"{file}: not an annotation in XML ({error})") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: no list of images: give a COCO file of instances")
    return content
