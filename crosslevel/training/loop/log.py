"""The log of a run: rows of metrics.csv and TensorBoard, and progress on the console."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import ProgressColumn, Task, TaskProgressColumn
from rich.table import Column
from rich.text import Text

from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.metrics.label_free import NAMES
from crosslevel.runs import Run
from crosslevel.training.loop.loggers import Boards, logger_names
from crosslevel.utils import files
from crosslevel.utils.console import progress_bar, say
from crosslevel.utils.errors import UserError

COLUMNS = (
    "step", "epoch", "loss", "instance_loss", "group_loss", "lr", "group_agreement", "groups_used", "largest_group",
    "images_per_second", "waiting", "knn", "instance_rank", "group_rank", *NAMES,
    "temperature", "group_temperature", "harmonization_loss",
)  # fmt: skip
"""The columns of metrics.csv; a cell is empty if a row has no such figure."""


class Stream:
    """All batches of a run from step ``start`` on, epoch after epoch; it measures the time spent waiting for them."""

    def __init__(self, batches: TrainBatches | StreamBatches, start: int) -> None:
        self.batches, self.start, self.waited = batches, start, 0.0

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = divmod(self.start, len(self.batches))
        while True:
            self.batches.epoch, self.batches.start = epoch, first
            source = iter(self.batches)
            while True:
                start = time.perf_counter()
                batch = next(source, None)
                self.waited += time.perf_counter() - start
                if batch is None:
                    break
                yield batch
            epoch, first = epoch + 1, 0


class Clock:
    """Images a second and the share of time spent waiting for data, over the steps since the last reading."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.restart()

    def restart(self) -> None:
        """Restart the measurement, after anything other than a step."""
        self.images, self.start_time, self.waited = 0, time.perf_counter(), self.stream.waited

    def read(self) -> dict[str, float]:
        """Both figures."""
        seconds = max(time.perf_counter() - self.start_time, 1e-9)
        return {"images_per_second": self.images / seconds, "waiting": (self.stream.waited - self.waited) / seconds}


class Log:
    """The rows of metrics.csv and of other loggers, one for each logged step.

    Args:
        run: the run's folder.
        steps_per_epoch: steps.
        step: the last finished step; rows beyond it are dropped.
        boards: the other loggers; unless given, TensorBoard if it is installed.

    """

    def __init__(self, run: Run, steps_per_epoch: int, step: int, boards: Boards | None = None) -> None:
        self.file, self.steps_per_epoch = run.metrics, steps_per_epoch
        self.newest: dict[str, float] = {}
        self.recorded = -1  # the step of the newest figures
        rows = read_rows(run.metrics, step) if step and run.metrics.exists() else []
        files.write(run.metrics, "".join(map(_line, [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows])))
        self.boards = Boards(run, logger_names(None), (), {}) if boards is None else boards

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write one row."""
        if step % self.steps_per_epoch == 0 and step != self.recorded:
            for name in ("knn", "instance_rank", "group_rank", *NAMES):
                self.newest.pop(name, None)  # an earlier epoch's
        self.newest.update(values)
        self.recorded = step
        formatted = {name: f"{value:.6g}" for name, value in {"epoch": step / self.steps_per_epoch, **values}.items()}
        with self.file.open("ab") as file:
            file.write(_line({"step": str(step), **formatted}).encode())
        self.boards.record(step, values)

    def close(self, status: str = "success") -> None:
        """Flush the other loggers."""
        self.boards.close(status)


def read_rows(file: Path, step: int) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv up to ``step``.

    A row cut off by a kill, zeros left by a power failure, and anything else that is no row of numbers are left out.

    Raises:
        UserError: the file does not begin with the names of its columns.

    """
    head, *lines = file.read_bytes().split(b"\n")
    names = head.decode(errors="replace").rstrip("\r").split(",")
    if "step" not in names:
        raise UserError(f"{file} has no columns of a run's figures in its first line: move it away to go on")
    rows = []
    for line in lines[:-1]:  # text after the last line break is no complete line
        cells = line.decode(errors="replace").rstrip("\r").split(",")
        row = dict(zip(names, cells, strict=False))
        if len(cells) == len(names) and row["step"].isdecimal() and all(map(_is_number, filter(None, cells))):
            rows.append({name: row.get(name, "") for name in COLUMNS})
    return [row for row in rows if int(row["step"]) <= step]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _line(row: Mapping[str, str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS).writerow(row)
    return text.getvalue()


class Display:
    """The progress: a bar on a terminal, elsewhere a line for each epoch."""

    def __init__(self, log: Log, console: Console, step: int, steps: int) -> None:
        self.log, self.console, self.steps = log, console, steps
        self.bar = progress_bar(console, TaskProgressColumn(), _Figures(console), width=None, transient=False)
        self.task = self.bar.add_task("", total=steps, completed=step, figures={})
        self.bar.start()

    def update(self, step: int) -> None:
        """Show the newest figures."""
        epoch = self.log.steps_per_epoch
        name = f"epoch {(step - 1) // epoch + 1}/{self.steps // epoch}"
        self.bar.update(self.task, completed=step, description=name, figures=self.log.newest)
        if step % epoch == 0 and not self.console.is_terminal:
            say(self.console, f"{name}  {_figures(self.log.newest)}")

    def close(self) -> None:
        """Restore the terminal, whatever ended the run."""
        self.bar.stop()


class _Figures(ProgressColumn):
    """A column with the newest figures, as many as fit into the line."""

    ELSE = 34  # characters of the rest: the epoch, a short bar, the share done, the time left

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self.console = console

    def render(self, task: Task) -> Text:
        """Render as many figures as fit."""
        return Text(_figures(task.fields["figures"], self.console.width - self.ELSE))


def _figures(row: Mapping[str, Any], width: int | None = None) -> str:
    """The loss, the features' figures and the speed, in this order, within ``width`` characters."""
    if "loss" not in row:
        return ""
    fields = [f"loss {row['loss']:.3f}"]
    if "knn" in row:
        fields.append(f"kNN {row['knn']:.1f} %")
    if "combined" in row:
        fields.append(f"score {row['combined']:.3f} (higher is better)")
    fields.append(f"{row.get('images_per_second', 0):,.0f} images/s")
    fields.append(f"waiting for data {100 * row.get('waiting', 0):.0f} %")
    fitting = fields if width is None else [p for i, p in enumerate(fields) if len("  ".join(fields[: i + 1])) <= width]
    return "  ".join(fitting)
