"""Data sets of the Hugging Face hub, or saved by its ``datasets`` library, as images."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT, decode, read_image
from crosslevel.data.decoding.formats import EXTENSIONS
from crosslevel.data.images import Images
from crosslevel.data.sources.labels import RowNames, known_labels
from crosslevel.data.uri import Source
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError

_SAVED = ("dataset_dict.json", "state.json")  # the files that save_to_disk writes


class Hub(Images):
    """The images of a data set that the ``datasets`` library loads: downloaded once, then read from disk.

    ``address`` is ``hf://owner/name[/config][@revision][:split]``, or ``hf:///folder[:split]`` for a folder that
    ``save_to_disk`` wrote or that holds a data set's files. Images are read encoded and decoded by `decode`, so
    that damage is noticed. ``paths[i]`` is ``split/row``.

    Args:
        address: the data set's address. Without a split, ``train`` or the only split is read.
        column: the image column; the only one of type Image unless given.
        label: the label column; ``label`` or ``labels``, or the only one of type ClassLabel, unless given.
        max_pixels: an image with more pixels is bad.

    Raises:
        SourceError: the library is missing, the data set cannot be loaded, or it has no such column.

    """

    def __init__(
        self, address: Source, *, column: str | None = None, label: str | None = None, max_pixels: int = PIXEL_LIMIT
    ) -> None:
        source = address.head
        self.name, self.max_pixels = source, max_pixels
        library = _library(source)
        rows, split = _loaded(library, address)
        features = rows.features
        images = [key for key, feature in features.items() if isinstance(feature, library.Image)]
        self.column = _column(source, "column", column, images, list(features), ("image",))
        if self.column is None:
            raise SourceError(f"{source}: no column of images among {', '.join(features)}: name it: column=NAME")
        class_columns = [key for key, feature in features.items() if isinstance(feature, library.ClassLabel)]
        default_names = ("label", "labels")
        numbers = [key for key in features if str(getattr(features[key], "dtype", "")).startswith(("int", "uint"))]
        self.label = _column(
            source,
            "label",
            label,
            class_columns or list(set(numbers) & set(default_names)),
            list(features),
            default_names,
        )
        if self.label is not None and self.label not in numbers:
            raise SourceError(f"{source}: label={self.label} is {features[self.label]}: it needs whole numbers")
        self.watch = _watch(address, rows)
        self._fingerprint = f"{rows._fingerprint} {self.column} {self.label}"
        try:  # columns of plain bytes or of paths can be cast too
            self._rows = rows.select_columns([self.column]).cast_column(self.column, library.Image(decode=False))
        except Exception as error:
            raise SourceError(f"{source}: column={self.column} holds no images: {_reason(error)}") from error
        self.paths = RowNames([split], [len(rows)])
        if len(rows) < 2:
            raise SourceError(f"{source}: needs at least 2 images, has {len(rows)}")
        if self.label is not None:
            read = rows.select_columns([self.label]).with_format("numpy")[:][self.label]
            classes = getattr(features[self.label], "names", None)
            self.labels, self.classes = known_labels(torch.from_numpy(np.asarray(read, np.int64)), classes, source)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: the image cannot be read or decoded.

        """
        path = self.paths[i]  # an IndexError ends loops over all images
        try:
            cell = self._rows[i % len(self)][self.column]
        except Exception as error:  # a damaged file of the library loses its own rows at most
            raise BadImage(path, f"the row cannot be read: {_reason(error)}") from error
        label = -1 if self.labels is None else int(self.labels[i])
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise BadImage(path, "no image in this row")
        if cell["bytes"] is None:
            return read_image(cell["path"], path, self.max_pixels, self.reading), label
        return decode(bytearray(cell["bytes"]), path, self.max_pixels, self.reading), label

    def content(self) -> Iterable[bytes | memoryview]:
        """The library's fingerprint of the rows, and the name of the column."""
        yield self._fingerprint.encode(errors="surrogateescape")


def _library(source: str) -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise SourceError(f"{source}: needs the datasets library: pip install 'crosslevel[hub]'") from error


def _loaded(library: ModuleType, source: Source) -> tuple[Any, str]:
    """The rows, and the name of their split."""
    path, split = source.path, source.split
    owner, _, config = path.rpartition("/") if path.count("/") == 2 and not _is_local(source) else (path, "", None)
    try:
        if any(os.path.isfile(os.path.join(path, file)) for file in _SAVED):
            loaded = library.load_from_disk(path)
        else:
            loaded = library.load_dataset(owner, config, revision=source.revision, split=split)
    except Exception as error:
        # The library and its network client raise errors of many kinds.
        raise SourceError(f"{source.head}: {_reason(error)}") from error
    if not isinstance(loaded, Mapping):
        return loaded, split or str(loaded.split or "train")
    split = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise SourceError(f"{source.head}: no split {split!r}: use :{' or :'.join(loaded)}")
    return loaded[split], split


def _watch(source: Source, rows: Any) -> Watch | None:
    """The files to watch: those of a local data set, or the library's copy of one from the hub.

    The library keeps a folder for each revision that was loaded on this machine. A new folder there is a change, unless
    the address names a revision. The hub itself is not asked for newer revisions.
    """
    cached = [entry["filename"] for entry in rows.cache_files]
    if _is_local(source):
        saved = cached and any(os.path.isfile(os.path.join(source.path, file)) for file in _SAVED)
        return Watch.of_files(list(_below(os.path.dirname(cached[0]) if saved else source.path)))
    if not cached:
        return None
    return Watch.of_files(cached, None if source.revision else os.path.dirname(os.path.dirname(cached[0])))


def _is_local(source: Source) -> bool:
    return source.path.startswith("/")


def _below(folder: str) -> Iterator[str]:
    """A folder, its sub-folders, and all files in it that are not single images."""
    for path, _, names in os.walk(folder):
        yield path
        for name in names:
            if name.rpartition(".")[2].lower() not in EXTENSIONS:
                yield os.path.join(path, name)


def _reason(error: Exception) -> str:
    """One line; it begins with the advice if the hub could not be reached."""
    text = (str(error).strip().split("\n") or [""])[0] or type(error).__name__
    causes = [type(cause).__name__ for cause in _chain(error)]
    if any("Connect" in name or "Timeout" in name or "Offline" in name for name in causes):
        return f"the hub cannot be reached: check the network, or copy the data set here and use hf:///folder ({text})"
    return text


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _column(
    source: str, key: str, requested: str | None, fitting: list[str], columns: list[str], default_names: tuple[str, ...]
) -> str | None:
    """The column ``requested``; otherwise, among the ``fitting`` columns, the one with a usual name or the only one."""
    if requested is not None:
        if requested not in columns:
            raise SourceError(f"{source}: no column {requested!r}; it has {', '.join(columns)}")
        return requested
    candidates = [name for name in default_names if name in fitting] or fitting
    if len(candidates) > 1 and key == "column":
        raise SourceError(f"{source}: several columns hold images: {', '.join(candidates)}: name one: {key}=NAME")
    return candidates[0] if len(candidates) == 1 or (candidates and candidates[0] in default_names) else None
