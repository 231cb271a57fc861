"""Images through an encoder: features, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.loaders.prefetch import ahead
from crosslevel.models.copies import frozen
from crosslevel.models.encoder import Encoder, View
from crosslevel.utils.device import Hardware, choose
from crosslevel.utils.errors import SourceError

_PIECE = 64  # images that a core encodes at a time: few enough for small ones to stay in its cache

Columns = tuple[Tensor, ...]  # each of as many rows as there are images


class Runtime(NamedTuple):
    """Where and how an encoder runs: ``workers`` processes decode (chosen by a first measurement unless given)."""

    hardware: Hardware
    workers: int | None = None
    batch_size: int = 256


class Features(NamedTuple):
    """Features of M images on the CPU in float32, their labels (-1: none), and their indices in the source."""

    features: Float[Tensor, "M D"]
    labels: Int64[Tensor, " M"]
    indices: Int64[Tensor, " M"]


def stream(
    encoder: Encoder,
    images: Images,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    hardware: Hardware | None = None,
    bad_files: BadFiles | None = None,
    start: int = 0,
) -> Iterator[Features]:
    """Features of ``images`` in order, some at a time: memory does not grow with the number of images.

    A copy of the encoder in evaluation mode is used, so that the encoder stays unchanged. Images that cannot be read
    are recorded in ``bad_files`` and left out.

    Args:
        encoder: the network; its ``view`` says how images are prepared.
        images: the source.
        batch_size: images at a time.
        workers: processes that decode; 0: one thread; None: chosen by a measurement on the first images.
        hardware: device and precision; the best there is unless given.
        bad_files: collects unreadable images.
        start: the first image, to continue an interrupted pass.

    """
    runtime = hardware or choose()
    batches = EvalBatches(
        images,
        batch_size,
        encoder.view.size,
        workers=workers,
        bad_files=bad_files if bad_files is not None else BadFiles(),
        start=start,
    )
    columns = ((batch.images, batch.labels, batch.index) for batch in batches)
    yield from (Features(*part) for part in encoded(encoder, columns, runtime))


def encoded(encoder: Encoder, batches: Iterable[Columns], hardware: Hardware) -> Iterator[Columns]:
    """Batches in order, with features in place of their images.

    Args:
        encoder: the network.
        batches: columns of B rows each; the first is the images, as the encoder's ``view`` wants them.
        hardware: device and precision; on the CPU the batches come back in smaller pieces.

    """
    network = frozen(encoder).to(hardware.device).to(memory_format=torch.channels_last)

    def encode(batch: Columns) -> Columns:
        images, *columns = batch
        with torch.inference_mode(), hardware.autocast():
            pixels = images.to(hardware.device, non_blocking=True)
            features = network(normalize(pixels, encoder.view))
            return (features.float().cpu(), *columns)

    if hardware.device.type != "cpu":
        yield from map(encode, batches)
        return
    pieces = (part for batch in batches for part in zip(*(column.split(_PIECE) for column in batch), strict=True))
    yield from _on_all_cores(encode, pieces)


def _on_all_cores(encode: Callable[[Columns], Columns], batches: Iterable[Columns]) -> Iterator[Columns]:
    """Results in order, each batch on one core.

    The threads of one operation would wait for each other, and so for other work on the cores: here the decoder.
    """
    cores = torch.get_num_threads()
    try:
        yield from ahead(encode, batches, cores, cores, "crosslevel-encode", partial(torch.set_num_threads, 1))
    finally:
        torch.set_num_threads(cores)  # the setting of the pool's threads is inherited by new threads


def extract(
    encoder: Encoder,
    images: Images,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    hardware: Hardware | None = None,
    bad_files: BadFiles | None = None,
) -> Features:
    """All features of ``images`` at once; ``progress`` is called with the number done and the number of all."""
    chunks, bad_files = [], bad_files if bad_files is not None else BadFiles()
    for part in stream(encoder, images, batch_size=batch_size, workers=workers, hardware=hardware, bad_files=bad_files):
        chunks.append(part)
        if progress is not None:
            progress(int(part.indices[-1]) + 1, len(images))
    if not chunks:
        raise SourceError(f"{images.name}: none of its {len(images)} images can be read{bad_files.first}")
    return Features(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def pixels(images: Images, size: int, *, workers: int | None = None, bad_files: BadFiles | None = None) -> Features:
    """Raw pixels as features, D = C * size * size, centred on mid-grey: the baseline for every encoder."""
    bad_files = bad_files if bad_files is not None else BadFiles()
    batches = EvalBatches(images, 1024, size, workers=workers, bad_files=bad_files)
    chunks = [Features(b.images.flatten(1).float() / 127.5 - 1, b.labels, b.index) for b in batches]
    return Features(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def normalize(images: UInt8[Tensor, "B C s s"], view: View) -> Float[Tensor, "B C s s"]:
    """Normalize bytes as in the encoder's training; channels last."""
    mean = torch.tensor(view.mean, device=images.device).view(1, -1, 1, 1) * 255
    scale = 1 / (torch.tensor(view.std, device=images.device).view(1, -1, 1, 1) * 255)
    return ((images - mean) * scale).contiguous(memory_format=torch.channels_last)
