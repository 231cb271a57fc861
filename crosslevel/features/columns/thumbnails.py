"""Small pictures of images: written into a table, and read for a page."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from crosslevel.data.decode import decode, read_image
from crosslevel.data.decoding.reading import USUAL, Reading
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.uri import Source, parse
from crosslevel.features.table import IMAGE, FeatureTable
from crosslevel.utils.errors import BadImage, SourceError, UserError
from crosslevel.utils.tensors import as_rgb

KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The type of images in Parquet files of the Hugging Face hub, so that the same programs read it."""

SMALLEST, LARGEST = 16, 1024
SMALL = 65_536  # the most bytes of a picture that is passed on unchanged


def check(size: int | None) -> None:
    """Refuse an invalid size of thumbnails.

    Raises:
        UserError: it is out of range.

    """
    if size is not None and not SMALLEST <= size <= LARGEST:
        raise UserError(f"thumbnails={size}: give {SMALLEST} to {LARGEST} pixels")


def encoded(picture: UInt8[Tensor, "C H W"], size: int) -> bytes:
    """A picture as JPEG, its longer side at most ``size`` pixels."""
    image = Image.fromarray(as_rgb(picture).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=85)
    return file.getvalue()


def column(images: Images, indices: Sequence[int], size: int, workers: int | None = None) -> pa.Array:
    """The thumbnails of these images, as a column of `KIND`.

    Args:
        images: the source.
        indices: the images' indices in it.
        size: pixels of the longer side.
        workers: threads that decode; as many as PyTorch has unless given.

    """
    with ThreadPoolExecutor(max(1, workers or torch.get_num_threads())) as pool:
        encoded_images = pool.map(lambda i: encoded(images[i][0], size), indices)
        return pa.array([{"bytes": data, "path": None} for data in encoded_images], KIND)


class Pictures:
    """The picture of each row of a table: its thumbnail, or the image itself, if that still exists.

    Args:
        table: the table.
        images: the source of its images, if they have moved since it was written.
        data_root: folder with the official files of cifar10, cifar100 and stl10.

    """

    def __init__(self, table: FeatureTable, images: Source | None = None, data_root: str | None = None) -> None:
        self.table = table
        folder = None if images is None or not os.path.isdir(images.text) else images.text
        self.root: str | None = folder or table.metadata.get("root")
        self._moved, self._data_root = images, data_root

    @property
    def has_thumbnails(self) -> bool:
        """Whether the table itself has pictures."""
        return IMAGE in self.table.names

    def file(self, row: int) -> str | None:
        """The file of a row's image; None if the image lies inside another file, or cannot be found."""
        path = os.path.join(self.root or "", self.table.paths[row])
        return path if os.path.isfile(path) else None

    def jpeg(self, row: int, size: int) -> bytes | None:
        """A row's picture as JPEG, of at most ``size`` pixels unless it is a thumbnail; None if there is none."""
        data = self._thumbnail(row) if self.has_thumbnails else None
        if data is not None and len(data) < SMALL and data.startswith(b"\xff\xd8\xff"):
            return bytes(data)
        picture = self[row]
        return None if picture is None else encoded(picture, size)

    def __getitem__(self, row: int) -> UInt8[Tensor, "3 H W"] | None:
        """A row's picture; None if it cannot be found or read."""
        try:
            if self.has_thumbnails:
                data = self._thumbnail(row)
                return None if data is None else decode(bytearray(data), self.table.paths[row])
            if (file := self.file(row)) is not None:
                return as_rgb(read_image(file, reading=self._reading))
            index = self._indices.get(self.table.paths[row])
            return None if index is None or self._source is None else as_rgb(self._source[index][0])
        except BadImage:
            return None

    @cached_property
    def _reading(self) -> Reading:
        """The reading settings of the table's images."""
        try:
            return parse(str(self.table.metadata.get("images") or "images")).reading
        except SourceError:
            return USUAL

    def _thumbnail(self, row: int) -> bytes | None:
        for first, group in zip(reversed(self._begins), reversed(range(len(self._begins))), strict=True):
            if row >= first:
                thumbnail: Any = self._group(group)[row - first].as_py()
                return None if thumbnail is None else thumbnail["bytes"]
        return None

    def _group(self, group: int) -> pa.Array:
        if getattr(self, "_row_group", (None, None))[0] != group:
            with pq.ParquetFile(self.table.file) as opened:
                read = opened.read_row_group(group, columns=[IMAGE])[IMAGE].combine_chunks()
            self._row_group = (group, read)
        return self._row_group[1]

    @cached_property
    def _begins(self) -> list[int]:
        """The first row of each of the file's row groups."""
        metadata = pq.read_metadata(self.table.file)
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return [0, *np.cumsum(counts)[:-1].tolist()]

    @cached_property
    def _source(self) -> Images | None:
        """The table's source, for images that are no files."""
        source = self._moved or self.table.metadata.get("images")
        # A table may come from anybody: the paths in it are read from this machine only.
        if source is None or (isinstance(source, str) and "://" in source):
            return None
        try:
            return open_images(source, data_root=self._data_root)
        except (SourceError, OSError):
            if self._moved is not None:
                raise
            return None

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {} if self._source is None else {path: i for i, path in enumerate(self._source.paths)}


def of_file(file: str | Path) -> UInt8[Tensor, "3 H W"]:
    """The picture in a file.

    Raises:
        UserError: it is no image.

    """
    try:
        return read_image(os.fspath(file))
    except BadImage as error:
        raise UserError(f"{file} is no image that can be read: {error.reason}") from error
