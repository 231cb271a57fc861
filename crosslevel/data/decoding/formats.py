"""Formats of images, recognized by content; a file's extension only decides which files need not be opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from crosslevel.data.bad_files import _Defect

EXTENSIONS = frozenset(
    (
        "apng", "avif", "avifs", "bmp", "dcm", "dib", "dicom", "gif", "heic", "heif", "hif", "j2c", "j2k", "jfif",
        "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "jxl", "pbm", "pgm", "pjp", "pjpeg", "png", "pnm", "ppm",
        "qoi", "tif", "tiff", "webp",
    )
)  # fmt: skip
"""Extensions of images: a file with one counts as an image until it is decoded."""

OTHERS = frozenset(
    (
        # text, tables, code
        "txt", "md", "rst", "csv", "tsv", "json", "jsonl", "ndjson", "xml", "html", "htm", "yaml", "yml", "toml", "ini",
        "cfg", "log", "py", "ipynb", "sh", "js", "css", "sql", "tex", "srt", "vtt", "cls", "cls2", "lst", "svg",
        # data, archives, programs
        "db", "sqlite", "sqlite3", "npy", "npz", "pt", "pth", "ckpt", "pkl", "pickle", "safetensors", "h5", "hdf5",
        "mat", "arrow", "parquet", "feather", "idx", "tar", "tgz", "gz", "bz2", "xz", "zst", "zip", "7z",
        "rar", "exe", "dll", "so", "pdf", "doc", "docx", "xls", "xlsx", "ppt", "pptx", "lnk", "xmp", "aae",
        # sound and videos
        "mp3", "wav", "flac", "ogg", "m4a", "3gp", "avi", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts",
        "ogv", "webm", "wmv",
        # files that begin like TIFF, but hold raw sensor values and a small preview; files that need their own program
        "3fr", "arw", "cr2", "cr3", "dng", "nef", "nrw", "orf", "pef", "raf", "rw2", "srw", "psd", "psb", "ai", "eps",
        "ico",  # pictures of programs
    )
)  # fmt: skip
"""Extensions of files that are never images: they are not opened."""

ARRAYS = frozenset(("npy",))
"""Those of `OTHERS` that count as images when the user has set how their values are read."""

SEVERAL = frozenset(
    ("apng", "avif", "avifs", "dcm", "dicom", "gif", "heic", "heif", "hif", "jxl", "png", "tif", "tiff", "webp")
)
"""Extensions of files that may hold several frames or pages."""

PILLOW = (
    "JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000", "QOI",
)  # fmt: skip
"""Formats that Pillow reads. Only pictures: it would otherwise also hand files to Ghostscript and the like."""

HEAD = 132
"""Bytes at the beginning of a file that identify its format."""

EXTRA: Mapping[str, tuple[str, str]] = {"HEIF": ("pillow_heif", "heic"), "JXL": ("pillow_jxl", "jxl")}
"""Formats that another package reads: its module, and Crosslevel's extra that installs it."""

_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"), "HEIF"
)
_STARTS = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"), (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"), (b"\xff\x0a", "JXL"), (b"qoif", "QOI"), (b"\x93NUMPY", "NPY"),
)  # fmt: skip


def format_of(head: bytes | bytearray) -> str | None:
    """The image format of a file that begins with ``head``, as Pillow names it; None if it is no image.

    If the first bytes of a format also occur in other files, more bytes are checked.
    """
    head = bytes(head)
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # An AVIF file may have a general major brand, and its own among the compatible brands.
        brand = b"avif" if b"avif" in head[16:] and head[8:12] in (b"mif1", b"msf1") else head[8:12]
        return _BRANDS.get(brand)
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in (12, 40, 108, 124):
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in (b"\n", b" ", b"\r", b"\t") and len(head) > 8:
        return "PPM" if head[3:4].isdigit() or head[3:4] == b"#" else None
    return "DICOM" if head[128:132] == b"DICM" else None


def can_be_image(name: str, arrays: bool = False) -> bool | None:
    """Whether a file's extension is an image's; None if it says nothing. ``arrays``: arrays count as images."""
    extension = ending_of(name)
    if arrays and extension in ARRAYS:
        return True
    if name.rpartition("/")[2] == "DICOMDIR":  # a list of others
        return False
    return True if extension in EXTENSIONS else False if extension in OTHERS else None


def ending_of(name: str) -> str:
    """The extension in lower case without its dot; empty if there is none."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def is_image_file(file: str) -> bool:
    """Whether a regular file begins like an image; arrays do not count."""
    try:
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(number).st_mode) and format_of(os.read(number, HEAD)) not in (None, "NPY")
    except OSError:
        return False
    finally:
        os.close(number)


def left_alone(counts: Mapping[str, int]) -> str:
    """``left alone: 3 .txt, 1 .db``, the most frequent first; empty if no file was left out."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    entries = [
        f"{count:,} .{extension}" if extension else f"{count:,} without an ending" for extension, count in ranked[:8]
    ]
    remaining = sum(count for _, count in ranked[8:])
    return f"left alone: {', '.join([*entries, *([f'{remaining:,} others'] if remaining else [])])}" if entries else ""


def readable(data: bytes | bytearray) -> tuple[str, ...]:
    """The formats to try on an image.

    Raises:
        _Defect: the package for its format is missing; the message says what to install.

    """
    name = format_of(data[:HEAD])
    if name is None or name not in EXTRA:
        return PILLOW
    module, extra = EXTRA[name]
    if not has_plugin(module):
        raise _Defect(f"a {extra.upper()} image: pip install 'crosslevel[{extra}]'")
    return (name,)


@cache
def has_plugin(module: str) -> bool:
    """Whether an installed package adds a format to Pillow; cached, and ``cache_clear`` looks for it again."""
    try:
        plugin = import_module(module)
    except ImportError:
        return False
    register = getattr(plugin, "register_heif_opener", None)  # the other one registers itself
    if register is not None:
        register()
    return True
