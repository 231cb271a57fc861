"""Tracks of images that were taken together: ``photos/@bursts``, ``photos/@bursts=duplicates.csv``."""

from __future__ import annotations

import posixpath

import torch

from crosslevel.data.duplicates.sets import rows_of
from crosslevel.data.images import Images, ImageView
from crosslevel.utils.errors import SourceError


def bursts(images: Images, file: str = "") -> Images:
    """The same images, with a track for each burst.

    Args:
        images: a source.
        file: a ``duplicates.csv`` of `crosslevel inspect`: each of its sets is a track, and every other image one of
            its own. Unless given, the images of one folder are a track.

    Raises:
        SourceError: the file cannot be read, or names none of the images; all images are alone.

    """
    names = _sets(images, file) if file else [posixpath.dirname(path) for path in images.paths]
    numbers: dict[object, int] = {}
    view = ImageView(images)
    view.tracks = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])
    if len(numbers) == len(images):
        raise SourceError(f"{file or images.name}: no two images are together: there is no burst")
    return view


def _sets(images: Images, file: str) -> list[object]:
    """The set of each image, or its own path if it is in none."""
    set_of = {path: number for number, path in rows_of(file, "set")}
    if not set_of.keys() & set(images.paths):
        raise SourceError(f"{file}: names no image of {images.name}; its own are named like {images.paths[0]}")
    return [(set_of[path],) if path in set_of else path for path in images.paths]
