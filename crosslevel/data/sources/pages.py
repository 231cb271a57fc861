"""Files of several frames or pages, each of which is an image: animations as tracks, and pages of TIFF."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.decode import count_pages, read_image
from crosslevel.data.decoding.formats import EXTENSIONS, SEVERAL, ending_of
from crosslevel.data.images import Images
from crosslevel.data.index_cache import Names
from crosslevel.data.sources.folder import Files


class Pages(Images):
    """Every frame and page of image files, decoded on demand.

    ``paths[i]`` is ``a.gif#3`` for the third frame; a file of one image keeps its name. ``tracks`` numbers the files.
    The pages are counted here once: files that may have several are opened, and their headers are read.
    """

    paths: _PageNames

    def __init__(self, files: Files) -> None:
        self.files = files
        self.name, self.classes, self.watch, self.left_out = files.name, files.classes, files.watch, files.left_out
        counts = [count_pages(os.path.join(files.root, path)) if _may(path) else 1 for path in files.paths]
        self.paths = _PageNames(files.paths, counts)
        self.tracks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.labels = None if files.labels is None else files.labels[self.tracks]
        self.reading = files.reading

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Page i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the file cannot be opened, or the page cannot be decoded.

        """
        i = range(len(self))[i]
        number, page = self.paths.locate(i)
        path = os.path.join(self.files.root, self.files.paths[number])
        image = read_image(path, self.paths[i], self.files.max_pixels, self.reading, page)
        return image, -1 if self.labels is None else int(self.labels[i])

    def content(self) -> Iterable[bytes | memoryview]:
        """Bytes that identify the files, and the number of pages of each."""
        yield from self.files.content()
        yield self.paths.ends.numpy().tobytes()


def _may(path: str) -> bool:
    extension = ending_of(path)
    return extension in SEVERAL or extension not in EXTENSIONS


class _PageNames(Names):
    """The files' names, with the number of the page."""

    def __init__(self, files: Sequence[str], counts: Sequence[int]) -> None:
        self.files, self.ends = files, torch.tensor(list(accumulate(counts)))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, i: int) -> tuple[int, int]:
        """The file of page i, and the number of that page in the file."""
        number = int(torch.searchsorted(self.ends, i, right=True))
        return number, i - (int(self.ends[number - 1]) if number else 0)

    def name(self, i: int) -> str:
        """The name of page i."""
        number, page = self.locate(i)
        several = int(self.ends[number]) - (int(self.ends[number - 1]) if number else 0) > 1
        return f"{self.files[number]}#{page + 1}" if several else self.files[number]
