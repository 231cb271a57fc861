"""A cache of features: they are kept in the run's folder until the encoder or the images change."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import Features, Runtime, stream
from crosslevel.models.encoder import Encoder
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.files import sweep, write, write_tensors
from crosslevel.utils.tensors import load_safetensors
from crosslevel.utils.trees import json_tree

FOLDER, COMPLETE = "features", "complete"
ROWS, DECODED_ONCE = 65_536, 2e9

Progress = Callable[[int, int], None]
Columns = dict[str, Tensor]


class CachedFeatures(NamedTuple):
    """Features of M images in float32, their labels (-1: none), and their tracks where the source has any."""

    features: Float[Tensor, "M D"]
    labels: Int64[Tensor, " M"]
    tracks: Int64[Tensor, " M"] | None


class FeatureCache:
    """Features of images by encoders, computed at most once for the same weights, images and precision.

    Args:
        run_dir: the run's folder, which stores them; None keeps them in memory only.
        runtime: the device and settings of encoders.
        bad_files: collects images that were unreadable now or when the features were computed.
        rows: images of a file; a killed call loses at most one file.
        decoded_once: bytes; smaller sources are decoded once, and stay in memory for all encoders.

    """

    def __init__(
        self,
        run_dir: Path | None,
        runtime: Runtime,
        bad_files: BadFiles,
        rows: int = ROWS,
        decoded_once: float = DECODED_ONCE,
    ) -> None:
        self.run_dir, self.runtime, self.bad_files = run_dir, runtime, bad_files
        self.rows, self.decoded_once = rows, decoded_once
        self._cached: dict[str, CachedFeatures] = {}
        self._decoded: dict[tuple[str, int], tuple[Images, dict[str, str]]] = {}

    def features(self, name: str, encoder: Encoder, images: Images, progress: Progress | None = None) -> CachedFeatures:
        """Features of all readable images.

        Args:
            name: of the encoder. Features of the same images by a former encoder of this name are deleted.
            encoder: the network.
            images: the source.
            progress: called with the images done and their total.

        Raises:
            SourceError: no image can be read.

        """
        key = self.key(encoder, images)
        if key not in self._cached:
            folder = None if self.run_dir is None else self._folder(name, images, key)
            chunks = self._stored_chunks(folder) if folder is not None else []
            if folder is None or not _is_complete(folder, len(chunks)):
                chunks += self._computed(encoder, images, len(chunks), folder, progress)
            chunks = [part for part in chunks if len(part["labels"])]
            if not chunks:
                raise SourceError(f"{images.name}: none of its {len(images)} images can be read{self.bad_files.first}")
            tracks = None if images.tracks is None else torch.cat([part["tracks"] for part in chunks])
            features, labels = (torch.cat([part[name] for part in chunks]) for name in ("features", "labels"))
            self._cached[key] = CachedFeatures(features, labels, tracks)
        return self._cached[key]

    def decoded(self, images: Images, size: int) -> Images:
        """The images in memory at ``size`` pixels, if they are few enough; decoded once for all callers."""
        if len(images) * images.channels * size**2 >= self.decoded_once:
            return images
        key = (images.identity_once(), size)
        if key not in self._decoded:
            bad_files = BadFiles()
            decoded = pack(images, size, bad_files=bad_files, workers=self.runtime.workers)
            self._decoded[key] = decoded, bad_files.reasons
            self._remember(bad_files.reasons)
        return self._decoded[key][0]

    def key(self, encoder: Encoder, images: Images) -> str:
        """The cache key: a digest of all that the features depend on."""
        fields = (encoder.identity(), images.identity_once(), self.runtime.hardware.precision)
        return hashlib.sha256(" ".join(fields).encode()).hexdigest()

    def _folder(self, name: str, images: Images, key: str) -> Path:
        assert self.run_dir is not None
        slug = "".join(letter if letter.isalnum() else "-" for letter in name)
        stem = f"{slug}-{images.identity_once()[:12]}"
        folder = self.run_dir / FOLDER / f"{stem}-{key[:12]}"
        for outdated in (self.run_dir / FOLDER).glob(f"{stem}-*"):
            if outdated != folder:
                # The mark of completeness is removed first: a kill in between leaves an incomplete cache.
                (outdated / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(outdated)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _computed(
        self, encoder: Encoder, images: Images, done: int, folder: Path | None, progress: Progress | None
    ) -> Iterator[Columns]:
        """Compute the pieces after the first ``done``; each is on disk before the next begins."""
        runtime = self.runtime
        resized = self.decoded(images, encoder.view.size)
        _, reasons = self._decoded.get((images.identity_once(), encoder.view.size), (None, {}))
        for first in range(done * self.rows, len(resized), self.rows):
            bad_files = BadFiles()
            part = take(resized, torch.arange(first, min(first + self.rows, len(resized))))
            batches = stream(
                encoder,
                part,
                batch_size=runtime.batch_size,
                workers=runtime.workers,
                hardware=runtime.hardware,
                bad_files=bad_files,
            )
            columns = _joined(batches, part, first, len(resized), progress)
            if folder is not None:
                file = folder / f"{first:012}.safetensors"
                # Every piece names its unreadable images; the first one also those dropped before.
                unreadable = {**(reasons if first == 0 else {}), **bad_files.reasons}
                write_tensors(file, columns, {"bad": json.dumps(unreadable)})
            self._remember(bad_files.reasons)
            yield columns
        if folder is not None:
            write(folder / COMPLETE, f"{len(range(0, len(resized), self.rows))}\n")
            sweep(folder)

    def _stored_chunks(self, folder: Path) -> list[Columns]:
        """The pieces on disk, in order, up to the first that is missing or damaged."""
        chunks: list[Columns] = []
        while (file := folder / f"{len(chunks) * self.rows:012}.safetensors").is_file():
            try:
                part, metadata = load_safetensors(file)
            except (OSError, UserError) as error:
                warnings.warn(f"{error}: these features, and those after them, are computed again", stacklevel=2)
                break
            self._remember(json_tree(metadata.get("bad", "{}")))
            chunks.append(part)
        return chunks

    def _remember(self, reasons: dict[str, str]) -> None:
        for path, reason in reasons.items():
            self.bad_files.add(path, reason)


def _is_complete(folder: Path, count: int) -> bool:
    """Whether these are all pieces: the mark holds their number."""
    mark = folder / COMPLETE
    return mark.is_file() and mark.read_text(encoding="utf-8") == f"{count}\n"


def _joined(batches: Iterator[Features], images: Images, before: int, total: int, progress: Progress | None) -> Columns:
    """One piece: all features of ``images``, their labels and tracks."""
    chunks = []
    for part in batches:
        chunks.append(part)
        if progress is not None:
            progress(before + int(part.indices[-1]) + 1, total)
    if not chunks:
        return {"features": torch.zeros(0, 0), "labels": torch.zeros(0, dtype=torch.long)}
    features, labels, indices = (torch.cat(column).contiguous() for column in zip(*chunks, strict=True))
    columns = {"features": features, "labels": labels}
    return columns if images.tracks is None else columns | {"tracks": images.tracks[indices]}
