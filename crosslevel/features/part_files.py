"""A table of features in many files: a folder to which every call adds the new images."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.scan import content_of
from crosslevel.data.images import Images, ImageView
from crosslevel.data.loaders.batches import fit
from crosslevel.data.loaders.records import records
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import Runtime, encoded
from crosslevel.features.pieces import table_of, text
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import replacing, sweep

CONTENT = "content"
_ABOUT = b"crosslevel"
_AT_A_TIME = 64  # images that are read at a time
Keys = np.ndarray[Any, np.dtype[np.int64]]


class Done(NamedTuple):
    """The result for images ``first`` to ``stop``: rows written, rows that existed before, unreadable images."""

    first: int
    stop: int
    rows: int
    existing: int
    reasons: dict[str, str]


class PartFiles:
    """The Parquet files of a folder. The column ``content`` has a 64-bit hash of an image's pixels, to detect new ones.

    Each file appears when it is complete. Its name contains the range of images, so that a repeated file replaces
    itself.

    Args:
        folder: the folder of the files.
        encoder: the `Encoder.identity` of the features' encoder.

    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder, self.encoder = folder, encoder

    def existing_keys(self) -> Keys:
        """A number for each path and content in the table, sorted; remains of killed calls are removed.

        Raises:
            UserError: the folder holds features of another encoder, or other files.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        keys: list[Keys] = []
        for file in sorted(self.folder.glob("*.parquet")):
            metadata = (pq.read_schema(file).metadata or {}).get(_ABOUT)
            if metadata is None or json.loads(metadata).get("encoder") != self.encoder:
                raise UserError(f"{file} has features of another encoder, or none: give a folder of its own")
            table = pq.read_table(file, columns=["path", CONTENT])
            pairs = zip(table["path"].to_pylist(), table[CONTENT].to_pylist(), strict=True)
            keys.append(np.fromiter((key_of(*pair) for pair in pairs), np.int64, len(table)))
        return np.sort(np.concatenate([np.empty(0, np.int64), *keys]))

    def write(self, encoder: Encoder, source: Images, first: int, stop: int, existing: Keys, runtime: Runtime) -> Done:
        """Write a file of features of images ``first`` to ``stop``, without those whose keys are ``existing``."""
        bad_files, indices = BadFiles(), torch.arange(first, stop)
        if len(existing):
            indices = _new(source, indices, existing, bad_files, runtime.workers)
        fitted = records(
            ImageView(source, indices), partial(_fitted, size=encoder.view.size), runtime.batch_size,
            bad_files=bad_files, workers=runtime.workers,
        )  # fmt: skip
        batches = ((picture, content, numbers) for numbers, (picture, content) in fitted)
        rows = list(encoded(encoder, batches, runtime.hardware))
        count = sum(len(index) for _, _, index in rows)
        if rows:
            features, content, index = (torch.cat(column) for column in zip(*rows, strict=True))
            indices = indices[index]
            labels = torch.full_like(content, -1) if source.labels is None else source.labels[indices]
            table = table_of(source, features, labels, indices)
            table = table.append_column(CONTENT, pa.array(content.numpy(), pa.int64()))
            names = hashlib.sha256("\n".join(table["path"].to_pylist()).encode()).hexdigest()
            with replacing(self.folder / f"{first:012}-{names[:12]}.parquet") as file:
                metadata = {_ABOUT: json.dumps({"encoder": self.encoder})}
                pq.write_table(table.replace_schema_metadata(metadata), file, write_page_checksum=True)
        return Done(first, stop, count, stop - first - count - len(bad_files), bad_files.reasons)


class _Content(NamedTuple):
    """A hash of an image's content."""

    content: Int64[Tensor, ""]


class _Fitted(NamedTuple):
    """An image as an encoder takes it, and a hash of its content before it was resized."""

    picture: UInt8[Tensor, "3 s s"]
    content: Int64[Tensor, ""]


def _content(image: UInt8[Tensor, "3 H W"]) -> _Content:
    return _Content(torch.tensor(content_of(image)))


def _fitted(image: UInt8[Tensor, "3 H W"], size: int) -> _Fitted:
    return _Fitted(fit(image, size), torch.tensor(content_of(image)))


def _new(
    source: Images, indices: Int64[Tensor, " N"], existing: Keys, bad_files: BadFiles, workers: int | None
) -> Int64[Tensor, " n"]:
    """The images whose path and content have no key among the ``existing``; unreadable ones go to ``bad_files``."""
    new = []
    for numbers, (content,) in records(
        take(source, indices), _content, _AT_A_TIME, bad_files=bad_files, workers=workers
    ):
        for i, value in zip(indices[numbers].tolist(), content.tolist(), strict=True):
            key = key_of(text(source.paths[i]), value)
            position = int(np.searchsorted(existing, key))
            if position == len(existing) or existing[position] != key:
                new.append(i)
    return torch.tensor(new, dtype=torch.int64)


def key_of(path: str, content: int) -> int:
    """A 64-bit hash of a path and its image's content."""
    digest = hashlib.blake2b(f"{content} {path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
