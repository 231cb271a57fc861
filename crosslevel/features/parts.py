"""A table of features in many files: a folder to which every call adds what is new."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.scan import content_of
from crosslevel.data.images import Images, ImageView
from crosslevel.features.extract import Runtime, stream
from crosslevel.features.pieces import table_of, text
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import BadImage, UserError
from crosslevel.utils.files import replacing, sweep

CONTENT = "content"
_ABOUT = b"crosslevel"
Keys = np.ndarray[Any, np.dtype[np.int64]]


class Done(NamedTuple):
    """What became of images ``first`` to ``stop``: rows written, rows that were there before, what is unreadable."""

    first: int
    stop: int
    rows: int
    known: int
    bad: dict[str, str]


class Parts:
    """The Parquet files of a folder. The column ``content`` has 64 bits of an image's pixels: what tells new ones.

    Each file appears when it is whole, under a name that says of which images it is: made twice, it is the same file.

    Args:
        folder: where they lie.
        encoder: the `Encoder.identity` of whose features they are.

    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder, self.encoder = folder, encoder

    def known(self) -> Keys:
        """A number for each path and content in the table, sorted; what killed calls left is removed.

        Raises:
            UserError: there are features of another encoder, or other files.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        keys: list[int] = []
        for file in sorted(self.folder.glob("*.parquet")):
            about = (pq.read_schema(file).metadata or {}).get(_ABOUT)
            if about is None or json.loads(about).get("encoder") != self.encoder:
                raise UserError(f"{file} has features of another encoder, or none: give a folder of its own")
            table = pq.read_table(file, columns=["path", CONTENT])
            keys += map(key_of, table["path"].to_pylist(), table[CONTENT].to_pylist())
        return np.sort(np.array(keys, dtype=np.int64))

    def write(self, encoder: Encoder, source: Images, first: int, stop: int, known: Keys, place: Runtime) -> Done:
        """Write one file with the features of images ``first`` to ``stop``, without those whose keys are ``known``."""
        bad, places = BadFiles(), torch.arange(first, stop)
        content: dict[int, int] = {}
        if len(known):
            places = torch.tensor([i for i in range(first, stop) if self._is_new(source, i, known, bad)]).long()
        noted = _Noted(source, places, content)
        batches = list(stream(encoder, noted, batch_size=place.batch_size, workers=0, hardware=place.hardware, bad=bad))
        count = sum(len(rows.places) for rows in batches)
        if batches:
            features, labels, index = (torch.cat(column) for column in zip(*batches, strict=True))
            table = table_of(source, features, labels, places[index])
            table = table.append_column(CONTENT, pa.array([content[i] for i in index.tolist()], pa.int64()))
            names = hashlib.sha256("\n".join(table["path"].to_pylist()).encode()).hexdigest()
            with replacing(self.folder / f"{first:012}-{names[:12]}.parquet") as file:
                about = {_ABOUT: json.dumps({"encoder": self.encoder})}
                pq.write_table(table.replace_schema_metadata(about), file, write_page_checksum=True)
        return Done(first, stop, count, stop - first - count - len(bad), bad.reasons)

    def _is_new(self, source: Images, i: int, known: Keys, bad: BadFiles) -> bool:
        try:
            picture, _ = source[i]
        except BadImage as error:
            bad.add(error.path, error.reason)
            return False
        key = key_of(text(source.paths[i]), content_of(picture))
        at = int(np.searchsorted(known, key))
        return at == len(known) or bool(known[at] != key)


def key_of(path: str, content: int) -> int:
    """64 bits of a path and its image's content."""
    digest = hashlib.blake2b(f"{content} {path}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Noted(ImageView):
    """Images whose content is noted as they are decoded, by their number here."""

    def __init__(self, images: Images, index: Tensor, content: dict[int, int]) -> None:
        super().__init__(images, index)
        self.noted = content

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        picture, label = super().__getitem__(i)
        self.noted[i] = content_of(picture)
        return picture, label
