"""What a look at a collection finds without its labels: pictures, sizes, near-duplicates, tracks and groups."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, ImageView
from crosslevel.data.loaders.batches import pack
from crosslevel.data.loaders.records import records
from crosslevel.data.subsets.select import sample, take
from crosslevel.features.cache import FeatureCache
from crosslevel.features.extract import Runtime
from crosslevel.metrics import descriptor, duplicates, long_tail
from crosslevel.models.encoder import Encoder, frozen
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import SourceError

SIDE = descriptor.SIDE
ALIKE_IN_FEATURES = 0.1  # root mean square difference of near-duplicates where the run's features say so as well
PART = 256  # pictures described at a time
CALIBRATED_ON = 512  # images of which two views are compared


class ScanResult(NamedTuple):
    """What one pass over M readable images has found.

    ``pictures`` are all of one small size, whatever the images'; ``shape`` is height and width in pixels;
    ``content`` is a checksum of all pixels; ``places`` are those in the source.
    """

    pictures: UInt8[Tensor, "M 3 32 32"]
    shape: Int64[Tensor, "M 2"]
    content: Int64[Tensor, " M"]
    places: Int64[Tensor, " M"]


class Found(NamedTuple):
    """What the pictures have in common; ``exact`` and ``tracks`` number the images that belong together.

    ``groups`` and their ``separation`` are `long_tail.grouped`'s.
    """

    exact: Int64[Tensor, " M"]
    tracks: Int64[Tensor, " M"]
    groups: Int64[Tensor, " M"]
    by_pixels: int
    by_features: int
    features: Float[Tensor, "M D"]
    separation: float


def look(
    source: Images, bad: BadFiles, workers: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> ScanResult:
    """One pass over the images, some at a time: what stays of each are 3 KB.

    Raises:
        SourceError: fewer than 2 images can be read.

    """
    total, count = len(source), 0
    pictures, shape = torch.empty(total, 3, SIDE, SIDE, dtype=torch.uint8), torch.empty(total, 2, dtype=torch.int64)
    content, places = torch.empty(total, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
    for numbers, glance in records(source, _glance, 256, bad=bad, workers=workers):
        new = slice(count, count + len(numbers))
        pictures[new], shape[new], content[new], places[new] = *glance, numbers
        count = new.stop
        progress(int(numbers[-1]) + 1)
    if count < 2:
        raise SourceError(f"{source.name}: needs at least 2 images, only {count} of {total} can be read")
    return ScanResult(pictures[:count], shape[:count], content[:count], places[:count])


class _Glance(NamedTuple):
    """What stays of one image: a small picture, height and width in pixels, and a checksum of all its pixels."""

    picture: UInt8[Tensor, "3 32 32"]
    shape: Int64[Tensor, 2]
    content: Int64[Tensor, ""]


def _glance(image: UInt8[Tensor, "3 H W"]) -> _Glance:
    content = torch.tensor(zlib.crc32(image.contiguous().numpy().tobytes()))
    return _Glance(tvf.resize(image, [SIDE, SIDE], antialias=True), torch.tensor(image.shape[1:]), content)


def find(
    looked: ScanResult,
    features: Float[Tensor, "M D"] | None = None,
    threshold: float = 1.0,
    groups: int | None = None,
    seed: int = 0,
) -> Found:
    """Duplicates, tracks and groups: from pixels alone, or by the features of a run as well.

    By pixels as in `duplicates.alike_pairs`. Features add pairs that are among each other's nearest, have a cosine of
    at least ``threshold``, and differ by at most twice as much. A chain of near-duplicates, such as a video, is one
    track.
    """
    pictures, count = looked.pictures, len(looked.places)
    hashes, plain = _in_parts(duplicates.perceptual_hash, pictures), _in_parts(descriptor.describe, pictures)
    alike = duplicates.alike_pairs(pictures, hashes, plain)
    close = alike[:0]
    if features is not None:
        close = duplicates.mutual_pairs(features, threshold, duplicates.NEIGHBOURS)
        close = close[descriptor.alike(pictures, close, ALIKE_IN_FEATURES)]
    tracks = duplicates.tracks(count, torch.cat([alike, close]))
    # A CRC of 32 bits may agree by chance, but hardly together with the size and the small picture.
    alike_in_all = torch.column_stack([looked.content, looked.shape, hashes])
    exact = alike_in_all.unique(dim=0, return_inverse=True)[1]
    described = plain if features is None else features
    found = long_tail.grouped(described, tracks, groups, seed)
    return Found(exact, tracks, found.groups, len(alike), len(close), described, found.separation)


def _in_parts(function: Callable[[Tensor], Tensor], pictures: UInt8[Tensor, "M 3 32 32"]) -> Tensor:
    """What ``function`` tells of each picture, of some at a time."""
    first = function(pictures[:PART])
    found = first.new_empty(len(pictures), *first.shape[1:])
    # Kept one by one, small results would lie between what has been freed, and hold its pages: gigabytes.
    for part, place in zip(pictures.split(PART), found.split(PART), strict=True):
        place.copy_(function(part))
    return found


def calibrated(
    encoder: Encoder, shown: UInt8[Tensor, "n 3 s s"], features: Float[Tensor, "n D"], hardware: Hardware, seed: int = 0
) -> float:
    """The cosine from which on two images count as near-duplicates for this encoder.

    The median cosine of two views of the same image (crops of 80 to 100 % of its area), or, where that is higher, the
    cosine that only one in a thousand pairs of random images exceeds. At most 0.999: equal images are duplicates.

    Args:
        encoder: the network.
        shown: some images at the encoder's size.
        features: theirs.
        hardware: where the encoder runs.
        seed: of the crops.

    """
    view, draws = encoder.view, torch.Generator().manual_seed(seed)
    views = Views(
        "cifar", view.size, scale=(0.8, 1.0), flip=0.0, jitter=0.0, grayscale=0.0, mean=view.mean, std=view.std
    )
    network = frozen(encoder).to(hardware.device)
    with torch.inference_mode(), hardware.autocast():
        a, b = (F.normalize(network(x.to(hardware.device)).float().cpu(), dim=1) for x in views(shown, draws))
    unit = F.normalize(features, dim=1)
    others = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    return min(0.999, max(float((a * b).sum(1).median()), float(np.quantile(others.numpy(), 0.999))))


def known_features(
    encoder: Encoder, part: Images, looked: ScanResult, place: Runtime, home: Path, bad: BadFiles, seed: int
) -> tuple[Float[Tensor, "M D"], float]:
    """Features of the readable images, from the run's folder where they are known, and the threshold for them."""
    readable = _Unlabelled(part, looked.places)
    features = FeatureCache(home, place, bad).features("inspect", encoder, readable).features
    some = sample(readable, CALIBRATED_ON, torch.Generator().manual_seed(seed))
    shown = pack(take(readable, some), encoder.view.size, bad=bad, workers=0).data
    return features, calibrated(encoder, shown, features[some], place.hardware, seed)


class _Unlabelled(ImageView):
    """The images ``places`` of a source, without labels and tracks."""

    def __init__(self, source: Images, places: Int64[Tensor, " M"]) -> None:
        super().__init__(source, places)
        self.labels = self.classes = self.tracks = None
        self.places = places

    def content(self) -> Iterable[bytes | memoryview]:
        """Not the identity of the source, which looks at its labels."""
        yield from self.images.content()
        yield self.places.numpy().tobytes()
