"""Reads a table of features of `crosslevel embed`, or any Parquet file with such a column."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.data.images import Images
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import NotThere, UserError, hidden

ABOUT = b"crosslevel"  # its key in the metadata of a Parquet file
FEATURE, PATH, IMAGE = "feature", "path", "image"
_OWN_COLUMNS = (FEATURE, PATH, IMAGE, "label", "class")


def metadata_of(encoder: Encoder, run: str, images: Images, source: str, precision: str) -> dict[str, Any]:
    """The metadata of a table: the encoder and its view, the source of images, and the versions that computed it.

    ``encoder`` is the checksum of its weights and view (`Encoder.identity`): features of another encoder cannot be
    compared with these. ``licence`` is that of the weights by name, if it started from such. ``state`` changes when
    images are added, removed or rewritten. ``root`` is the folder of the images, if there is one.
    """
    root = images.name.partition("@")[0].partition(",")[0]
    return {
        "encoder": encoder.identity(),
        "name": encoder.name,
        "licence": encoder.licence or None,
        "run": os.path.abspath(run) if os.path.exists(run) else run,
        "view": encoder.view._asdict(),
        "features": encoder.num_features,
        "precision": precision,
        "images": hidden(source),
        "state": images.identity(),
        "root": os.path.abspath(root) if os.path.isdir(root) else None,
        "versions": {name: _version(name) for name in ("crosslevel", "torch", "timm")},
    }


@dataclass
class FeatureTable:
    """N features with the paths of their images.

    ``metadata`` describes the table, and is empty if Crosslevel did not write it. ``rows`` is N, ``width`` is D; at
    first only the schema is read.
    """

    file: Path
    rows: int
    width: int
    names: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def features(self) -> Float[Tensor, "N D"]:
        """The features in float32.

        Raises:
            UserError: the file is damaged, or a feature is missing or not finite.

        """
        column = self.column(FEATURE)
        if column.null_count:
            raise UserError(f"{self.file}: {column.null_count:,} of its {self.rows:,} rows have no feature")
        flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).cast(pa.float32())
        if len(flat) != self.rows * self.width:
            raise UserError(f"{self.file}: its features have different lengths: each must have {self.width} numbers")
        values = np.array(flat, dtype=np.float32).reshape(self.rows, self.width)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise UserError(f"{self.file}: {len(bad):,} features are not finite, row {bad[0]} first: embed it again")
        return torch.from_numpy(values)

    def features_at(self, rows: Int64[Tensor, " M"]) -> Float[Tensor, "M D"]:
        """The features of some rows, in ascending order, without loading all others.

        Raises:
            UserError: the file is damaged, or one of these features is missing or not finite.

        """
        first, chunks = 0, []
        for _, features in self.batches():
            within = rows[(rows >= first) & (rows < first + len(features))]
            chunks.append(features[within - first])
            bad = within[~chunks[-1].isfinite().all(dim=1)]
            if len(bad):
                raise UserError(f"{self.file}: the feature of row {int(bad[0])} is not finite: embed it again")
            first += len(features)
        return torch.cat(chunks)

    @cached_property
    def paths(self) -> list[str]:
        """The images' names; row numbers if the table has none."""
        if PATH not in self.names:
            return [f"row {i}" for i in range(self.rows)]
        return [str(path) for path in self.column(PATH).to_pylist()]

    @cached_property
    def labels(self) -> tuple[Int64[Tensor, " N"], list[str]] | None:
        """The label of each row (-1: none), and the labels' names; None for a table without labels."""
        for name in ("class", "label"):
            if name in self.names:
                values = self.column(name).to_pylist()
                classes = sorted({value for value in values if value is not None and value != -1})
                number = {value: i for i, value in enumerate(classes)}
                return torch.tensor([number.get(v, -1) for v in values]), [str(value) for value in classes]
        return None

    @property
    def other_columns(self) -> list[str]:
        """The columns that Crosslevel does not define."""
        return [name for name in self.names if name not in _OWN_COLUMNS]

    @cached_property
    def footer(self) -> str:
        """A checksum of the file's size and footer, which is fast to read.

        It changes with the number of rows, and mostly with their values: the footer has the size of each column chunk,
        and its extremes if the writer stored them. If rows are exchanged it may stay the same.
        """
        size = self.file.stat().st_size
        with self.file.open("rb") as opened:
            opened.seek(-8, os.SEEK_END)
            footer = 8 + int.from_bytes(opened.read(4), "little")
            opened.seek(max(0, size - footer))
            return hashlib.sha256(f"{size} ".encode() + opened.read()).hexdigest()

    def content(self) -> str:
        """A checksum of the whole file (SHA-256): 0.6 s a GB of one core, besides reading it."""
        with self.file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def times(self) -> list[int]:
        """When the file, and what the system notes of it, last changed, in nanoseconds."""
        status = self.file.stat()
        return [status.st_mtime_ns, status.st_ctime_ns]

    def column(self, name: str) -> pa.ChunkedArray:
        """One column as it is in the file.

        Raises:
            UserError: the file is damaged.

        """
        try:
            return pq.read_table(self.file, columns=[name], page_checksum_verification=True)[name]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.file} is damaged ({_first_line(error)}): embed its images again") from error

    def batches(self, rows: int = 65_536) -> Iterator[tuple[list[str], Float[Tensor, "B D"]]]:
        """Paths and features some rows at a time, for tables that are larger than memory."""
        columns = [name for name in (PATH, FEATURE) if name in self.names]
        first = 0
        try:
            with pq.ParquetFile(self.file, page_checksum_verification=True) as opened:
                for batch in opened.iter_batches(rows, columns=columns):
                    values = np.array(batch[FEATURE].flatten().cast(pa.float32()), dtype=np.float32)
                    count = batch.num_rows
                    paths = batch[PATH].to_pylist() if PATH in columns else [f"row {first + i}" for i in range(count)]
                    yield paths, torch.from_numpy(values.reshape(count, self.width))
                    first += count
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{self.file} is damaged ({_first_line(error)}): embed its images again") from error

    def check_encoder(self, encoder: Encoder, run: str) -> None:
        """Refuse an encoder that did not make these features.

        Raises:
            UserError: it is another encoder, or has another feature size.

        """
        expected, identity = self.metadata.get("encoder"), encoder.identity()
        if expected is not None and expected != identity:
            raise UserError(
                f"{self.file} is of another encoder than {run} (its checksum is {expected[:12]}, not {identity[:12]}): "
                f"crosslevel embed {run} IMAGES -o {self.file} makes it anew"
            )
        if encoder.num_features != self.width:
            raise UserError(
                f"{self.file} has features of {self.width} numbers, {run} makes {encoder.num_features}: it is of "
                "another encoder"
            )


def open_table(file: str | os.PathLike[str], least: int = 1) -> FeatureTable:
    """Open a table of features; only its schema is read.

    Args:
        file: a Parquet file with a column ``feature`` of lists of numbers, such as `crosslevel embed` writes.
        least: the fewest rows allowed.

    Raises:
        NotThere: there is no such file.
        UserError: it is no table of features, or has too few rows.

    """
    path = Path(file)
    if not path.is_file():
        raise NotThere(f"{file}: there is no such table: crosslevel embed RUN IMAGES -o {file} writes one")
    try:
        with pq.ParquetFile(path) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
            metadata = json.loads((opened.metadata.metadata or {}).get(ABOUT, b"{}"))
            if FEATURE not in schema.names:
                names = ", ".join(schema.names[:8])
                raise UserError(f"{file} has no column named {FEATURE}, only {names}: it is no table of features")
            width = _width(opened, schema.field(FEATURE).type, rows)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no Parquet table, or damaged: {_first_line(error)}") from error
    if width is None:
        raise UserError(f"{file}: its column {FEATURE} holds {schema.field(FEATURE).type}, not lists of numbers")
    if rows < least:
        raise UserError(f"{file} has {rows} rows: needs {least} at least")
    return FeatureTable(path, rows, width, schema.names, metadata if isinstance(metadata, dict) else {})


def _width(opened: pq.ParquetFile, kind: pa.DataType, rows: int) -> int | None:
    """The size of a feature; None if the column holds no lists of numbers."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        return None
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not rows:
        return 0
    first = next(opened.iter_batches(1, columns=[FEATURE]))[FEATURE][0]
    return 0 if first.as_py() is None else len(first)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that nobody installed
        return "unknown"
