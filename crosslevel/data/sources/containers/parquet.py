"""Images in the rows of Parquet files, in the layout of the Hugging Face hub or as plain bytes."""

from __future__ import annotations

import os
import threading
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.bad_files import _Defect
from crosslevel.data.decode import PIXEL_LIMIT, decode
from crosslevel.data.decoding.memory import too_many_bytes
from crosslevel.data.images import Images
from crosslevel.data.sources.labels import RowNames, below_shared_folder, known_labels, one_line, state_of
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError
from crosslevel.utils.trees import json_tree

MEMORY = 256 * 2**20
"""Bytes of row groups that a process caches (at least one group, whatever its size)."""


class Parquet(Images):
    """The images of one column of Parquet files.

    The column holds encoded images, as struct<bytes: binary, path: string> (the layout of the Hugging Face hub) or
    as binary. Rows are read by row group, and a process keeps the groups it read last, up to ``memory`` bytes:
    ``blocks`` are the row groups, and an order that goes block by block reads each once. Labels are the whole numbers
    or the strings of ``label``. ``paths[i]`` is ``file.parquet/row``. A file that is no Parquet file, or is cut off, is
    left out where there are others; a warning and ``left_out`` name it.

    Args:
        files: the files, in order.
        name: the source as the user wrote it.
        column: the image column; found by its type unless given.
        label: the label column; ``label`` or ``labels``, or the only one with named classes, unless given.
        max_pixels: an image with more pixels is bad.
        memory: bytes of row groups to keep.

    Raises:
        SourceError: no file can be read, one has no such column, or there are fewer than 2 rows.

    """

    def __init__(
        self,
        files: Sequence[str],
        name: str,
        *,
        column: str | None = None,
        label: str | None = None,
        max_pixels: int = PIXEL_LIMIT,
        memory: int = MEMORY,
    ) -> None:
        self.name, self.max_pixels = name, max_pixels
        absolute = [os.path.abspath(file) for file in files]
        names, self.watch = below_shared_folder(absolute), Watch.of_files(absolute)
        self.files, self._names, self._states, footers, self.left_out = _readable(absolute, names)
        features = _features(footers[0].schema.to_arrow_schema())
        self.column = _image_column(self.files, footers, features, column)
        self.label = _label_column(self.files, footers, features, label)
        self._groups = [(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        self._ends = list(accumulate(footers[f].row_group(g).num_rows for f, g in self._groups))
        self.paths = RowNames(self._names, [footer.num_rows for footer in footers])
        if len(self.paths) < 2:
            raise SourceError(f"{name}: needs at least 2 images, has {len(self.paths)}")
        self.blocks = [range(*pair) for pair in pairwise((0, *self._ends)) if pair[0] < pair[1]]
        if self.label is not None:
            classes = features.get(self.label, {}).get("names")
            rows = [[footer.row_group(g).num_rows for g in range(footer.num_row_groups)] for footer in footers]
            self.labels, self.classes = known_labels(*_labels(self.files, rows, self.label, classes), name)
        self._cache = _RowGroupCache(memory)

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Image i in its own size, and its label (-1 without labels).

        Raises:
            BadImage: its row group cannot be read, or the image cannot be decoded.

        """
        path = self.paths[i]  # an IndexError ends loops over all images
        i %= len(self)
        group = bisect_right(self._ends, i)
        rows = self._cache.get(group)
        if rows is None:
            rows = self._read(group)
            self._cache.add(group, rows)
        if isinstance(rows, str):
            raise BadImage(path, rows)
        row = i - (self._ends[group - 1] if group else 0)
        if row >= len(rows):
            raise BadImage(path, f"its row group has {len(rows):,} rows, fewer than the file says")
        data = rows[row].as_buffer()
        if data is None:
            raise BadImage(path, "no bytes of an image in this row")
        if too_large := too_many_bytes(len(data), self.max_pixels, "it"):
            raise BadImage(path, too_large)
        image = decode(bytearray(data), path, self.max_pixels, self.reading)
        return image, -1 if self.labels is None else int(self.labels[i])

    def _read(self, group: int) -> pa.ChunkedArray | str:
        """The encoded images of a row group, or the reason why they cannot be read."""
        f, g = self._groups[group]
        try:
            if state_of(self.files[f]) != self._states[f]:
                return "its file has changed since this run began"
            file = _opened(self.files[f], self._states[f], os.getpid(), threading.get_ident())
            struct = pa.types.is_struct(file.schema_arrow.field(self.column).type)
            leaf = f"{self.column}.bytes" if struct else self.column
            # Arrow's threads would compete with the workers.
            cells = file.read_row_group(g, columns=[leaf], use_threads=False).column(self.column)
            return pc.struct_field(cells, "bytes") if struct else cells
        except Exception as error:
            # A malicious or damaged file loses its own rows at most, and never ends the run.
            return f"row group {g} of its file cannot be read: {_first_line(error)}"

    def content(self) -> Iterable[bytes | memoryview]:
        """Names, sizes and times of change of the files, and the name of the column."""
        yield f"{self.column}\0{self.label}\0".encode(errors="surrogateescape")
        for name, state in zip(self._names, self._states, strict=True):
            yield f"{name}\0{state}\0".encode(errors="surrogateescape")


class _RowGroupCache:
    """The row groups read last, up to ``memory`` bytes; each process has its own cache."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._begin()

    def _begin(self) -> None:
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._bytes, self._owner, self._lock = 0, os.getpid(), threading.Lock()

    def __getstate__(self) -> int:
        return self.memory

    def __setstate__(self, memory: int) -> None:
        self.__init__(memory)  # type: ignore[misc]

    def get(self, group: int) -> Any:
        """The rows added as ``group``, if they are still cached."""
        if self._owner != os.getpid():  # forked: another thread of the parent may have held the lock
            self._begin()
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
            return self._groups.get(group)

    def add(self, group: int, rows: Any) -> None:
        """Cache ``rows``, and as many other groups as fit into memory."""
        with self._lock:
            if group in self._groups:
                return
            self._groups[group] = rows
            self._bytes += _bytes(rows)
            while self._bytes > self.memory and len(self._groups) > 1:
                self._bytes -= _bytes(self._groups.popitem(last=False)[1])


def _bytes(rows: Any) -> int:
    return 0 if isinstance(rows, str) else rows.nbytes


# Parsing the footer of a file of many groups takes longer than reading one of them. A reader is used only by the thread
# that opened it.
@lru_cache(maxsize=8)
def _opened(file: str, state: str, process: int, thread: int) -> pq.ParquetFile:
    return pq.ParquetFile(file, page_checksum_verification=True)


def _readable(
    files: Sequence[str], names: Sequence[str]
) -> tuple[list[str], list[str], list[str], list[pq.FileMetaData], dict[str, str]]:
    """Path, name, state and footer of the readable files, and the reasons for the others.

    Raises:
        SourceError: no file is readable, or one cannot be opened at all.

    """
    readable: list[tuple[str, str, str, pq.FileMetaData]] = []
    left_out: dict[str, str] = {}
    for file, name in zip(files, names, strict=True):
        try:
            state, footer = state_of(file), pq.read_metadata(file)
            _check_counts(footer, os.path.getsize(file))
            readable.append((file, name, state, footer))
        except Exception as error:
            if isinstance(error, OSError) and error.strerror:
                raise SourceError(f"{file}: {error.strerror}") from error
            left_out[name] = f"not a Parquet file, or cut off: {_first_line(error)}"
            if len(left_out) == len(files):
                raise SourceError(f"{file}: {left_out[name]}") from error
    for file, name in zip(files, names, strict=True):
        if name in left_out:
            warnings.warn(f"{one_line(file)}: {left_out[name]}: it is left out", stacklevel=4)
    paths, readable_names, states, footers = (list(column) for column in zip(*readable, strict=True))
    return paths, readable_names, states, footers, left_out


def _check_counts(footer: pq.FileMetaData, size: int) -> None:
    """Refuse numbers of rows that are impossible in a file of ``size`` bytes.

    Raises:
        _Defect: such a number is found.

    """
    rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) > size or footer.num_rows != sum(rows):
        raise _Defect(f"it says that it has {footer.num_rows:,} rows, and {sum(rows):,} in its groups")


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The columns' features in the Hugging Face layout, by name."""
    try:
        features = json_tree((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {key: value for key, value in features.items() if isinstance(value, dict)}


def _image_column(
    files: Sequence[str], footers: Sequence[pq.FileMetaData], features: dict[str, Any], requested: str | None
) -> str:
    """The column ``requested``, or otherwise the only one that holds images."""
    schema = footers[0].schema.to_arrow_schema()
    fitting = [field.name for field in schema if _of_images(field.type)]
    typed = [key for key in fitting if features.get(key, {}).get("_type") == "Image"]
    structs = [key for key in fitting if pa.types.is_struct(schema.field(key).type)]
    candidates = [requested] if requested is not None else typed or structs or fitting
    if len(candidates) > 1 and "image" in candidates:
        candidates = ["image"]
    if len(candidates) != 1:
        several, none = f"several columns hold images: {_listed(candidates)}", f"no images in {_listed(schema.names)}"
        problem = several if candidates else none
        raise SourceError(f"{files[0]}: {problem}: name one that does: {os.path.basename(files[0])},column=NAME")
    for file, footer in zip(files, footers, strict=True):
        columns = footer.schema.to_arrow_schema()
        _needs(file, columns, candidates[0])
        if not _of_images(columns.field(candidates[0]).type):
            kind = columns.field(candidates[0]).type
            raise SourceError(f"{file}: column={candidates[0]} is {kind}: it needs binary or struct<bytes: binary>")
    return candidates[0]


def _label_column(
    files: Sequence[str], footers: Sequence[pq.FileMetaData], features: dict[str, Any], requested: str | None
) -> str | None:
    """The column ``requested``, or otherwise one whose name or type shows that it holds classes."""
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    if requested is None:
        fitting = [key for key in schemas[0].names if all(_labels_in(schema, key) for schema in schemas)]
        typed = [key for key in fitting if features.get(key, {}).get("_type") == "ClassLabel"]
        default_names = [key for key in ("label", "labels") if key in fitting]
        return next(iter(default_names), typed[0] if len(typed) == 1 else None)
    for file, schema in zip(files, schemas, strict=True):
        _needs(file, schema, requested)
        if not _labels_in(schema, requested):
            kind = schema.field(requested).type
            raise SourceError(f"{file}: label={requested} is {kind}: it needs whole numbers or strings")
    return requested


def _needs(file: str, schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise SourceError(f"{file}: no column {column!r}; it has {_listed(schema.names)}")


def _listed(columns: Sequence[str]) -> str:
    return one_line(", ".join(columns)) or "no columns"


def _of_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _labels_in(schema: pa.Schema, column: str) -> bool:
    if schema.names.count(column) != 1:
        return False
    kind = schema.field(column).type
    return bool(pa.types.is_integer(kind) or _of_strings(kind))


def _of_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(
    files: Sequence[str], rows: Sequence[Sequence[int]], column: str, names: list[str] | None
) -> tuple[Int64[Tensor, " N"], list[str] | None]:
    """The labels of all rows (-1: missing or unreadable), and the classes' names if the file has them.

    ``rows`` are the numbers of rows in each row group of each file.
    """
    words = _of_strings(pq.read_schema(files[0]).field(column).type)
    cells: list[np.ndarray[Any, Any]] = []
    for file, counts in zip(files, rows, strict=True):
        for group, count in enumerate(counts):
            cells.append(_cells(file, group, count, column, words))
    if not words:
        return torch.from_numpy(np.concatenate(cells)), names
    classes, labels = np.unique(np.concatenate(cells).astype(str), return_inverse=True)
    shift = 1 if len(classes) and not classes[0] else 0  # the empty word comes first
    return torch.from_numpy(labels.astype(np.int64)) - shift, classes[shift:].tolist()


def _cells(file: str, group: int, count: int, column: str, words: bool) -> np.ndarray[Any, Any]:
    """The labels of one row group: numbers (-1: missing) or words ("": missing)."""
    kind, missing = (pa.string(), "") if words else (pa.int64(), -1)
    cells = np.full(count, missing, object if words else np.int64)
    try:
        opened = _opened(file, state_of(file), os.getpid(), threading.get_ident())
        read = opened.read_row_group(group, columns=[column], use_threads=False).column(column)
        values = pc.fill_null(read.cast(kind), missing).to_numpy(zero_copy_only=False)[:count]
        cells[: len(values)] = values
    except Exception as error:
        # Images stay usable if the column of labels is damaged.
        text = _first_line(error)
        warnings.warn(f"{one_line(file)}: the labels in {column!r} cannot be read: {one_line(text)}", stacklevel=5)
    return cells


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n") or [""])[0] or type(error).__name__
