"""The layout of COCO: one JSON file of instances, and a folder of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from crosslevel.data.sources.annotated.annotations import Annotated, Row, file_names, objects_of
from crosslevel.utils.errors import SourceError
from crosslevel.utils.trees import json_tree


def open_coco(file: Path, images: Path | None) -> Annotated:
    """The images of a file of instances, in the folder ``images`` or where the official layout has them.

    Raises:
        SourceError: as from `annotated`.

    """
    content = _json(file)
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise SourceError(f"{file}: no list of {missing[0]}: give a COCO file of instances")
    folder = images or _folder(file, content["images"])
    if not content["images"]:
        raise SourceError(f"{file}: an empty set: it lists no images")
    try:
        return _rows(file, folder, content)
    except SourceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{file}: an entry lacks what COCO files have ({error!r})") from error


def _rows(file: Path, folder: Path, content: dict[str, Any]) -> Annotated:
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    number_of = {entry["id"]: c for c, entry in enumerate(categories)}
    pictures = file_names(folder)
    entries = {entry["id"]: entry for entry in content["images"]}
    rows: dict[Any, list[Row]] = {key: [] for key in entries}
    for entry in content["annotations"]:
        key = entry["image_id"]
        if key not in entries or entry["category_id"] not in number_of:
            lost = f"image {key}" if key not in entries else f"category {entry['category_id']}"
            raise SourceError(f"{file}: annotation {entry['id']} points at {lost}, which the file does not list")
        x, y, width, height = entry["bbox"]
        corners = (x, y, x + width, y + height)
        rows[key].append(Row(corners, number_of[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry["id"]))
    files, objects, sizes = [], [], []
    for key, entry in entries.items():
        if entry["file_name"] not in pictures and not (folder / entry["file_name"]).is_file():
            raise SourceError(
                f"{file}: its image {folder / entry['file_name']} is missing: restore it, or name its folder"
            )
        files.append(str(folder / entry["file_name"]))
        sizes.append((int(entry["height"]), int(entry["width"])))
        objects.append(objects_of(rows[key], sizes[-1], f"{file}, annotation"))
    names = [str(entry["name"]) for entry in categories]
    origin = [str(file), *sorted({os.path.dirname(picture) for picture in files})]
    return Annotated(f"{file}:{folder}", files, objects, names, "crowd", sizes, origin)


def _folder(file: Path, images: list[dict[str, Any]]) -> Path:
    """The folder of images, as in the official layout, or beside the file."""
    split = file.stem.removeprefix("instances_")
    folders = [file.parent.parent / split, file.parent / split, file.parent, file.parent / "images"]
    first = str(images[0].get("file_name", "")) if images else ""
    return next((folder for folder in folders if (folder / first).is_file()), folders[0])


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json_tree(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file}: no list of images: give a COCO file of instances")
    return content
