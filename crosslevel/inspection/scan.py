"""The structure of a collection without labels: duplicates, tracks and groups, by pixels or a run's features."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.descriptor import alike, describe
from crosslevel.data.duplicates.detect import Pairs, duplicate_pairs, in_parts, tracks
from crosslevel.data.duplicates.scan import ScanResult
from crosslevel.data.duplicates.sets import with_exact
from crosslevel.data.images import Images, ImageView
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.select import sample, take
from crosslevel.features.cache import FeatureCache
from crosslevel.features.extract import Runtime
from crosslevel.metrics import long_tail
from crosslevel.metrics.nearest import mutual_pairs
from crosslevel.models.copies import frozen
from crosslevel.models.encoder import Encoder
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.rng import seeded

ALIKE_IN_FEATURES = 0.1  # root mean square difference of near-duplicates that are also close by the run's features
NEIGHBOURS = 6  # nearest neighbours by features; the two of a pair must be among each other's
CALIBRATED_ON = 512  # images whose two views are compared


class Structure(NamedTuple):
    """Duplicates, tracks and groups of M pictures; ``tracks`` has the number of each image's track.

    ``pairs`` are the duplicates and near-duplicates by pixels, ``by_features`` counts those added by features;
    ``groups`` and their ``separation`` come from `long_tail.grouped`.
    """

    pairs: Pairs
    tracks: Int64[Tensor, " M"]
    groups: Int64[Tensor, " M"]
    by_features: int
    features: Float[Tensor, "M D"]
    separation: float


def structure(
    scanned: ScanResult,
    features: Float[Tensor, "M D"] | None = None,
    threshold: float = 1.0,
    groups: int | None = None,
    seed: int = 0,
) -> Structure:
    """Duplicates, tracks and groups: from pixels alone, or by the features of a run as well.

    Pairs by pixels are those of `duplicate_pairs`. Features add pairs that are among each other's nearest, have a
    cosine of at least ``threshold``, and differ in pixels by at most twice the limit.
    """
    pictures, count = scanned.pictures, len(scanned.numbers)
    plain, pairs = in_parts(describe, pictures), with_exact(scanned, duplicate_pairs(pictures))
    close = pairs.images[:0]
    if features is not None:
        close = mutual_pairs(features, threshold, NEIGHBOURS)
        close = close[alike(pictures, close, ALIKE_IN_FEATURES)]
    tracked = tracks(count, torch.cat([pairs.images, close]))
    described = plain if features is None else features
    grouped = long_tail.grouped(described, tracked, groups, seed)
    return Structure(pairs, tracked, grouped.groups, len(close), described, grouped.separation)


def calibrated(
    encoder: Encoder,
    images: UInt8[Tensor, "n 3 s s"],
    features: Float[Tensor, "n D"],
    hardware: Hardware,
    seed: int = 0,
) -> float:
    """The cosine from which on two images count as near-duplicates for this encoder.

    The threshold is the larger of two cosines: the median of two views of the same image (crops of 80 to 100 % of its
    area), and the value that only one in a thousand pairs of random images exceeds. It is at most 0.999, as equal
    images are duplicates.

    Args:
        encoder: the network.
        images: some images at the encoder's size.
        features: the features of these images.
        hardware: where the encoder runs.
        seed: of the crops.

    """
    view, generator = encoder.view, seeded(seed)
    views = Views(
        "cifar", view.size, scale=(0.8, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, mean=view.mean, std=view.std
    )
    network = frozen(encoder).to(hardware.device)
    with torch.inference_mode(), hardware.autocast():
        a, b = (F.normalize(network(x.to(hardware.device)).float().cpu(), dim=1) for x in views(images, generator))
    unit = F.normalize(features, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return min(0.999, max(float((a * b).sum(1).median()), float(np.quantile(cosines.numpy(), 0.999))))


def run_features(
    encoder: Encoder,
    part: Images,
    scanned: ScanResult,
    runtime: Runtime,
    run_dir: Path | None,
    bad_files: BadFiles,
    seed: int,
) -> tuple[Float[Tensor, "M D"], float]:
    """Features of the readable images, from the cache in the run's folder, and the threshold for them."""
    readable = _Unlabelled(part, scanned.numbers)
    features = FeatureCache(run_dir, runtime, bad_files).features("inspect", encoder, readable).features
    index = sample(readable, CALIBRATED_ON, seeded(seed))
    images = pack(take(readable, index), encoder.view.size, bad_files=bad_files, workers=0).data
    return features, calibrated(encoder, images, features[index], runtime.hardware, seed)


class _Unlabelled(ImageView):
    """The images ``numbers`` of a source, without labels and tracks."""

    def __init__(self, source: Images, numbers: Int64[Tensor, " M"]) -> None:
        super().__init__(source, numbers)
        self.labels = self.classes = self.tracks = None
        self.numbers = numbers

    def content(self) -> Iterable[bytes | memoryview]:
        """The source's content, which does not depend on labels as its identity does."""
        yield from self.images.content()
        yield self.numbers.numpy().tobytes()
