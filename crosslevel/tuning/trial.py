"""One trial: a training in its own process, which reports its scores after each epoch, and can be stopped there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.select import stretches, take, unlabelled
from crosslevel.methods import Method
from crosslevel.models.encoder import Encoder
from crosslevel.runs import Run, Unreadable
from crosslevel.settings import parser as commands
from crosslevel.settings.command import loaded
from crosslevel.training.loop.guards.collapse import symptoms
from crosslevel.training.monitor import PIECES, scored, tracks_for_scores
from crosslevel.training.train import train
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import NotFinite, SourceError
from crosslevel.utils.rng import seeded

DIVERGED = 3
"""Exit status of a training whose loss or features are no longer numbers."""

LOG = "train.log"
LEAST, MOST = 16, 2000  # held-out images: enough to include rare things; more hardly change the scores
FEWEST = 3  # held-out tracks: the scores compare an image with those of other tracks


class Failed(RuntimeError):
    """A training that did not finish: ``kind`` is diverged, refused (its settings), failed or killed."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


Training = Callable[[str, Path, list[str], Path, "int | None"], Iterator[dict[str, Any]]]
"""A function that trains with one trial's settings and yields its scores after each epoch, such as `training`."""


def training(
    images: str,
    base: Path,
    options: list[str],
    folder: Path,
    threads: int | None,
    popen: Callable[..., Any] = subprocess.Popen,
) -> Iterator[dict[str, Any]]:
    """Train in another process, and yield the scores after each epoch.

    The process waits until the next score is requested; closing the iterator ends it.

    Args:
        images: the source.
        base: a YAML file with the settings that all trials have in common.
        options: the options of this trial, as on the command line of `crosslevel train`.
        folder: the run's folder.
        threads: for the process's arithmetic; torch's choice unless given.
        popen: starts the process, as `subprocess.Popen` does.

    Raises:
        Failed: the message has the last output of the process.

    """
    if folder.is_symlink():
        folder.unlink()
    elif (folder / LOG).exists():
        shutil.rmtree(folder)  # of a deleted study
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "crosslevel.tuning", images, str(base), str(folder), *options]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for message in process.stdout:
            yield json.loads(message)
            try:
                process.stdin.write("on\n")
                process.stdin.flush()
            except BrokenPipeError:
                break
        if process.wait():
            raise failure_of(process.returncode, folder / LOG)
    finally:
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            _close(pipe)
        shutil.rmtree(Run(folder).checkpoints, ignore_errors=True)  # large, and no trial is continued


def _kill(process: Any) -> None:
    """Kill the process and those that it started, one for each device."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(pipe: IO[str]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # its remaining output is not needed


def failure_of(status: int, log: Path) -> Failed:
    """The failure of a training, by its exit status and the last line of its log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip().removeprefix("crosslevel train: ") if lines else "it said nothing"
    if status < 0:
        return Failed("killed", f"the training was killed by signal {-status}")
    if os.strerror(errno.ENOSPC) in last:
        return Failed("failed", last)  # not of the settings
    kinds = {DIVERGED: "diverged", 2: "refused"}
    return Failed(kinds.get(status, "failed"), last)


def divided(source: Images, seed: int) -> tuple[Images, Images]:
    """Split the images into those to train on and those to hold out, by whole tracks; both without labels.

    If that would hold out fewer than 3 tracks or far too many images, as with a few videos, tracks are first cut into
    stretches, and whole stretches are held out.

    Raises:
        SourceError: there are too few images.

    """
    source = unlabelled(source)
    if len(source) < 4 * LEAST:
        raise SourceError(f"{source.name}: {len(source)} images are too few to tune on: at least {4 * LEAST}")
    target = min(MOST, max(LEAST, len(source) // 10))
    tracks = source.tracks
    owner = torch.arange(len(source)) if tracks is None else tracks.unique(return_inverse=True)[1]
    order, count = _track_order(owner, target, seed)
    if tracks is not None and (len(owner[order[:count]].unique()) < FEWEST or count > min(MOST, 2 * target)):
        owner = stretches(tracks, target // PIECES)
        order, count = _track_order(owner, target, seed)
    train_part, held_out_part = (take(source, part.sort().values) for part in (order[count:], order[:count]))
    if tracks is not None:
        held_out_part.tracks = owner[order[:count].sort().values]
    return train_part, held_out_part


def _track_order(owner: Tensor, target: int, seed: int) -> tuple[Tensor, int]:
    """The images in an order that keeps tracks together, and the number of held-out ones at its beginning."""
    position = torch.randperm(int(owner.max()) + 1, generator=seeded(seed))[owner]
    order = position.argsort(stable=True)
    # The last track is held out completely, or not at all.
    last = position[order[target - 1]]
    count = int((position <= last).sum())
    fewer = int((position < last).sum())
    return order, fewer if count > MOST and fewer else count


class HeldOut:
    """The held-out images of a trial, and the scores of its features on them, without labels.

    The images are the same in all trials: a tenth of all and at most 2,000, by whole tracks if tracks are known
    (`divided`); otherwise near-duplicates by pixels count as tracks in the scores. Their views are the same in all
    trials, too: with weaker views of its own, a trial could make its task easier.
    """

    def __init__(self, seed: int, channel: Channel) -> None:
        self.seed, self.channel = seed, channel
        self.held_out_images: Images | None = None

    def part(self, source: Images) -> Images:
        """All but the held-out images; no labels."""
        train_part, self.held_out_images = divided(source, self.seed)
        return train_part

    def monitor(
        self, encoder: Encoder, method: Method, cld: CrossLevel | None, hardware: Hardware, unreadable: Unreadable
    ) -> Any:
        """Score the held-out images at the end of an epoch, send the scores, and wait for the answer."""
        assert self.held_out_images is not None
        images = pack(self.held_out_images, encoder.view.size, bad_files=unreadable.bad_files)
        tracks = tracks_for_scores(images) if self.held_out_images.tracks is None else images.tracks

        def measure() -> dict[str, float]:
            figures = scored(encoder, method, cld, images, hardware, self.seed, tracks)
            if not figures:
                raise NotFinite("the features of the held-out images are not finite: the training diverged")
            messages = _symptoms(figures, encoder, cld)
            collapse = messages.pop("features", "")
            unreadable.keep()  # the parent may end this process instead of answering
            self.channel.tell({**figures, "collapse": collapse, "symptoms": "; ".join(messages.values())})
            return {}

        return measure


def _symptoms(figures: dict[str, float], encoder: Encoder, cld: CrossLevel | None) -> dict[str, str]:
    """The kinds of collapse, by the held-out images and by the groups of the last batch."""
    if cld is None or cld.last is None:
        return symptoms(figures, 1, encoder.num_features, None)
    largest = max(float(view.sizes.max()) for view in (cld.last.a, cld.last.b))
    with_largest = {**figures, "largest_group": largest}
    return symptoms(with_largest, len(cld.last.a.assignment), encoder.num_features, len(cld.last.a.sizes))


class Channel:
    """The connection to the parent process: figures are sent, and an answer means that the training may continue."""

    def __init__(self, out: IO[str], answers: IO[str] | None) -> None:
        self.out = out
        self.waiting: queue.Queue[str] = queue.Queue()
        if answers is not None:
            threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def tell(self, figures: dict[str, Any]) -> None:
        """Send the figures; return when the training may continue."""
        self.out.write(json.dumps(figures) + "\n")
        self.out.flush()
        self.waiting.get()

    def _listen(self, answers: IO[str]) -> None:
        for line in answers:
            self.waiting.put(line)
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the parent process has ended: the rest is not needed


def main(arguments: list[str]) -> None:
    """Run one trial in its own process: IMAGES BASE FOLDER OPTIONS."""
    images, base, folder, *options = arguments
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several devices' processes, only the measuring one
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"), _answers() if first else None)
    os.dup2(2, 1)  # the training's output goes into its log
    try:
        trained(images, Path(base), Path(folder), options, channel)
    except SystemExit as stop:
        sys.exit(DIVERGED if stop.code == 1 else stop.code)


def _answers() -> IO[str]:
    """Take over standard input from the rest of this process.

    A process forked to read images closes its standard input, and would wait for ever for the thread that reads it
    here.
    """
    answers = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdin = os.fdopen(0, closefd=False, encoding="utf-8")
    return answers


def trained(images: str, base: Path, folder: Path, options: list[str], channel: Channel) -> Path:
    """Run one training of `train`, and send every score through ``channel``."""
    with commands.exit_on_error("crosslevel train"):
        seed = loaded(str(base), str(base)).get("seed", 0)
    fixed = ["--report_html=false", "--monitor_every=1", f"--run={folder}"]
    watch = HeldOut(seed, channel)
    run: Path = commands.run(train, [images, "--config", str(base), *options, *fixed], watch=watch)
    return run
