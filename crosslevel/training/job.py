"""A training before its first step: opens the images, makes the parts, and chooses the open settings."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.console import Console

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images, open_unlabelled
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.subsets.lists import write_list
from crosslevel.features.source import reads_of
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run
from crosslevel.settings import describe
from crosslevel.training.components import Components, assemble, bases
from crosslevel.training.inputs import Feed, batches_of, length, prepared, size_of, split_held_out, usual_monitor
from crosslevel.training.loop.fit import Batches
from crosslevel.training.monitor import Watch
from crosslevel.training.options import Data, Logging, Makers, Optimization, Runtime, figures_every, tree, workers_of
from crosslevel.training.plan import Plan, settle
from crosslevel.transforms.views import Views
from crosslevel.utils.console import say
from crosslevel.utils.errors import UserError, counted


@dataclass(frozen=True)
class Job:
    """A training that is ready to begin.

    ``start`` is the encoder before the training, if it has more than random weights; the result is compared with it.
    ``start_time`` is when its preparation began, in seconds of `time.monotonic`.
    """

    data: Data
    runtime: Runtime
    logging: Logging
    feed: Feed
    components: Components
    plan: Plan
    share_hidden: bool
    watch: Watch | None
    console: Console
    resumed: bool
    start: Encoder | None
    start_time: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """The default name of a run."""
        return f"{self.data.images.short}-{self.components.kind}"

    @property
    def overview(self) -> str:
        """A description of images, steps, views and networks, for the user."""
        views, steps = self.components.views, f"{counted(len(self.plan.batches), 'step')} an epoch"
        description = f"{views.count - views.small} views of {views.size} pixels"
        description += f" and {views.small} of {views.small_side}" if views.small else ""
        return f"{size_of(self.feed.source)}, {steps}, {description}; {self.components.described}"

    @property
    def notes(self) -> list[str]:
        """The rules' choices with reasons, and how long the loss may rise at first."""
        batches = self.plan.batches
        rise = self.components.method.early_rise(batches.batch_size * self.runtime.world.size, len(batches))
        return [*(f"chosen: {choice}" for choice in self.plan.choices), *([rise] if rise else [])]

    def changed_images(self, folder: Run) -> str:
        """The warning if a run continues with other images than it began with; else empty.

        Raises:
            UserError: the method stores something for each image.

        """
        changed = folder.changed_images(self.feed.opened)
        if changed and self.components.method.per_image:
            raise UserError(
                f"{changed}: {type(self.components.method).__name__} remembers each image, and cannot continue with "
                "others: bring them back, or start a new run"
            )
        return changed and f"{changed}: it continues with the images as they are now, and other losses"

    def changed_batch(self, folder: Run) -> str:
        """The warning if a run continues with another number of images a step than it began with; else empty."""
        earlier, size = folder.settings(), self.runtime.world.size
        each = [earlier.get(name, default) for name, default in (("batch_size", None), ("devices", 1), ("nodes", 1))]
        numbers = [number for number in each if isinstance(number, int)]
        if len(numbers) < len(each):
            return ""  # the user has changed settings
        was, now = math.prod(numbers), self.plan.optimization.batch_size * size
        if was == now:
            return ""
        keeps = f"; --batch_size {was // size} keeps them" if was % size == 0 else ""
        return f"{now:,} images a step, {was:,} before: it continues with other batches than before{keeps}"


def prepare(
    data: Data,
    steps: Optimization,
    runtime: Runtime,
    logging: Logging,
    makers: Makers,
    watch: Watch | None,
    console: Console,
    resumed: bool,
) -> Job:
    """Make the parts, open the images, fit both to each other and choose the open settings.

    Args:
        data: the requested images.
        steps: length, batches and steps of the training.
        runtime: hardware and processes.
        logging: settings of logs and checkpoints.
        makers: factories of the networks, the losses and the views.
        watch: another program that measures in place of the monitor.
        console: prints the chosen device, once the images are there.
        resumed: whether a run is continued.

    Raises:
        UserError: settings or images that do not fit.

    """
    start_time = time.monotonic()
    reading = data.images.reading
    base = bases(makers.encoder, makers.cld, makers.views, runtime.seed, reading.channels)
    base.encoder.reads = reads_of(reading)
    if base.encoder.loaded:
        say(console, f"{base.encoder.weights or base.encoder.name}: {base.encoder.loaded}")
    if data.hold_out is None and (resumed or watch is not None):
        data = replace(data, hold_out=0)  # a continued run has the number in its settings
    data = replace(data, workers=workers_of(data.workers))
    feed = _feed(data, base.encoder, base.views, watch, runtime, console)
    data = replace(data, hold_out=0 if feed.held_out_images is None else len(feed.held_out_images))
    components = assemble(base, makers.method, feed.length, makers.share_hidden, makers.gh)
    say(console, components.method.loaded)
    plan = settle(components, steps, feed, _batches(feed, components.views, data, runtime), runtime, data.epoch_size)
    monitor_every = figures_every(plan.optimization.epochs, logging.monitor_every)
    logging = replace(logging, monitor=logging.monitor or usual_monitor(feed.source), monitor_every=monitor_every)
    start = copy.deepcopy(components.encoder).eval() if components.encoder.started and watch is None else None
    return Job(
        data, runtime, logging, feed, components, plan, makers.share_hidden, watch, console, resumed, start, start_time
    )


def keep_settings(job: Job, folder: Run) -> None:
    """Save the settings and images that a run begins with, and for a part of a source the list, as it may change."""
    settings = tree(job.data, job.plan.optimization, job.runtime, job.logging, job.components, job.share_hidden)
    weights = [f"weights: {line}" for line in (job.components.encoder.loaded, job.components.method.loaded) if line]
    describe.write(settings, folder.config, [*(f"chosen: {choice}" for choice in job.plan.choices), *weights])
    folder.keep_images(job.feed.opened)
    if isinstance(job.feed.opened, Images) and job.data.images.has_subset:
        write_list(job.feed.opened, folder.subset)


def _feed(data: Data, encoder: Encoder, views: Views, watch: Watch | None, runtime: Runtime, console: Console) -> Feed:
    """Open the source; fit encoder and views to the size of its images; pack small ones."""
    if watch is not None:
        opened: Images | ImageStream = watch.part(
            open_unlabelled(data.images, data_root=data.data_root, crops=data.crops)
        )
    else:
        opened = open_images(data.images, data_root=data.data_root, crops=data.crops, streams=True)
    bad_files = BadFiles() if isinstance(opened, ImageStream) else opened.bad_files()
    total = length(opened, data.epoch_size)
    training, held_out_images, choices = split_held_out(opened, data.hold_out, runtime.seed)
    say(console, f"device: {runtime.hardware.reason}")
    source = prepared(training, encoder, views, data.memory, bad_files, console)
    return Feed(opened, source, bad_files, total, held_out_images, choices)


def _batches(feed: Feed, views: Views, data: Data, runtime: Runtime) -> Callable[[int], Batches]:
    return batches_of(
        feed.source, views, data.epoch_size, data.order, data.track_positives,
        seed=runtime.seed, bad_files=feed.bad_files, workers=data.workers, rank=runtime.world.rank,
        world=runtime.world.size,
    )  # fmt: skip
