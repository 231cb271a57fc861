"""The layout of YOLO: a YAML file that names lists or folders of images, and a text file of boxes beside each image.

As Ultralytics documents it: ``images/train/a.jpg`` has its objects in ``labels/train/a.txt``, one a line: the number of
the class, then the centre, width and height of the box as shares of the image's (or a polygon, whose box is taken). An
image without such a file has no objects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from crosslevel.data.decode import read_image
from crosslevel.data.decoding.formats import EXTENSIONS, PILLOW
from crosslevel.data.sources.annotated.annotations import Annotated, Row, objects_of
from crosslevel.utils.errors import BadImage, SourceError

ENDINGS = (".yaml", ".yml")
_TURNED = (5, 6, 7, 8)  # orientations of EXIF that exchange the sides
_ORIENTATION = 0x0112


def open_yolo(file: Path, split: str) -> Annotated:
    """The images of one split, such as train or val, of a YOLO data set.

    Raises:
        SourceError: as from `annotated`.

    """
    content = _content(file)
    if not content.get(split):
        available = ", ".join(name for name in ("train", "val", "test") if content.get(name)) or "none"
        raise SourceError(f"{file}: the name of a split is missing, as {file}:train; there are: {available}")
    classes = _classes(file, content)
    root = Path(os.path.join(file.parent, str(content.get("path") or "")))
    folders = content[split] if isinstance(content[split], list) else [content[split]]
    pictures = [picture for folder in folders for picture in _pictures(file, root, str(folder))]
    if not pictures:
        raise SourceError(f"{file}: {split} has no images in {', '.join(map(str, folders))}: correct path or {split}")
    files, objects, sizes, origin = [], [], [], [str(file)]
    for picture in pictures:
        labels = _labels_of(picture)
        sizes.append(_size(picture))
        rows = _rows(labels, len(classes), sizes[-1]) if labels.is_file() else []
        objects.append(objects_of(rows, sizes[-1], f"{labels}, line"))
        files.append(str(picture))
        origin += [str(labels)] if rows else []
    return Annotated(f"{file}:{split}", files, objects, classes, "crowd", sizes, origin)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SourceError(f"{file}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or "names" not in content:
        raise SourceError(f"{file}: it has no names of classes: give the YAML file of a YOLO data set")
    return content


def _classes(file: Path, content: dict[str, Any]) -> list[str]:
    """Names by number: a list, or a dictionary from 0 on."""
    names = content["names"]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise SourceError(f"{file}: names must number the classes from 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise SourceError(f"{file}: names is no list of classes")
    return [str(name) for name in names]


def _pictures(file: Path, root: Path, entry: str) -> list[Path]:
    """The images of a folder and its sub-folders, or those that a .txt file lists."""
    path = root / entry
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix[1:].lower() in EXTENSIONS and not p.name.startswith("."))
    if not (path.is_file() and path.suffix == ".txt"):
        raise SourceError(f"{file}: there is no folder or list {path}: correct path, or the split")
    listed = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    pictures = [path.parent / line if line.startswith("./") else root / line for line in listed]
    missing = next((picture for picture in pictures if not picture.is_file()), None)
    if missing is not None:
        raise SourceError(f"{path} names {missing}, which is not there")
    return pictures


def _labels_of(picture: Path) -> Path:
    """Replace the last folder ``images`` of a path by ``labels``."""
    segments = list(picture.parent.parts)
    matches = [i for i, part in enumerate(segments) if part == "images"]
    if matches:
        segments[matches[-1]] = "labels"
    return Path(*segments, f"{picture.stem}.txt")


def _rows(labels: Path, classes: int, size: tuple[int, int]) -> list[Row]:
    rows, (height, width) = [], size
    for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = [float(cell) for cell in line.split()]
        except ValueError as error:
            raise SourceError(f"{labels}, line {number}: not numbers: correct it") from error
        if not (label.is_integer() and 0 <= label < classes):
            raise SourceError(f"{labels}, line {number}: class {label:g} of {classes}: correct it, or names")
        if len(values) == 4:
            x, y, w, h = values
            corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        elif len(values) >= 6 and len(values) % 2 == 0:
            across, down = values[::2], values[1::2]
            corners = (min(across) * width, min(down) * height, max(across) * width, max(down) * height)
        else:
            raise SourceError(f"{labels}, line {number}: {len(values)} numbers after the class: a box has 4")
        rows.append(Row(corners, int(label), False, number))
    return rows


def _size(picture: Path) -> tuple[int, int]:
    """(height, width) of the decoded, upright image."""
    try:
        with Image.open(picture, formats=PILLOW) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION) in _TURNED else (height, width)
    except Exception:  # a damaged file, or a format unknown to Pillow
        try:
            height, width = read_image(str(picture)).shape[1:]
        except BadImage as error:
            raise SourceError(f"{error}: restore the image, or take it out of the data set") from error
        return height, width
