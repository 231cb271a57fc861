"""The inputs of a training: a source, prepared for the views, as batches; and the monitor of its features."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches, pack
from crosslevel.data.loaders.partners import Partners
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.subsets.select import held_out, take
from crosslevel.methods import Method
from crosslevel.models.encoder import COLOURS, Encoder, View
from crosslevel.training import defaults
from crosslevel.training.monitor import Which, monitor_of
from crosslevel.transforms.views import Views
from crosslevel.utils.console import progress_bar, say
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import BadImage, UserError, counted
from crosslevel.utils.rng import generator

Order = Literal["shuffled", "natural"]
LARGEST_VIEW = 224  # pixels: the default size of views for larger images
LEAST_DEVIATION = 0.02  # least deviation of a channel, such as the opacity of opaque images
STREAM_SAMPLE = 1500  # images of a stream that the report and the monitor see


class Feed(NamedTuple):
    """The training images: as ``opened``, as read in the training, and the unreadable ones.

    ``total`` is the number of opened images, ``length`` the number of training images; None for a stream.
    ``held_out_images`` are not trained on, but used to evaluate the features; ``choices`` has the rule that chose their
    number.
    """

    opened: Images | ImageStream
    source: Images | ImageStream
    bad_files: BadFiles
    total: int | None
    held_out_images: Images | None
    choices: tuple[defaults.Choice, ...]

    @property
    def length(self) -> int | None:
        """N."""
        return len(self.source) if isinstance(self.source, Images) else None


def length(source: Images | ImageStream, epoch_size: int | None) -> int | None:
    """The number of images; a stream has none, and needs ``epoch_size`` instead."""
    if isinstance(source, Images):
        if epoch_size is not None:
            raise UserError(
                f"epoch_size={epoch_size} is for streams: an epoch of {source.name} is all of its {len(source):,} "
                "images: leave it out"
            )
        return len(source)
    if epoch_size is None:
        raise UserError(
            f"{source.name}: nobody knows how many images a stream has before they are read: "
            "give --epoch_size N, the images that count as one epoch"
        )
    return None


def split_held_out(
    opened: Images | ImageStream, requested: int | None, seed: int
) -> tuple[Images | ImageStream, Images | None, tuple[defaults.Choice, ...]]:
    """Split off held-out images; return the training images, the held-out ones, and the rule's choice if there is one.

    Raises:
        UserError: too many images are requested, or some of a stream.

    """
    if isinstance(opened, ImageStream) or requested == 0:
        if requested:
            raise UserError(f"hold_out={requested}: of a stream no image can be held out: leave it out")
        return opened, None, ()
    choices = () if requested is not None or opened.labels is not None else (defaults.hold_out(len(opened)),)
    count = choices[0].value if choices else requested or 0
    if not count:
        return opened, None, ()
    held_out_indices, train_indices = held_out(opened, count, generator(seed, _HELD_OUT))
    return take(opened, train_indices), take(opened, held_out_indices), choices


_HELD_OUT = 3  # a random stream of the seed that the training does not use


def prepared(
    source: Images | ImageStream, encoder: Encoder, views: Views, memory: float, bad_files: BadFiles, console: Console
) -> Images | ImageStream:
    """Choose the views' size and the stem by the images' size; pack square images no larger than a view."""
    side, square = _typical_shape(source.sample(32) if isinstance(source, ImageStream) else source)
    views.adapt(encoder.fixed_size or encoder.suiting(min(LARGEST_VIEW, max(32, side // 32 * 32))))
    _normalize(source, encoder, views, console)
    if encoder.fixed_size not in (None, views.size):
        raise UserError(
            f"views.size={views.size} does not suit {encoder.name}, which is built for {encoder.fixed_size} pixels: "
            "leave it out, or give encoder.image_size"
        )
    encoder.adapt(views.size)
    encoder.view = View(views.size, views.mean, views.std)
    # Packing keeps the centre square: the views would never see the ends of an oblong image.
    if isinstance(source, InMemoryImages | ImageStream) or side > views.size or not square:
        return source
    needed = len(source) * source.channels * views.size**2 / 1e9
    if needed > memory:
        say(
            console,
            f"decoded images would take {needed:.1f} GB, over --memory {memory}: they are decoded in each epoch",
        )
        return source
    with progress_bar(console) as bar:
        task = bar.add_task("decoding images", total=len(source))
        return pack(
            source, views.size, bad_files=bad_files,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )  # fmt: skip


def _normalize(source: Images | ImageStream, encoder: Encoder, views: Views, console: Console) -> None:
    """Normalize views as the weights require; other channels than three by the images' own mean and deviation."""
    if encoder.view.channels == COLOURS:
        if encoder.pretrained:
            views.normalize_by(encoder.view.mean, encoder.view.std)
        return
    views.normalize_by(*_figures(source.sample(STREAM_SAMPLE // 8) if isinstance(source, ImageStream) else source))
    say(
        console,
        f"images of {counted(views.channels, 'channel')}: mean and deviation are their "
        "own; what needs red, green and blue (saturation, hue, grayscale, RandAugment) is left out of the views",
    )


def _figures(source: Images, limit: int = 200) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel in [0, 1], over some images, all with equal weight."""
    sums, count = torch.zeros(2, source.channels, dtype=torch.float64), 0
    for i in torch.linspace(0, len(source) - 1, min(limit, len(source))).long().tolist():
        try:
            pixels = source[i][0].flatten(1).double() / 255
        except BadImage:
            continue
        sums += torch.stack([pixels.mean(1), pixels.square().mean(1)])
        count += 1
    mean, squares = sums / max(1, count)
    std = (squares - mean.square()).clamp(min=0).sqrt().clamp(min=LEAST_DEVIATION)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def batches_of(
    source: Images | ImageStream,
    views: Views,
    epoch_size: int | None,
    order: Order,
    track_positives: float,
    *,
    seed: int,
    **options: Any,
) -> Callable[[int], TrainBatches | StreamBatches]:
    """Return a factory of a training's batches, by the number of images on each device.

    Raises:
        UserError: a stream with another order than its own; positives from tracks without known tracks.

    """
    if track_positives and source.tracks is None:
        raise UserError(
            f"track_positives={track_positives}: {source.name} has no tracks: videos, turntable and @repeat have some, "
            "and @bursts or @bursts=duplicates.csv makes some of folders or of what crosslevel inspect found"
        )
    if isinstance(source, ImageStream):
        if order != "shuffled":
            raise UserError(f"order={order}: the images of a stream come in an order of their own: leave it out")
        return partial(StreamBatches, source, epoch_size=epoch_size or 0, crops=views.crops, seed=seed, **options)
    crops = None if isinstance(source, InMemoryImages) else views.crops
    partners = Partners(source.tracks, track_positives, seed) if track_positives and source.tracks is not None else None
    return partial(TrainBatches, source, crops=crops, order=order, partners=partners, seed=seed, **options)


def size_of(source: Images | ImageStream) -> str:
    """The number of images, or of a stream's shards, in words."""
    return counted(len(source), "image") if isinstance(source, Images) else counted(len(source.shards), "shard")


def usual_monitor(source: Images | ImageStream) -> Which | None:
    """The default monitor; None for streams, whose first images would be read a second time."""
    if isinstance(source, ImageStream):
        return None
    return "label_free" if source.labels is None else "knn"


def watching(
    which: Which | None,
    encoder: Encoder,
    method: Method,
    cld: CrossLevel | None,
    source: Images | ImageStream,
    hardware: Hardware,
    seed: int,
) -> Callable[[], dict[str, float]] | None:
    """Return the monitor of the features; None if nothing is measured."""
    which = which or usual_monitor(source)
    if which is None:
        return None
    sample = source.sample(STREAM_SAMPLE) if isinstance(source, ImageStream) else source
    return monitor_of(which, encoder, method, cld, sample, hardware, seed)


def _typical_shape(source: Images, limit: int = 32) -> tuple[int, bool]:
    """The median shorter side of some images in pixels, and whether all are square (to a tenth)."""
    indices = torch.linspace(0, len(source) - 1, min(limit, len(source))).long().tolist()
    sides, square = [], True
    for i in indices:
        try:
            short, long = sorted(source[i][0].shape[1:])
        except BadImage:
            continue  # reported when the training reads it
        sides.append(short)
        square = square and long <= 1.1 * short
    return (int(statistics.median(sides)) if sides else LARGEST_VIEW), square
