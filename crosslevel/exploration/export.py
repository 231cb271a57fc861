"""The page of a collection in a folder: it needs no server and no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from crosslevel.exploration.collection import Collection
from crosslevel.exploration.server import PAGE, PARTS
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import write

PICTURE, A_FOLDER = 96, 1000  # pixels of a picture at most; pictures in a folder


def export_page(
    collection: Collection, folder: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Write the page, its data and its pictures into a folder, and return the page.

    Raises:
        UserError: something else is in the folder.

    """
    output_dir = Path(folder)
    if (
        output_dir.exists()
        and (not output_dir.is_dir() or any(output_dir.iterdir()))
        and not (output_dir / "data.js").is_file()
    ):
        raise UserError(f"--export {folder}: it is there already, and is no page of explore: give another folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir / "images", ignore_errors=True)
    for point, row in enumerate(collection.rows.tolist()):
        picture = collection.pictures.jpeg(row, PICTURE)
        if picture is not None:
            file = output_dir / "images" / str(point // A_FOLDER) / f"{point}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture)
        if point % 100 == 0:
            progress(point, len(collection.rows))
    write(output_dir / "data.js", f"const DATA = {collection.data(served=False)};\n")
    for name in PARTS:
        write(output_dir / name, PAGE.with_name(name).read_bytes())
    write(output_dir / "index.html", PAGE.read_bytes())
    return output_dir / "index.html"
