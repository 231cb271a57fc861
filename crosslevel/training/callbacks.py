"""What happens around the steps: progress, logs, checkpoints, the end by Ctrl-C, the kNN monitor."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.metrics.label_free import NAMES

COLUMNS = (
    "step", "epoch", "loss", "instance_loss", "group_loss", "lr", "group_agreement", "groups_used", "largest_group",
    "images_per_second", "waiting", "knn", "instance_rank", "group_rank", *NAMES,
)  # fmt: skip
"""Of metrics.csv; a cell is empty where a row has no such figure."""


class Stream:
    """All batches of a run from step ``start`` on, epoch after epoch, and how long the loop waited for them."""

    def __init__(self, batches: TrainBatches | StreamBatches, start: int) -> None:
        self.batches, self.start, self.waited = batches, start, 0.0

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = divmod(self.start, len(self.batches))
        while True:
            self.batches.epoch, self.batches.start = epoch, first
            source = iter(self.batches)
            while True:
                began = time.perf_counter()
                batch = next(source, None)
                self.waited += time.perf_counter() - began
                if batch is None:
                    break
                yield batch
            epoch, first = epoch + 1, 0


class Clock:
    """Images a second and the share of time spent waiting for data, over the steps since the last reading."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; after anything that is no step."""
        self.images, self.began = 0, time.perf_counter()
        self.waited = self.stream.waited if self.stream else 0.0

    def read(self) -> dict[str, float]:
        """Both figures."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        waited = (self.stream.waited if self.stream else 0.0) - self.waited
        return {"images_per_second": self.images / seconds, "waiting": waited / seconds}


class Recorder(L.Callback):
    """Every ``every`` steps: check the loss, and write a row of metrics.csv and TensorBoard."""

    def __init__(self, folder: Path, steps_per_epoch: int, every: int, clock: Clock) -> None:
        self.file, self.steps_per_epoch, self.every = folder / "metrics.csv", steps_per_epoch, every
        self.clock = clock
        self.newest: dict[str, float] = {}
        self.recorded = -1  # the step of the newest figures

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the rows of the run that is continued, up to its checkpoint."""
        if not trainer.is_global_zero:
            return
        kept: list[dict[str, str]] = []
        if trainer.global_step and self.file.exists():
            with self.file.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= trainer.global_step]
        with self.file.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.clock.restart()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the step; log and check where it is time."""
        self.clock.images += len(batch.index) * trainer.world_size
        step = trainer.global_step
        epoch_ended = step % self.steps_per_epoch == 0
        if step % self.every == 0 or epoch_ended or step == trainer.max_steps:
            module.check_finite()
            if epoch_ended:
                for name in ("knn", "instance_rank", "group_rank", *NAMES):
                    self.newest.pop(name, None)  # an earlier epoch's
            self.record(trainer, {**module.values(), **self.clock.read()})
            self.clock.restart()

    def record(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        """Write one row."""
        if not trainer.is_global_zero:
            return
        self.newest.update(values)
        self.recorded = trainer.global_step
        epoch = trainer.global_step / self.steps_per_epoch
        shown = {name: f"{value:.6g}" for name, value in {"epoch": epoch, **values}.items()}
        row = {"step": trainer.global_step, **shown}
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        if trainer.logger is not None:
            trainer.logger.log_metrics(values, trainer.global_step)


class Checkpoints(L.Callback):
    """``last.ckpt`` after each epoch, every ``minutes`` and at the end; ``best.ckpt`` at an epoch's lowest loss."""

    def __init__(
        self, folder: Path, steps_per_epoch: int, minutes: float, clock: Clock, saved: Callable[[], None]
    ) -> None:
        self.folder, self.steps_per_epoch, self.minutes, self.clock = folder, steps_per_epoch, minutes, clock
        self.after = saved
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.saved = time.monotonic()
        self.state = {"best": float("inf"), "sum": 0.0, "count": 0}

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs to know the best epoch."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count."""
        self.state = dict(state_dict)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save where it is time."""
        step = trainer.global_step
        epoch_ended = step % self.steps_per_epoch == 0
        self.state["sum"] = self.state["sum"] + module.seen["loss"]
        self.state["count"] += 1
        late = time.monotonic() - self.saved > 60 * self.minutes
        if trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)  # ranks must agree on when to save
        if epoch_ended or late or step == trainer.max_steps:
            module.check_finite()
            best = False
            if epoch_ended:
                mean = float(self.state["sum"]) / self.state["count"]
                best = mean < self.state["best"]
                self.state = {"best": min(mean, self.state["best"]), "sum": 0.0, "count": 0}
            self.save(trainer, best)

    def save(self, trainer: L.Trainer, best: bool = False) -> None:
        """Write the checkpoint beside the old one, then put it in its place: a kill leaves one of the two."""
        self.state["sum"] = float(self.state["sum"])
        temporary = self.last.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, self.last)
            if best:
                shutil.copyfile(self.last, temporary)
                os.replace(temporary, self.best)
        self.after()
        self.saved = time.monotonic()
        self.clock.restart()


class StopOnSignal(L.Callback):
    """Ctrl-C or a termination request ends the run after the current step, with a checkpoint."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, checkpoints: Checkpoints, console: Console) -> None:
        self.checkpoints, self.console = checkpoints, console
        self.requested: int | None = None
        self._before = {number: signal.getsignal(number) for number in self.signals}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Listen; Lightning has put its own handlers in place by now."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.requested is not None:
            sys.exit(128 + number)
        self.requested = number
        self.console.print("\nstopping after this step; once more to stop at once", highlight=False)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save and stop where it was asked for."""
        asked = self.requested is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and trainer.global_step < trainer.max_steps:
            module.check_finite()
            self.checkpoints.save(trainer)
            trainer.should_stop = True

    def release(self) -> None:
        """Give the signals back, whatever ended the run."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)


class Monitor(L.Callback):
    """A figure for the log that never influences the run: computed every ``every`` epochs, and at the end."""

    def __init__(
        self, measure: Callable[[], dict[str, float]], every: int, steps_per_epoch: int, recorder: Recorder
    ) -> None:
        self.measure, self.every, self.steps_per_epoch, self.recorder = (
            measure,
            every,
            steps_per_epoch,
            recorder,
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Measure where it is time."""
        step = trainer.global_step
        if trainer.is_global_zero and (step % (self.every * self.steps_per_epoch) == 0 or step == trainer.max_steps):
            self.recorder.record(trainer, self.measure())
            self.recorder.clock.restart()


class Display(L.Callback):
    """The progress: a bar on a terminal, elsewhere a line an epoch; comes after all that have figures for it."""

    def __init__(self, recorder: Recorder, console: Console) -> None:
        self.recorder, self.console = recorder, console
        self.bar: Progress | None = None
        self.task: Any = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Show the bar."""
        if not trainer.is_global_zero:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            _Figures(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, figures={})
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Show the newest figures."""
        if self.bar is None:
            return
        step, epoch = trainer.global_step, self.recorder.steps_per_epoch
        name = f"epoch {(step - 1) // epoch + 1}/{trainer.max_steps // epoch}"
        self.bar.update(self.task, completed=step, description=name, figures=self.recorder.newest)
        if step % epoch == 0 and not self.console.is_terminal:
            self.console.print(f"{name}  {_figures(self.recorder.newest)}", highlight=False)

    def release(self) -> None:
        """Leave the terminal as it was, whatever ended the run."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_figures(task.fields["figures"]))


def _figures(row: dict[str, float]) -> str:
    if not row:
        return ""
    knn = f"  kNN {row['knn']:.1f} %" if "knn" in row else ""
    score = f"  score {row['combined']:.3f}" if "combined" in row else ""
    return (
        f"loss {row['loss']:.3f}  {row.get('images_per_second', 0):,.0f} images/s  "
        f"waiting for data {100 * row.get('waiting', 0):.0f} %{knn}{score}"
    )
