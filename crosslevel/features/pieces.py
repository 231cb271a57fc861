"""A table of features that is made piece by piece, so that a kill loses at most one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles, first_of
from crosslevel.data.images import Images
from crosslevel.features import formats
from crosslevel.features.extract import Features
from crosslevel.features.table import ABOUT
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.files import replacing, sweep, sync_folder, write
from crosslevel.utils.trees import json_tree

_JOINED = "joined.json"
_FORMER = ("state.json", "state.tmp", "joined.parquet", "joined.npy", "joined.csv")  # files of the first version


class Piece(NamedTuple):
    """A finished piece of a table: its range of images, and the unreadable images up to its end."""

    file: Path
    first: int
    stop: int
    reasons: dict[str, str]


class Pieces:
    """Finished pieces of a table, in a folder beside it, until all are there and joined.

    A piece records which table it belongs to, and is renamed into place when it is complete, so that a kill loses at
    most one. These files are the only record of progress. When the table is in place, a mark is written, then the
    pieces are removed, then the mark: so a table is never joined from an incomplete set of pieces.
    """

    def __init__(
        self,
        file: Path,
        fingerprint: str,
        source: Images,
        metadata: Mapping[str, Any] | None = None,
        further: Mapping[str, Callable[[Sequence[int]], pa.Array]] | None = None,
    ) -> None:
        self.file, self.fingerprint, self.source = file, fingerprint, source
        self.metadata, self.further = metadata or {}, further or {}
        self.folder = file.with_name(f"{file.name}.parts")
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link, and pieces that are not ours are removed: remove it")
        self.pieces: list[Piece] = []
        self.reasons: dict[str, str] = {}
        self.joined: int | None = None  # rows of the finished table

    @property
    def done(self) -> int:
        """How many images are done."""
        return sum(piece.stop - piece.first for piece in self.pieces)

    def start(self) -> list[str]:
        """Find the pieces of earlier calls, remove unusable ones, and return messages about them."""
        mark = self._mark()
        if mark is not None:
            self.joined, self.reasons = mark["rows"], mark["bad"]
            return []
        for file in self._leftovers():
            file.unlink()
        self.pieces, messages, foreign = [], list[str](), 0
        for file in sorted(self.folder.glob("[0-9]*.parquet")):
            try:
                piece = self._read(file)
            except (pa.ArrowException, OSError, ValueError) as error:
                messages.append(f"{file} is damaged ({str(error).splitlines()[0]}): its images are computed again")
                piece = None
            else:
                foreign += piece is None
            if piece is None:
                file.unlink()
            else:
                self._count(piece)
        if foreign:
            messages.append(
                f"{self.folder}: {foreign:,} finished pieces are of other images or settings: computed anew"
            )
        if self.pieces:
            messages.append(f"continuing at image {[*self.missing(), range(len(self.source), 0)][0].start:,}")
        return messages

    def missing(self) -> list[range]:
        """The images that no piece covers."""
        ends = [0, *(piece.stop for piece in self.pieces)]
        begins = [*(piece.first for piece in self.pieces), len(self.source)]
        return [range(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]

    def write(self, first: int, rows: Features, bad_files: BadFiles, stop: int | None = None) -> int:
        """Store the piece that begins with image ``first``; return the image after it (``stop``, if given)."""
        self.reasons.update(bad_files.reasons)
        piece = Piece(
            self.folder / f"{first:012}.parquet", first, stop or int(rows.indices[-1]) + 1, dict(self.reasons)
        )
        metadata = {"fingerprint": self.fingerprint, "first": piece.first, "stop": piece.stop, "bad": piece.reasons}
        further = {name: column(rows.indices.tolist()) for name, column in self.further.items()}
        table = table_of(self.source, *rows, further).replace_schema_metadata({ABOUT: json.dumps(metadata)})
        with replacing(piece.file) as file:
            pq.write_table(table, file, use_dictionary=formats.REPEATED, write_page_checksum=True)
        self._count(piece)
        return piece.stop

    def join(self) -> None:
        """Join the pieces into the file, which appears atomically, and write the mark.

        Raises:
            SourceError: no image could be read.

        """
        if not self.pieces:
            self.remove()
            first = first_of(self.reasons)
            raise SourceError(f"{self.source.name}: none of its {len(self.source)} images can be read{first}")
        self.joined = formats.join([piece.file for piece in self.pieces], self.file, self.metadata)
        mark = {
            "fingerprint": self.fingerprint,
            "rows": self.joined,
            "bad": self.reasons,
            "table": formats.file_stats(self.file),
        }
        write(self.folder / _JOINED, json.dumps(mark))

    def remove(self) -> None:
        """Remove the pieces of a table that is complete, and the mark last."""
        for file in [*self.folder.glob("[0-9]*.parquet"), *self._leftovers()]:
            file.unlink()
        sync_folder(self.folder)
        (self.folder / _JOINED).unlink(missing_ok=True)

    def _mark(self) -> dict[str, Any] | None:
        """The mark of a table that was joined from the same images; None unless the table is unchanged."""
        try:
            mark: dict[str, Any] = json_tree((self.folder / _JOINED).read_text(encoding="utf-8"))
            return (
                mark
                if (mark["fingerprint"], mark["table"]) == (self.fingerprint, formats.file_stats(self.file))
                else None
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _leftovers(self) -> list[Path]:
        """Unfinished files of killed calls."""
        sweep(self.folder)
        return [file for name in _FORMER if (file := self.folder / name).is_file()]

    def _read(self, file: Path) -> Piece | None:
        """A complete piece; None if it is of other images or another encoder.

        Raises:
            ArrowException, OSError, ValueError: it is damaged.

        """
        fields = json_tree((pq.read_schema(file).metadata or {}).get(ABOUT, b"{}"))
        if not isinstance(fields, dict) or fields.get("fingerprint") != self.fingerprint:
            return None
        pq.read_table(file, page_checksum_verification=True)
        try:
            return Piece(file, int(fields["first"]), int(fields["stop"]), dict(fields["bad"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} does not say which images it holds: {error}") from error

    def _count(self, piece: Piece) -> None:
        self.pieces = sorted([*self.pieces, piece], key=lambda piece: piece.first)
        self.reasons.update(piece.reasons)


def table_of(
    source: Images,
    features: Float[Tensor, "M D"],
    labels: Int64[Tensor, " M"],
    indices: Int64[Tensor, " M"],
    further: Mapping[str, pa.Array] | None = None,
) -> pa.Table:
    """Rows of a table: path, feature, label, class and track if there are any, and ``further`` columns."""
    flat = pa.array(features.numpy().ravel())
    columns: dict[str, Any] = {"path": [text(source.paths[i]) for i in indices.tolist()]}
    if source.labels is not None:
        columns["label"] = labels.numpy()
        if source.classes is not None:
            columns["class"] = [source.classes[label] for label in labels.tolist()]
    if source.tracks is not None:
        columns["track"] = source.tracks[indices].numpy()
    columns["feature"] = pa.FixedSizeListArray.from_arrays(flat, features.shape[1])
    return pa.table({**columns, **(further or {})})


def text(path: str) -> str:
    """A file name as Unicode, for tables: bytes that are not valid UTF-8 become escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
