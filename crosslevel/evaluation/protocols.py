"""The protocols that `crosslevel evaluate` knows, each for several kinds of features on the same images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor, nn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.evaluation.finetune import FineTune, Semi, few_labels, fine_tuned, on_views
from crosslevel.evaluation.linear import Linear, choose
from crosslevel.evaluation.scores import Scores, Truth, truth
from crosslevel.features.cache import CachedFeatures, FeatureCache
from crosslevel.features.extract import Runtime, pixels
from crosslevel.metrics.bootstrap import intervals
from crosslevel.metrics.clustering import agreement, clusters, matching
from crosslevel.metrics.knn import neighbours, weighted_knn
from crosslevel.metrics.retrieval import mean_figures, ranked
from crosslevel.metrics.shots import Shots, split_by_frequency
from crosslevel.models.encoder import Encoder
from crosslevel.utils.console import progress_bar
from crosslevel.utils.rng import seeded

PIXELS: Literal["pixels"] = "pixels"
"""The kind of features that uses raw pixels, at `PIXEL_SIZE`."""

PIXEL_SIZE = 32

Kind = Encoder | Literal["pixels"]
Row = dict[str, Scores]
"""The results of a protocol, by kind of features."""

MEAN_PER_CLASS = ("aircraft", "aircrafts", "caltech", "flower", "flowers", "pet", "pets")
"""Data sets whose papers report the mean of the classes' accuracies (Kornblith et al., CVPR 2019, table 1)."""


class SmallPictures(NamedTuple):
    """Readable images at `PIXEL_SIZE`, and their names."""

    data: UInt8[Tensor, "M C s s"]
    paths: list[str]


@dataclass
class Subject:
    """The encoders to evaluate, and the images to evaluate them on.

    ``kinds`` are encoders by name, or `PIXELS`. ``bank`` has the labelled training images, ``queries`` the images to
    classify. Features and unfinished trainings are kept in ``run_dir``, the run's folder. ``branches`` are heads on the
    last encoder's features, for protocols that only need features.
    """

    kinds: dict[str, Kind]
    bank: Images
    queries: Images
    runtime: Runtime
    bad_files: BadFiles = field(default_factory=BadFiles)
    run_dir: Path | None = None
    branches: dict[str, nn.Module] = field(default_factory=dict)
    console: Console | None = None
    shots: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.cache = FeatureCache(self.run_dir, self.runtime, self.bad_files)
        self._pixels: dict[int, CachedFeatures] = {}
        self._readable: dict[int, Tensor] = {}

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The kinds that can be trained."""
        return {name: kind for name, kind in self.kinds.items() if isinstance(kind, Encoder)}

    @property
    def split(self) -> Shots | None:
        """Many-, medium- and few-shot classes of the bank."""
        assert self.bank.labels is not None
        return split_by_frequency(torch.bincount(self.bank.labels, minlength=len(self.bank.classes or [])), self.shots)

    @property
    def names(self) -> list[str]:
        """The names of all kinds of features."""
        return [*self.kinds, *self.branches]

    def features_of(self, name: str) -> tuple[CachedFeatures, CachedFeatures]:
        """Features of the bank and of the queries."""
        if name in self.branches:
            bank, queries = self.features_of(list(self.encoders)[-1])
            with torch.no_grad():
                heads = [self.branches[name](part.features) for part in (bank, queries)]
            return bank._replace(features=heads[0]), queries._replace(features=heads[1])
        kind = self.kinds[name]
        return self._computed(name, kind, self.bank), self._computed(name, kind, self.queries)

    def _computed(self, name: str, kind: Kind, images: Images) -> CachedFeatures:
        if isinstance(kind, Encoder):
            with self.progress(name) as progress:
                return self.cache.features(name, kind, images, progress)
        if id(images) not in self._pixels:
            size = max([encoder.view.size for encoder in self.encoders.values()], default=PIXEL_SIZE)
            resized = self.cache.decoded(images, size)
            pixel_features = pixels(resized, PIXEL_SIZE, workers=self.runtime.workers, bad_files=self.bad_files)
            self._readable[id(images)] = pixel_features.indices
            tracks = None if resized.tracks is None else resized.tracks[pixel_features.indices]
            self._pixels[id(images)] = CachedFeatures(pixel_features.features, pixel_features.labels, tracks)
        return self._pixels[id(images)]

    def small_pictures(self) -> tuple[SmallPictures, SmallPictures] | None:
        """The bank and the queries at `PIXEL_SIZE`, if a protocol has evaluated their pixels; otherwise None."""
        if not {id(self.bank), id(self.queries)} <= set(self._pixels):
            return None
        return self._small(self.bank), self._small(self.queries)

    def _small(self, images: Images) -> SmallPictures:
        values = self._pixels[id(images)].features
        data = ((values + 1) * 127.5).round().clamp(0, 255).byte().view(-1, images.channels, PIXEL_SIZE, PIXEL_SIZE)
        return SmallPictures(data, [images.paths[i] for i in self._readable[id(images)].tolist()])

    def truth(self, bank: CachedFeatures, queries: CachedFeatures) -> Truth:
        """The labels of both sets of features."""
        return truth(bank.labels, self.bank.classes or [], queries.labels, self.queries.classes or [], self.shots)

    def key(self, name: str, images: Images) -> dict[str, str]:
        """The cache key of a training of encoder ``name`` on ``images``."""
        return {"features": self.cache.key(self.encoders[name], images)}

    def generator(self) -> torch.Generator:
        """A new generator from the seed."""
        return seeded(self.seed)

    @contextmanager
    def progress(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar, if there is a console."""
        with progress_bar(self.console) as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)


def knn(subject: Subject, k: int | None = None, temperature: float = 0.1) -> dict[str, Row]:
    """The temperature-weighted nearest neighbours' vote (Wu et al., CVPR 2018, sec. 3.4), `neighbours` unless given."""
    row, k = {}, k or neighbours(len(subject.bank))
    for name in subject.names:
        bank, queries = subject.features_of(name)
        labels = subject.truth(bank, queries)
        votes = weighted_knn(bank.features, bank.labels, queries.features, len(labels.counts), k, temperature)
        row[name] = labels.judge(votes)
    return {f"kNN, k = {k}, T = {temperature}": row}


def linear(subject: Subject, config: Linear) -> dict[str, Row]:
    """A linear classifier on frozen features: the best of a sweep, or the classic one on random views."""
    row = {}
    for name in subject.encoders if config.augmented else subject.names:
        bank, queries = subject.features_of(name)
        labels = subject.truth(bank, queries)
        with subject.progress(f"linear classifier, {name}") as progress:
            if config.augmented:
                row[name] = labels.judge(_classic(subject, name, config, queries, progress))
                continue
            best = choose(bank.features, bank.labels, len(labels.counts), config, subject.generator(), progress)
        hyperparameters = {"lr": best.lr, "weight_decay": best.weight_decay, "held_out": 100 * best.held_out_accuracy}
        row[name] = labels.judge(best.classifier.scores(queries.features)[:, 0], hyperparameters)
    return {"linear, on views" if config.augmented else "linear": row}


def _classic(
    subject: Subject, name: str, config: Linear, queries: CachedFeatures, progress: Callable[[int, int], None] | None
) -> Tensor:
    encoder, classes = subject.encoders[name], len(subject.bank.classes or [])
    classifier = on_views(
        encoder, _trained_on(subject, encoder, subject.bank), classes, config, subject.runtime, subject.bad_files,
        seed=subject.seed, run_dir=subject.run_dir, key=subject.key(name, subject.bank), progress=progress,
    )  # fmt: skip
    with torch.no_grad():
        scores: Tensor = classifier(queries.features)
    return scores


def semi(subject: Subject, config: Semi) -> dict[str, Row]:
    """The whole network fine-tuned with few labels, beside the same network trained with them from scratch."""
    subsets = few_labels(subject.bank, config, subject.seed)
    return {f"semi-supervised, {title}": _fine_tuned(subject, part, config, title) for title, part in subsets.items()}


def transfer(subject: Subject, config: FineTune, sweep: Linear) -> dict[str, Row]:
    """Accuracy on this data set: of a linear classifier on the features, and of the fine-tuned network."""
    return {
        "transfer, linear": linear(subject, sweep).popitem()[1],
        "transfer, fine-tuned": _fine_tuned(subject, subject.bank, config, "all labels"),
    }


def _fine_tuned(subject: Subject, images: Images, config: FineTune, title: str) -> Row:
    row, classes = {}, subject.bank.classes or []
    assert images.labels is not None
    for name, encoder in subject.encoders.items():
        resized = _trained_on(subject, encoder, images)
        with subject.progress(f"fine-tuning, {title}, {name}") as progress:
            scores, labels = fine_tuned(
                encoder, resized, len(classes), subject.cache.decoded(subject.queries, encoder.view.size), config,
                subject.runtime, subject.bad_files, seed=subject.seed, run_dir=subject.run_dir,
                key=subject.key(name, images), progress=progress, console=subject.console,
            )  # fmt: skip
        scored = truth(images.labels, classes, labels, subject.queries.classes or [], subject.shots)
        row[name] = scored.judge(scores)
    return row


def _trained_on(subject: Subject, encoder: Encoder, images: Images) -> Images:
    """Images for training: small ones are decoded once, crops of large ones are cut from the file each time."""
    size = encoder.view.size
    return subject.cache.decoded(images, size) if size <= 64 else images


def retrieval(subject: Subject) -> dict[str, Row]:
    """Search the nearest test images of each test image: those of its class, and, with tracks, those of its track.

    In the search by class, images of the query's own track are left out.
    """
    queries = {name: subject.features_of(name)[1] for name in subject.names}
    tables = {
        "retrieval, by class": {name: _ranked(subject, a.features, a.labels, a.tracks) for name, a in queries.items()}
    }
    if all(a.tracks is not None for a in queries.values()):
        tables["retrieval, by track"] = {
            name: _ranked(subject, a.features, a.tracks, None) for name, a in queries.items() if a.tracks is not None
        }
    return tables


def _ranked(subject: Subject, features: Tensor, labels: Tensor, tracks: Tensor | None) -> Scores:
    table = ranked(features, labels, tracks)
    spread = {name: intervals(column, generator=subject.generator()) for name, column in table.items()}
    return Scores(mean_figures(table), spread)


def clustering(subject: Subject, count: int | None = None) -> dict[str, Row]:
    """K-means on the test images' features, compared with their labels; as many clusters as classes unless given."""
    row = {}
    for name in subject.names:
        _, queries = subject.features_of(name)
        cluster_count = count or len(queries.labels.unique())
        assignment = clusters(queries.features, cluster_count, seed=subject.seed)
        right = matching(assignment, queries.labels)[assignment] == queries.labels
        spread = {"accuracy": intervals(right, generator=subject.generator())}
        row[name] = Scores(agreement(assignment, queries.labels), spread)
    return {"clustering": row}


def convention(name: str) -> Literal["balanced", "top1"]:
    """The accuracy that papers report for the data set ``name``."""
    words = re.split(r"[^a-z]+", name.lower())
    return "balanced" if any(word in MEAN_PER_CLASS for word in words) else "top1"
