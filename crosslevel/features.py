"""Images through an encoder: features, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from crosslevel.encoder import Encoder, View
from crosslevel.hardware import Hardware, choose
from crosslevel.images import Images
from crosslevel.images.batches import EvalBatches
from crosslevel.images.health import BadFiles


class Features(NamedTuple):
    """Features of M images on the CPU in float32, their labels (-1: none), and their places in the source."""

    features: Float[Tensor, "M D"]
    labels: Int64[Tensor, " M"]
    places: Int64[Tensor, " M"]


def stream(
    encoder: Encoder,
    images: Images,
    *,
    batch_size: int = 256,
    workers: int = 0,
    hardware: Hardware | None = None,
    bad: BadFiles | None = None,
    start: int = 0,
) -> Iterator[Features]:
    """Features of ``images`` in order, a batch at a time: memory does not grow with the number of images.

    The encoder is used in evaluation mode and left as it was found. Images that cannot be read are recorded
    in ``bad`` and left out.

    Args:
        encoder: the network; its ``view`` says how images are prepared.
        images: the source.
        batch_size: images at a time.
        workers: processes that decode; 0: one thread, best for small images.
        hardware: device and precision; the best there is unless given.
        bad: collects what could not be read.
        start: the first image, to continue an interrupted pass.

    """
    place = hardware or choose()
    batches = EvalBatches(
        images,
        batch_size,
        encoder.view.size,
        workers=workers,
        bad=bad if bad is not None else BadFiles(),
        start=start,
    )
    training = encoder.training
    encoder.to(place.device).to(memory_format=torch.channels_last).eval()
    try:
        for batch in batches:
            shown = batch.images.to(place.device, non_blocking=True)
            with torch.inference_mode(), place.autocast():
                features = encoder(normalize(shown, encoder.view))
            yield Features(features.float().cpu(), batch.labels, batch.index)
    finally:
        encoder.train(training)


def extract(
    encoder: Encoder,
    images: Images,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    hardware: Hardware | None = None,
    bad: BadFiles | None = None,
) -> Features:
    """All features of ``images`` at once; ``progress`` is told how many of how many are done."""
    parts = []
    for part in stream(encoder, images, batch_size=batch_size, workers=workers, hardware=hardware, bad=bad):
        parts.append(part)
        if progress is not None:
            progress(int(part.places[-1]) + 1, len(images))
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def pixels(images: Images, size: int, *, workers: int = 0, bad: BadFiles | None = None) -> Features:
    """Raw pixels as features, D = 3 * size * size, centred on mid-grey: what any encoder has to beat."""
    batches = EvalBatches(images, 1024, size, workers=workers, bad=bad if bad is not None else BadFiles())
    parts = [Features(b.images.flatten(1).float() / 127.5 - 1, b.labels, b.index) for b in batches]
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def normalize(images: UInt8[Tensor, "B 3 s s"], view: View) -> Float[Tensor, "B 3 s s"]:
    """Bytes to the numbers that the encoder was trained on, channels last."""
    mean = torch.tensor(view.mean, device=images.device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(view.std, device=images.device).view(1, 3, 1, 1) * 255)
    return ((images - mean) * scale).contiguous(memory_format=torch.channels_last)
