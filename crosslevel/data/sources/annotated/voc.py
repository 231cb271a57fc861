"""The layout of Pascal VOC: a folder with JPEGImages, Annotations (XML), and lists in ImageSets/Main."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from crosslevel.data.decode import read_image
from crosslevel.data.decoding.formats import EXTENSIONS
from crosslevel.data.sources.annotated.annotations import Annotated, Row, file_names, objects_of
from crosslevel.utils.errors import BadImage, SourceError


def open_voc(root: Path, split: str, name: str) -> Annotated:
    """The images that the list ``split`` of a VOC folder names.

    Raises:
        SourceError: as from `annotated`.

    """
    lists = root / "ImageSets" / "Main"
    if not split:
        names = ", ".join(sorted(file.stem for file in lists.glob("*.txt"))[:8]) or "none"
        raise SourceError(f"{name}: the name of a list is missing, as {root}:trainval; there are: {names}")
    listed = [line.split()[0] for line in _text(lists / f"{split}.txt").splitlines() if line.strip()]
    if not listed:
        raise SourceError(f"{lists / split}.txt: an empty list: name one image a line, without .jpg")
    pictures = file_names(root / "JPEGImages")
    classes: dict[str, int] = {}
    files, objects, sizes = [], [], []
    for key in listed:
        file = root / "Annotations" / f"{key}.xml"
        if not file.is_file():
            raise SourceError(f"{lists / split}.txt names {key}, but there is no {file}")
        tree = _xml(file)
        picture = _picture(tree, key, pictures)
        if picture is None:
            filename = tree.findtext("filename") or f"{key}.jpg"
            raise SourceError(f"{file}: its image {root / 'JPEGImages' / filename} is missing: restore it or its name")
        files.append(str(root / "JPEGImages" / picture))
        sizes.append(_size(tree) or _measured(files[-1]))
        rows = [_object(item, i, classes, file) for i, item in enumerate(tree.iterfind("object"), 1)]
        objects.append(objects_of(rows, sizes[-1], f"{file}, object"))
    origin = [str(lists / f"{split}.txt"), *(str(root / "Annotations" / f"{key}.xml") for key in listed)]
    origin.append(str(root / "JPEGImages"))
    return Annotated(name, files, objects, list(classes), "difficult", sizes, origin)


def _picture(tree: ElementTree.Element, key: str, pictures: set[str]) -> str | None:
    """The image that an annotation names; if it names none, the image with the annotation's own name."""
    filename = tree.findtext("filename", "").strip()
    if filename:
        return filename if filename in pictures else None
    return next((f"{key}.{extension}" for extension in sorted(EXTENSIONS) if f"{key}.{extension}" in pictures), None)


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width); None if the annotation has no size, or 0, which some programs write."""
    try:
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _measured(file: str) -> tuple[int, int]:
    """(height, width) of an image after decoding."""
    try:
        height, width = read_image(file).shape[1:]
    except BadImage as error:
        raise SourceError(f"{error}; its annotation gives no <size> either: restore the image") from error
    return height, width


def _object(item: ElementTree.Element, number: int, classes: dict[str, int], file: Path) -> Row:
    try:
        name = item.findtext("name", "").strip()
        corners = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = int(item.findtext("difficult") or 0) == 1
    except ValueError as error:
        raise SourceError(f"{file}: an object without a complete <bndbox> of numbers: correct it") from error
    if not name:
        raise SourceError(f"{file}: an object without <name>: give its class")
    x1, y1, x2, y2 = corners
    return Row((x1 - 1, y1 - 1, x2, y2), classes.setdefault(name, len(classes)), difficult, number)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(sibling.stem for sibling in file.parent.glob(f"*{file.suffix}"))[:8]) or "none"
        raise SourceError(f"{file}: {getattr(error, 'strerror', None) or error}; there are: {names}") from error


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise SourceError(f"{file}: not an annotation in XML ({error})") from error
