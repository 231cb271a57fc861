"""The formats that the pieces of a table are joined to: Parquet, NumPy, Lance, and a data set for FiftyOne."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslevel.features.table import ABOUT, FEATURE, IMAGE
from crosslevel.utils.errors import MissingExtra, UserError
from crosslevel.utils.files import replacing, write

SUFFIXES = (".parquet", ".npy", ".lance", ".fiftyone")
PICTURED = (".parquet", ".lance", ".fiftyone")
"""The formats that can have small pictures."""
READ = {
    "": "read the folder with pandas.read_parquet('{file}')",
    ".parquet": "read it with pandas.read_parquet('{file}')",
    ".npy": "read it with numpy.load('{file}')",
    ".lance": "read it with lance.dataset('{file}').to_table()",
    ".fiftyone": "fiftyone.Dataset.from_dir('{file}', dataset_type=fiftyone.types.FiftyOneDataset)",
}
"""Advice how to open a table, by its extension."""

REPEATED = ["label", "class"]  # columns with few distinct values; searching for them among features would take time
_SAMPLES, _METADATA, _PICTURES = "samples.json", "metadata.json", "data"


def check(file: Path) -> None:
    """Refuse a table that could not be written, before anything is computed.

    Raises:
        MissingExtra: pylance is not installed.
        UserError: something else exists at its path.

    """
    if file.suffix == ".lance" and find_spec("lance") is None:
        raise MissingExtra(f"{file}: a Lance table needs pylance: pip install 'crosslevel[lance]'")
    marks = {".lance": "_versions", ".fiftyone": _METADATA}
    if file.suffix in marks and file.exists() and not (file / marks[file.suffix]).exists():
        raise UserError(f"--output {file}: there is something else in its place: give another name")


def join(pieces: Sequence[Path], file: Path, metadata: Mapping[str, Any]) -> int:
    """Write the table atomically, and return its number of rows.

    Args:
        pieces: Parquet files of the same columns, in order.
        file: the table; its extension determines the format.
        metadata: stored in the table.

    """
    if file.suffix == ".parquet":
        with replacing(file) as table:
            return _join_parquet(pieces, table, metadata)
    if file.suffix == ".lance":
        return _join_lance(pieces, file, metadata)
    if file.suffix == ".fiftyone":
        return _join_fiftyone(pieces, file, metadata)
    manifest = file.with_suffix(".csv")
    with replacing(manifest) as lines, replacing(file) as array:
        count = _join_npy(pieces, array, lines)
        # The array is written first, so that an existing manifest never belongs to another array.
        manifest.unlink(missing_ok=True)
    return count


def file_stats(file: Path) -> list[list[int]]:
    """Size and time of a finished table's files."""
    files = [file]
    if file.suffix == ".npy":
        files = [file, file.with_suffix(".csv")]
    elif file.suffix == ".lance":
        files = sorted((file / "_versions").glob("*.manifest"))
    elif file.suffix == ".fiftyone":
        files = [file / _SAMPLES]
    return [[each.stat().st_size, each.stat().st_mtime_ns] for each in files]


def _schema(pieces: Sequence[Path], metadata: Mapping[str, Any]) -> pa.Schema:
    return pq.read_schema(pieces[0]).with_metadata({ABOUT: json.dumps(metadata)})


def _join_parquet(pieces: Sequence[Path], file: BinaryIO, metadata: Mapping[str, Any]) -> int:
    count, schema = 0, _schema(pieces, metadata)
    with pq.ParquetWriter(file, schema, use_dictionary=REPEATED, write_page_checksum=True) as writer:
        for piece in pieces:
            table = pq.read_table(piece).replace_schema_metadata(schema.metadata)
            writer.write_table(table)
            count += len(table)
    return count


def _join_lance(pieces: Sequence[Path], file: Path, metadata: Mapping[str, Any]) -> int:
    """Write a new version of the table; Lance replaces the former version atomically, and keeps it."""
    import lance  # noqa: PLC0415

    schema = _schema(pieces, metadata)
    batches = (
        batch.replace_schema_metadata(schema.metadata)
        for piece in pieces
        for batch in pq.read_table(piece).to_batches()
    )
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    return int(lance.write_dataset(reader, str(file), mode="overwrite" if file.exists() else "create").count_rows())


def _join_fiftyone(pieces: Sequence[Path], file: Path, metadata: Mapping[str, Any]) -> int:
    """A folder that FiftyOne imports as a FiftyOneDataset: samples with their files, or with small pictures in it."""
    file.mkdir(parents=True, exist_ok=True)
    write(file / _METADATA, json.dumps({"media_type": "image", "info": {"crosslevel": metadata}}))
    count = 0
    with replacing(file / _SAMPLES) as stream:
        stream.write(b'{"samples": [')
        for sample in _samples(pieces, file, metadata.get("root")):
            stream.write((b",\n" if count else b"\n") + json.dumps(sample).encode())
            count += 1
        stream.write(b"]}\n")
    return count


def _samples(pieces: Sequence[Path], folder: Path, root: str | None) -> Iterator[dict[str, Any]]:
    """Each row in the form of FiftyOne's ``Sample.to_dict``."""
    row = 0
    for piece in pieces:
        table = pq.read_table(piece)
        features = table[FEATURE].combine_chunks()
        values = features.flatten().to_numpy().reshape(len(table), -1)
        other_columns = table.drop_columns([FEATURE]).to_pylist()
        for vector, columns in zip(values, other_columns, strict=True):
            filepath = os.path.join(root, columns["path"]) if root is not None else ""
            if not os.path.isfile(filepath):
                filepath = _picture(folder, row, columns.get(IMAGE))
            sample = {
                "filepath": filepath,
                "tags": [],
                "metadata": None,
                "path": columns["path"],
                FEATURE: _vector(vector),
            }
            name = columns.get("class", columns.get("label"))
            if name not in (None, -1):
                sample["ground_truth"] = {"_cls": "Classification", "tags": [], "label": str(name)}
            yield sample | {
                key: value for key, value in columns.items() if key not in ("path", "class", "label", IMAGE)
            }
            row += 1


def _picture(folder: Path, row: int, image: Mapping[str, Any] | None) -> str:
    """Write a row's small picture as a file in the folder; return its name relative to the folder."""
    if image is None or image["bytes"] is None:
        raise UserError(f"{folder}: FiftyOne shows files, and image {row} is none: give --thumbnails 96")
    (folder / _PICTURES).mkdir(exist_ok=True)
    name = f"{_PICTURES}/{row:08}.jpg"
    write(folder / name, image["bytes"])
    return name


def _vector(vector: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array in FiftyOne's form: a compressed NumPy file, as bytes in MongoDB's JSON."""
    file = io.BytesIO()
    np.save(file, vector, allow_pickle=False)
    return {"$binary": {"base64": base64.b64encode(zlib.compress(file.getvalue())).decode(), "subType": "00"}}


def _join_npy(pieces: Sequence[Path], array: BinaryIO, manifest: BinaryIO) -> int:
    """Features as one array (rows, D) of float32, and a manifest of the other columns in the same order."""
    count = sum(pq.read_metadata(piece).num_rows for piece in pieces)
    width = pq.read_schema(pieces[0]).field(FEATURE).type.list_size
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(array, header | {"shape": (count, width)})
    lines = io.TextIOWrapper(manifest, encoding="utf-8", newline="")
    writer = csv.writer(lines)
    writer.writerow(name for name in pq.read_schema(pieces[0]).names if name not in (FEATURE, IMAGE))
    for piece in pieces:
        table = pq.read_table(piece)
        other_columns = table.drop_columns([name for name in (FEATURE, IMAGE) if name in table.column_names])
        writer.writerows(zip(*(column.to_pylist() for column in other_columns.columns), strict=True))
        array.write(table[FEATURE].combine_chunks().flatten().to_numpy().data)
    lines.flush()
    lines.detach()
    return count
