"""The end of a training: its files, its verdict, and the next commands."""

from __future__ import annotations

import copy
import shlex
import time
import warnings

from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.runs import Run, Unreadable
from crosslevel.training import report as pages
from crosslevel.training.components import Components
from crosslevel.training.inputs import STREAM_SAMPLE, Feed
from crosslevel.training.job import Job
from crosslevel.training.loop.fit import Outcome
from crosslevel.training.options import Data
from crosslevel.training.verdict import Verdict, verdict
from crosslevel.utils.console import say
from crosslevel.utils.errors import SourceError


def finish(job: Job, folder: Run, outcome: Outcome, unreadable: Unreadable) -> None:
    """Write the encoder, the branches' heads, the list of unreadable files and, for a complete run, the page.

    The verdict is printed and shown at the top of the page, unless another program watches the training. An encoder
    that began with weights is compared with its start, too. Last, the files and the next commands are printed.
    """
    components, feed, console = job.components, job.feed, job.console
    components.encoder.save(folder.encoder)
    folder.save_branches(components.method.branch, components.method.head, components.cld)
    unreadable.merge()
    if len(feed.bad_files):
        say(console, feed.bad_files.summary(feed.total))
    comparison = _compare(job) if outcome.finished and job.watch is None else None
    if outcome.finished and job.logging.report_html:
        _write_page(job, folder, "" if comparison is None else comparison.headline())
    _farewell(job, folder, outcome)


def _compare(job: Job) -> Verdict | None:
    """Print the verdict in one line: the encoder beside raw pixels and the untrained network."""
    feed, runtime = job.feed, job.runtime
    try:
        source = feed.source.sample(STREAM_SAMPLE) if isinstance(feed.source, ImageStream) else feed.source
        comparison = verdict(
            job.components.encoder, source, runtime.hardware, runtime.seed, feed.held_out_images, job.start
        )
    except SourceError as error:
        warnings.warn(f"the features are not compared with raw pixels: {error}", stacklevel=2)
        return None
    if comparison is not None:
        say(job.console, comparison.line())
    return comparison


def _write_page(job: Job, folder: Run, headline: str) -> None:
    cld = None if job.components.cld is None else copy.copy(job.components.cld)
    if cld is not None:
        cld.gather = False  # the other ranks do not run this
    pages.write(
        folder, job.components.encoder, cld, job.feed.source, job.runtime.hardware, job.runtime.seed,
        following(folder, job.feed, job.data), headline,
    )  # fmt: skip


def _farewell(job: Job, folder: Run, outcome: Outcome) -> None:
    """Print the run's files and the next commands."""
    console = job.console
    if not outcome.finished:
        encoder = folder.display_path(folder.encoder)
        say(console, f"stopped after step {outcome.steps:,}; the encoder so far is {encoder}; to go on:")
        say(console, f"  {resume_command(folder, job.components)}")
        return
    outputs = [folder.encoder, *([folder.report] if folder.report.exists() else [])]
    minutes = (time.monotonic() - job.start_time) / 60
    say(console, f"done in {minutes:.1f} min: {', '.join(map(folder.display_path, outputs))}; next:")
    for line in following(folder, job.feed, job.data):
        say(console, f"  {line}")


def following(folder: Run, feed: Feed, data: Data) -> list[str]:
    """Commands to continue with the run."""
    source = "IMAGES" if feed.total is None else data.images.text
    return folder.next_commands(source, feed.source.labels is not None, data.data_root, data.crops)


def resume_command(folder: Run, components: Components) -> str:
    """The command line that continues the run."""
    return f"crosslevel train --resume {shlex.quote(str(folder))}{components.method_option}"
