"""Figures that are logged during training and never influence it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates import detect
from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.select import sample, stretches, take
from crosslevel.features.extract import Features, extract
from crosslevel.methods import Method
from crosslevel.metrics import label_free
from crosslevel.metrics.knn import neighbours, weighted_knn
from crosslevel.metrics.spectrum import effective_rank
from crosslevel.models.copies import frozen
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Unreadable
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.rng import seeded
from crosslevel.utils.tensors import as_rgb

Which = Literal["knn", "label_free", "both"]
Measure = Callable[[], dict[str, float]]

PROBED, PIXELS = 2000, 50_000_000  # the most images for scores, and their most pixels together
PIECES = 4  # a track with over half of the images is cut into parts of at most a quarter of all images


class Watch(Protocol):
    """The interface of another program that watches a run."""

    def part(self, source: Images) -> Images:
        """The part of ``source`` to train on, without labels."""

    def monitor(
        self, encoder: Encoder, method: Method, cld: CrossLevel | None, hardware: Hardware, unreadable: Unreadable
    ) -> Measure | None:
        """Return the measurement at the end of an epoch; ``unreadable`` collects the files that cannot be read."""


def monitor_of(
    which: Which | None,
    encoder: Encoder,
    method: Method | None,
    cld: CrossLevel | None,
    source: Images,
    hardware: Hardware,
    seed: int,
) -> Measure | None:
    """The monitor that ``which`` names; for the kNN accuracy, None if the source has no labels.

    Raises:
        UserError: kNN accuracy is requested, but impossible.

    """
    if which is not None and which != "label_free" and source.labels is None:
        raise UserError(f"--monitor {which} needs labels, {source.name} has none: give --monitor label_free")
    if which is None:
        which = "label_free" if source.labels is None else "knn"
    measures = []
    if which != "label_free":
        measures.append(knn_monitor(encoder, source, hardware, seed))
    if which != "knn":
        measures.append(label_free_monitor(encoder, method, cld, source, hardware, seed))
    available = [measure for measure in measures if measure is not None]
    return (lambda: {name: value for measure in available for name, value in measure().items()}) if available else None


def label_free_monitor(
    encoder: Encoder, method: Method | None, cld: CrossLevel | None, source: Images, hardware: Hardware, seed: int
) -> Measure | None:
    """A monitor with `scored` on up to 2,000 training images (fewer if they are large), the same each time.

    If no tracks are known, near-duplicates by pixels count as tracks; long tracks are cut (`tracks_for_scores`).
    ``instance_rank`` and ``group_rank`` are the effective ranks of ``method``'s and ``cld``'s features.
    """
    size = encoder.view.size
    generator = seeded(seed)
    indices = sample(source, min(PROBED, PIXELS // size**2), generator)
    try:
        part = pack(take(source, indices), size, bad_files=BadFiles())
    except SourceError:
        return None  # none of them can be read; the training reports that
    if len(part) < 4:
        return None
    tracks = tracks_for_scores(part)
    return lambda: scored(encoder, method, cld, part, hardware, seed, tracks)


@torch.inference_mode()
def scored(
    encoder: Encoder,
    method: Method | None,
    cld: CrossLevel | None,
    images: InMemoryImages,
    hardware: Hardware,
    seed: int,
    tracks: Int64[Tensor, " N"] | None,
) -> dict[str, float]:
    """`metrics.label_free.scores` of two views of the images, drawn alike each time, and the ranks of the branches.

    The views are those of the preset ``cifar``, whatever the run trains on, so that runs with different views can be
    compared. Empty if the features are not finite.
    """
    network = frozen(encoder).to(hardware.device)
    views = Views("cifar", encoder.view.size, mean=encoder.view.mean, std=encoder.view.std).to(hardware.device)
    generator = seeded(seed)
    view_features: list[list[Tensor]] = [[], []]
    for part in images.data.split(256):
        for features, view in zip(view_features, views(part.to(hardware.device), generator), strict=True):
            with hardware.autocast():
                features.append(network(view.contiguous(memory_format=torch.channels_last)).float())
    a, b = (torch.cat(features) for features in view_features)
    if not bool(a.isfinite().all() & b.isfinite().all()):
        return {}
    projected = [] if method is None else [_projected(method, h) for h in (a, b)]
    figures = {"instance_rank": effective_rank(projected[0])} if projected else {}
    clusters = seeded(seed)
    if cld is None:
        return figures | label_free.scores(a, b, tracks=tracks, generator=clusters)
    instance_a, instance_b = projected or (None, None)
    group_a, group_b = cld.project(a), cld.project(b)
    figures["group_rank"] = effective_rank(group_a)
    return figures | label_free.scores(
        a, b, group_a, group_b, tracks, clusters, instance_a=instance_a, instance_b=instance_b
    )


def tracks_for_scores(images: InMemoryImages) -> Int64[Tensor, " N"]:
    """The images' tracks, or sets of near-duplicates if there are none; a track with over half of the images is cut."""
    tracks = near_tracks(images) if images.tracks is None else images.tracks
    largest = int(tracks.unique(return_counts=True)[1].max())
    return tracks if 2 * largest <= len(images) else stretches(tracks, len(images) // PIECES)


def near_tracks(images: InMemoryImages) -> Int64[Tensor, " N"]:
    """Sets of near-duplicates by pixels, for images without known tracks."""
    small = tvf.resize(as_rgb(images.data), [SIDE, SIDE], antialias=True)
    return detect.tracks(len(images), detect.duplicate_pairs(small).images)


def _projected(method: Method, features: Tensor) -> Tensor:
    """The instance features, computed by a copy, so that running statistics and modes do not change."""
    z: Tensor = copy.deepcopy(method.branch).eval()(features)
    return z


def knn_monitor(encoder: Encoder, source: Images, hardware: Hardware, seed: int) -> Measure | None:
    """A monitor of the kNN accuracy of 1,000 images among 5,000 others, no track on both sides, and their rank."""
    if source.labels is None or len(source) < 20:
        return None
    split = labelled_split(source, seed)
    if split is None:
        return None

    def measure() -> dict[str, float]:
        features = extract(encoder, split.part, hardware=hardware)
        accuracy = 100 * float(split.right(features).double().mean())
        finite = bool(features.features.isfinite().all())
        return {"knn": accuracy, **({"effective_rank": effective_rank(features.features[:2000])} if finite else {})}

    return measure


class LabelledSplit(NamedTuple):
    """A labelled sample: ``part`` has first the ``queries``, then the ``keys``, which vote for them."""

    part: Images
    queries: int
    keys: int
    classes: int

    def right(self, extracted: Features) -> Bool[Tensor, " Q"]:
        """Whether kNN with these features of ``part`` predicts each query's label."""
        is_query = extracted.indices < self.queries
        votes = weighted_knn(
            extracted.features[~is_query], extracted.labels[~is_query], extracted.features[is_query], self.classes,
            k=neighbours(len(self.part)),
        )  # fmt: skip
        return votes.argmax(1) == extracted.labels[is_query]


def labelled_split(source: Images, seed: int) -> LabelledSplit | None:
    """Up to 1,000 images of a labelled source, and 5,000 others, no track on both sides; None if impossible.

    It is impossible without labels, or with too few tracks.
    """
    if source.labels is None:
        return None
    queries, keys = queries_and_keys(source, seed)
    if not len(queries):
        return None
    part = take(source, torch.cat([queries, keys]))
    return LabelledSplit(part, len(queries), len(keys), int(source.labels.max()) + 1)


def queries_and_keys(images: Images, seed: int) -> tuple[Int64[Tensor, " Q"], Int64[Tensor, " M"]]:
    """Sample queries from every sixth track, and keys from the other tracks: at most 1,000 and 5,000."""
    generator = seeded(seed)
    tracks = torch.arange(len(images)) if images.tracks is None else images.tracks
    names, owner = tracks.unique(return_inverse=True)
    position = torch.randperm(len(names), generator=generator)[owner]
    order = torch.randperm(len(tracks), generator=generator)
    is_query = position[order] < len(names) // 6
    return order[is_query][:1000], order[~is_query][:5000]
