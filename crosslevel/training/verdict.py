"""The verdict on a training: its features compared with raw pixels and with the same network untrained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.select import sample, take
from crosslevel.features.extract import extract, pixels
from crosslevel.metrics.label_free import retrieval_ranks
from crosslevel.models.copies import frozen, untrained
from crosslevel.models.encoder import Encoder
from crosslevel.training.monitor import PIXELS, PROBED, labelled_split, tracks_for_scores
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.rng import seeded

LEAST = 40  # images: fewer give no verdict
SMALL = 32  # pixels a side of raw pixels that are judged by labels, as in `evaluate`: of 5,000 images they fit anywhere


class Verdict(NamedTuple):
    """For each kind of features, which of N images it gets right, and a description of what right means.

    ``start`` has those of the weights that the training began with, if any. ``tracks`` has the track of each image:
    those of one track are right or wrong together, and count as one draw.
    """

    trained: Bool[Tensor, " N"]
    pixels: Bool[Tensor, " N"]
    untrained: Bool[Tensor, " N"]
    measure: str
    start: Bool[Tensor, " N"] | None = None
    tracks: Int64[Tensor, " N"] | None = None

    def line(self) -> str:
        """One line: the shares, whether the training is clearly better than both others, and advice if not."""
        finding, advice = self._finding()
        return f"{self._shares()}: the training {finding}{advice and ': ' + advice}"

    def headline(self) -> str:
        """The verdict as sentences, the finding first."""
        finding, advice = self._finding()
        sentences = [
            f"The training {finding}.",
            f"{self._shares()}.",
            *([f"{advice[0].upper()}{advice[1:]}."] if advice else []),
        ]
        return " ".join(sentences)

    def _shares(self) -> str:
        shares = [100 * float(kind.double().mean()) for kind in self[:3]]
        start = "" if self.start is None else f"start (frozen) {100 * float(self.start.double().mean()):.1f} %, "
        return (
            f"{self.measure}: trained {shares[0]:.1f} %, {start}raw pixels {shares[1]:.1f} %, untrained "
            f"{shares[2]:.1f} %"
        )

    def _finding(self) -> tuple[str, str]:
        """The finding about the training, and the advice.

        Clearly better means: the mean difference, image by image, from the better baseline exceeds 1.96 standard
        errors, which are those of clusters where images have tracks (Liang and Zeger 1986).
        """
        baselines = [("raw pixels", self.pixels), ("the untrained network", self.untrained)]
        baselines += [] if self.start is None else [("the weights that it began with", self.start)]
        name, best = max(baselines, key=_share)
        gain = self.trained.double() - best.double()
        margin = 196 * _standard_error(gain, self.tracks)
        difference = 100 * float(gain.mean())
        if difference > margin:
            return f"is worth {difference:.1f} (±{margin:.1f}) points over {name}", ""
        finding = "is below" if difference < -margin else "is not clearly above"
        advice = "more steps help first, by --epochs, --minutes or a smaller --batch_size; then crosslevel tune"
        return f"{finding} {name} ({difference:+.1f} ±{margin:.1f})", advice


def _share(pair: tuple[str, Tensor]) -> float:
    return float(pair[1].double().mean())


def _standard_error(gain: Float64[Tensor, " N"], tracks: Int64[Tensor, " N"] | None) -> float:
    """The standard error of the mean of N independent images, or of those of at least two tracks."""
    names = torch.arange(len(gain)) if tracks is None else tracks.unique(return_inverse=True)[1]
    count = int(names.max()) + 1
    sums = gain.new_zeros(count).index_add(0, names, gain - gain.mean())
    return math.sqrt(float(sums.square().sum()) * count / (count - 1)) / len(gain)


def verdict(
    encoder: Encoder,
    source: Images,
    hardware: Hardware,
    seed: int,
    held_out_images: Images | None = None,
    start: Encoder | None = None,
) -> Verdict | None:
    """Compare the features by kNN with the source's labels, or by whether an image's other view is the nearest.

    Args:
        encoder: the trained one.
        source: the images that were trained on; their labels were not.
        hardware: device and precision.
        seed: of the untrained network, and of the sample of images.
        held_out_images: the images to evaluate without labels; unless given, some of the training images are used, and
            the line says so.
        start: the encoder before the training.

    Returns:
        None for too few images.

    """
    if len(source) < LEAST:
        return None
    encoders = [encoder, untrained(encoder, seed), *([] if start is None else [start])]
    by_labels = _by_labels(encoders, source, hardware, seed) if source.labels is not None else None
    return by_labels or _by_views(encoders, held_out_images or source, hardware, seed, held_out_images is not None)


def _by_labels(encoders: list[Encoder], source: Images, hardware: Hardware, seed: int) -> Verdict | None:
    """KNN of up to 1,000 images among 5,000 others, no track on both sides; None for one class or one track."""
    split = labelled_split(source, seed)
    if split is None or split.keys < LEAST // 2:
        return None
    raw = pixels(split.part, min(SMALL, encoders[0].view.size))
    tracks = None if split.part.tracks is None else split.part.tracks[raw.indices[raw.indices < split.queries]]
    if len(raw.labels.unique()) < 2 or (tracks is not None and len(tracks.unique()) < 2):
        return None
    correct = [split.right(extract(encoder, split.part, hardware=hardware)) for encoder in encoders]
    return Verdict(
        correct[0], split.right(raw), correct[1],
        f"kNN accuracy by the labels of {len(correct[0]):,} images trained on", next(iter(correct[2:]), None), tracks,
    )  # fmt: skip


@torch.inference_mode()
def _by_views(encoders: list[Encoder], source: Images, hardware: Hardware, seed: int, held_out: bool) -> Verdict | None:
    """The share of up to 2,000 images whose one view is the nearest neighbour of the other."""
    view = encoders[0].view
    size = view.size
    indices = sample(source, min(PROBED, PIXELS // size**2), seeded(seed))
    part = pack(take(source, indices), size, bad_files=BadFiles())
    if len(part) < LEAST:
        return None
    tracks = tracks_for_scores(part)
    views = Views("cifar", size, mean=view.mean, std=view.std).to(hardware.device)

    def right(network: Callable[[Tensor], Tensor]) -> Tensor:
        generator, features = seeded(seed), []
        for chunk in part.data.split(256):
            pair = views(chunk.to(hardware.device), generator)
            with hardware.autocast():
                features.append([network(v.contiguous(memory_format=torch.channels_last)).float().cpu() for v in pair])
        a, b = (torch.cat(side) for side in zip(*features, strict=True))
        return retrieval_ranks(a, b, tracks) == 1

    correct = [right(frozen(encoder).to(hardware.device)) for encoder in encoders]
    return Verdict(
        correct[0], right(lambda view: view.flatten(1)), correct[1],
        f"of {len(part):,} images {'held out' if held_out else 'trained on'}, those whose other view is the nearest",
        next(iter(correct[2:]), None), tracks,
    )  # fmt: skip
