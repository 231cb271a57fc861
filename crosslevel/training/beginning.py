"""The beginning of a training: what is said and noted before the first step."""

from __future__ import annotations

import copy
from typing import Any

from rich.console import Console

from crosslevel.data.images import Images
from crosslevel.data.subsets.lists import write_list
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run
from crosslevel.settings import describe
from crosslevel.training.inputs import Feed, counted
from crosslevel.training.options import Data, Runtime
from crosslevel.training.parts import Bases, Parts
from crosslevel.training.plan import Plan
from crosslevel.utils.console import say
from crosslevel.utils.errors import UserError


def announce(console: Console, runtime: Runtime, made: Bases) -> None:
    """Say where it runs, and what weights it starts from."""
    say(console, f"device: {runtime.hardware.why}")
    if made.encoder.loaded:
        say(console, f"{made.encoder.weights or made.encoder.name}: {made.encoder.loaded}")


def continued(folder: Run, feed: Feed, parts: Parts) -> str:
    """What is to be said where a run goes on with other images than it began with.

    Raises:
        ValueError: the method keeps something for each of them.

    """
    changed = folder.changed_images(feed.opened)
    if changed and parts.method.per_image:
        raise UserError(
            f"{changed}: {type(parts.method).__name__} remembers each image, and cannot go on with others: bring them "
            "back, or start a new run"
        )
    return changed and f"{changed}: it goes on with those of now, not as it would have"


def start_of(encoder: Encoder) -> Encoder | None:
    """The encoder as the training finds it, if that is more than random weights: what it will be compared with."""
    return copy.deepcopy(encoder).eval() if encoder.started else None


def keep(folder: Run, feed: Feed, data: Data, settings: dict[str, Any], plan: Plan, loaded: str) -> None:
    """Note the settings and the images that the run begins with, and of a part the list: its source may change."""
    weights = [f"weights: {loaded}"] if loaded else []
    describe.write(settings, folder.config, [*(f"chosen: {choice}" for choice in plan.choices), *weights])
    folder.keep_images(feed.opened)
    if isinstance(feed.opened, Images) and data.images.has_subset:
        write_list(feed.opened, folder.subset)


def overview(feed: Feed, parts: Parts, plan: Plan, folder: Run) -> str:
    """One line about images, views, losses and network."""
    views = f"{parts.views.count} views of {parts.views.size} pixels"
    return f"{counted(feed.source)}, {len(plan.batches):,} steps an epoch, {views}; {parts.described}; run: {folder}"
