"""Loggers of a run's figures, beside metrics.csv: by name, or as objects with Lightning's interface."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_fabric.loggers import TensorBoardLogger

from crosslevel.runs import Run
from crosslevel.utils import files
from crosslevel.utils.errors import MissingExtra, UserError, did_you_mean, hidden

KINDS = ("csv", "tensorboard", "wandb", "mlflow")
"""``csv`` is metrics.csv, which every run has."""

PROJECT = "crosslevel"


def logger_names(text: str | None) -> tuple[str, ...]:
    """The loggers that a text names, separated by commas; for None, TensorBoard if it is installed.

    Raises:
        UserError: there is no such logger, or it is not installed; the message has the command that installs it.

    """
    if text is None:
        # An extra: users of TensorBoard have it installed.
        return ("tensorboard",) if find_spec("tensorboard") is not None else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in KINDS:
            raise UserError(f"logger={name!r} is unknown: {did_you_mean(name, KINDS)}")
        if name != "csv" and find_spec(name) is None:
            raise MissingExtra(f"--logger {name} needs {name}: pip install 'crosslevel[{name}]'")
    return tuple(name for name in names if name != "csv")


class Boards:
    """All loggers of a run. If one fails, a warning names it, and it is no longer used.

    Args:
        run: the run's folder; it stores the services' ids of the run, so that a resumed run continues them.
        names: from `logger_names`.
        extra: further loggers of Lightning's interface, as `log_metrics`, `log_hyperparams` and `finalize`.
        settings: the run's settings, which are logged once.

    Raises:
        UserError: a logger cannot be started; the message is the logger's.

    """

    def __init__(self, run: Run, names: Sequence[str], extra: Sequence[Any], settings: Mapping[str, Any]) -> None:
        self.file = run.path / files.LOGGERS
        self.loggers: list[Any] = [_started(name, run, self._stored_ids().get(name)) for name in names] + list(extra)
        for logger in self.loggers:
            with _in_one_line(logger), suppress(NotImplementedError):  # Fabric's CSVLogger takes no settings
                if settings:
                    logger.log_hyperparams(_flat(settings))
        by_name = dict(zip(names, self.loggers, strict=False))
        if run_ids := {name: by_name[name].run_id for name in ("wandb", "mlflow") if name in by_name}:
            files.write(self.file, json.dumps(run_ids))

    def _stored_ids(self) -> dict[str, str]:
        try:
            run_ids: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return run_ids if isinstance(run_ids, dict) else {}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures of a step to all loggers."""
        self._each("log_metrics", dict(values), step)

    def close(self, status: str) -> None:
        """Flush and close all loggers; ``status`` is success or failed."""
        self._each("finalize", status)

    def _each(self, method: str, *arguments: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # a lost server must not end the training
                self.loggers.remove(logger)
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"{type(logger).__name__} gets no figures from here on: {reason}", stacklevel=2)


def _started(name: str, run: Run, run_id: str | None) -> Any:
    title = run.path.resolve().name
    if name == "wandb":
        return WandbLogger(run.path, title, run_id)
    if name == "mlflow":
        return MLflowLogger(run.path, title, run_id)
    return TensorBoardLogger(run.path, name=run.tensorboard.name, version="")


class WandbLogger:
    """Weights & Biases, with Lightning's interface; it starts when it is first used.

    Args:
        folder: where it keeps its files.
        title: the run's name.
        existing: the service's id of a run to continue.

    """

    def __init__(self, folder: Path, title: str, existing: str | None) -> None:
        self.folder, self.title, self.existing_id = folder, title, existing

    @cached_property
    def experiment(self) -> Any:
        """The service's run."""
        wandb: Any = import_module("wandb")
        more = {"id": self.existing_id, "resume": "must"} if self.existing_id else {}
        run = wandb.init(name=self.title, dir=str(self.folder), project=PROJECT, **more)
        run.define_metric("step")
        run.define_metric("*", step_metric="step", step_sync=True)
        return run

    @property
    def run_id(self) -> str:
        """The service's id of the run."""
        return str(self.experiment.id)

    def log_hyperparams(self, settings: Mapping[str, Any]) -> None:
        """Log the settings."""
        self.experiment.config.update(dict(settings), allow_val_change=True)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of a step."""
        self.experiment.log({**values, "step": step})

    def finalize(self, status: str) -> None:
        """End the service's run."""
        self.experiment.finish(exit_code=0 if status == "success" else 1)


class MLflowLogger:
    """MLflow, at MLFLOW_TRACKING_URI or in the run's folder, with Lightning's interface; it starts on first use.

    Args:
        folder: where the figures go if no server is named.
        title: the run's name.
        existing: the service's id of a run to continue.

    """

    LONGEST, MOST = 250, 100  # characters of a value, and settings in one request, that every server accepts

    def __init__(self, folder: Path, title: str, existing: str | None) -> None:
        self.folder, self.title, self.existing_id = folder, title, existing

    @cached_property
    def client(self) -> Any:
        """The client of the server or the folder."""
        tracking: Any = import_module("mlflow.tracking")
        return tracking.MlflowClient(
            os.environ.get("MLFLOW_TRACKING_URI") or (self.folder.resolve() / "mlruns").as_uri()
        )

    @cached_property
    def run_id(self) -> str:
        """The service's id of the run."""
        if self.existing_id:
            return str(self.client.get_run(self.existing_id).info.run_id)
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = self.client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        return str(self.client.create_run(number, run_name=self.title).info.run_id)

    def log_hyperparams(self, settings: Mapping[str, Any]) -> None:
        """Log the settings."""
        entities: Any = import_module("mlflow.entities")
        params = [entities.Param(name, str(value)[: self.LONGEST]) for name, value in settings.items()]
        for first in range(0, len(params), self.MOST):
            self.client.log_batch(self.run_id, params=params[first : first + self.MOST])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of a step."""
        entities: Any = import_module("mlflow.entities")
        now = int(1000 * time.time())
        metrics = [entities.Metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def finalize(self, status: str) -> None:
        """End the service's run."""
        self.client.set_terminated(self.run_id, "FINISHED" if status == "success" else "FAILED")


@contextmanager
def _in_one_line(logger: Any) -> Iterator[None]:
    """Turn errors at a logger's start into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{type(logger).__name__} cannot be started: {reason}") from error


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings under their names on the command line, without secrets in addresses."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}.")
        else:
            plain = str(value) if isinstance(value, list | tuple) else value
            flat[before + name] = hidden(plain) if isinstance(plain, str) else plain
    return flat
