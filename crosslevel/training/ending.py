"""The end of a training: what it leaves, what it was worth, and what to do next."""

from __future__ import annotations

import copy
import shlex
import warnings

from rich.console import Console

from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run, Unreadable
from crosslevel.training import report as pages
from crosslevel.training.inputs import (
    LOOKED_AT,
    Feed,
)
from crosslevel.training.loop.fit import Outcome
from crosslevel.training.options import (
    Data,
    Logging,
    Runtime,
)
from crosslevel.training.parts import Parts
from crosslevel.training.verdict import Verdict, verdict
from crosslevel.utils.console import say
from crosslevel.utils.errors import SourceError


def finish(
    folder: Run,
    parts: Parts,
    feed: Feed,
    data: Data,
    runtime: Runtime,
    logging: Logging,
    outcome: Outcome,
    unreadable: Unreadable,
    console: Console,
    compared: bool = True,
    start: Encoder | None = None,
) -> None:
    """Leave the encoder, the branches' heads, the list of unreadable files and, of a whole run, the page.

    ``compared``: say what the training was worth, on the console and at the page's top; beside ``start`` too, the
    encoder as the training found it, where it began with weights.
    """
    parts.encoder.save(folder.encoder)
    folder.save_branches(parts.method.branch, parts.method.head, parts.cld)
    unreadable.merge()
    if len(feed.bad):
        say(console, feed.bad.summary(feed.total))
    found = _compare(parts.encoder, feed, runtime, console, start) if outcome.finished and compared else None
    if outcome.finished and logging.report_html:
        cld = None if parts.cld is None else copy.copy(parts.cld)
        if cld is not None:
            cld.gather = False  # the other ranks are not here
        next_commands = following(folder, feed, data)
        verdict_line = "" if found is None else found.headline()
        pages.write(
            folder, parts.encoder, cld, feed.source, runtime.hardware, runtime.seed, next_commands, verdict_line
        )


def _compare(encoder: Encoder, feed: Feed, runtime: Runtime, console: Console, start: Encoder | None) -> Verdict | None:
    """Say in one line what the training was worth, beside raw pixels and the untrained network."""
    try:
        shown = feed.source.some(LOOKED_AT) if isinstance(feed.source, ImageStream) else feed.source
        found = verdict(encoder, shown, runtime.hardware, runtime.seed, feed.held, start)
    except SourceError as error:
        warnings.warn(f"the features are not compared with raw pixels: {error}", stacklevel=2)
        return None
    if found is not None:
        say(console, found.line())
    return found


def farewell(
    folder: Run, parts: Parts, feed: Feed, data: Data, outcome: Outcome, minutes: float, console: Console
) -> None:
    """Say what there is now, and the commands that come next."""
    if not outcome.finished:
        say(console, f"stopped after step {outcome.steps:,}; the encoder so far is {folder.encoder}; to go on:")
        say(console, f"  {resume_command(folder, parts)}")
        return
    left = [folder.encoder, *([folder.report] if folder.report.exists() else [])]
    say(console, f"done in {minutes:.1f} min: {', '.join(map(str, left))}; next:")
    for line in following(folder, feed, data):
        say(console, f"  {line}")


def following(folder: Run, feed: Feed, data: Data) -> list[str]:
    """What a user would do with the run."""
    named = "IMAGES" if feed.total is None else data.images.text
    return folder.next_commands(named, feed.source.labels is not None, data.data_root, data.crops)


def resume_command(folder: Run, parts: Parts) -> str:
    """The command line that continues the run."""
    return f"crosslevel train --resume {shlex.quote(str(folder))}{parts.method_option}"
