"""Where a run's figures go beside metrics.csv: Lightning's own loggers, by name or as objects."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from crosslevel.runs import Run
from crosslevel.utils import files
from crosslevel.utils.errors import MissingExtra, UserError, did_you_mean

KINDS = ("csv", "tensorboard", "wandb", "mlflow")
"""``csv`` is metrics.csv, which every run has."""

PROJECT = "crosslevel"


def named(text: str | None) -> tuple[str, ...]:
    """The loggers that a text names, separated by commas; TensorBoard where it is installed, of None.

    Raises:
        UserError: there is no such logger, or it is not installed; the message has the command that installs it.

    """
    if text is None:
        # An extra: who looks at runs in TensorBoard has it.
        return ("tensorboard",) if find_spec("tensorboard") is not None else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in KINDS:
            raise UserError(f"logger={name!r} is unknown: {did_you_mean(name, KINDS)}")
        if name != "csv" and find_spec(name) is None:
            raise MissingExtra(f"--logger {name} needs {name}: pip install 'crosslevel[{name}]'")
    return tuple(name for name in names if name != "csv")


class Boards:
    """All loggers of a run. One that fails is named in a warning, and left out from then on.

    Args:
        run: the run's folder; it keeps which runs of theirs are its own, so that a resumed one goes on with them.
        names: from `named`.
        others: further loggers of Lightning's interface, as `log_metrics`, `log_hyperparams` and `finalize`.
        settings: the run's, which they are told once.

    Raises:
        UserError: a logger cannot be started; the message is its own.

    """

    def __init__(self, run: Run, names: Sequence[str], others: Sequence[Any], settings: Mapping[str, Any]) -> None:
        self.file, self.others = run.path / "loggers.json", list(others)
        self.loggers: list[Any] = [_started(name, run, self._known().get(name)) for name in names] + list(others)
        for logger in self.loggers:
            with _in_one_line(logger):
                if settings:
                    logger.log_hyperparams(_flat(settings))
        ids = {name: _id_of(name, logger) for name, logger in zip(names, self.loggers, strict=False)}
        if kept := {name: known for name, known in ids.items() if known}:
            files.write(self.file, json.dumps(kept))

    def _known(self) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Tell all of them the figures of a step."""
        self._each("log_metrics", dict(values), step)

    def close(self, status: str) -> None:
        """Let them write what they still hold; ``status`` is success or failed."""
        self._each("finalize", status)
        for logger in self.loggers:
            if type(logger).__name__ == "WandbLogger" and logger not in self.others:
                logger.experiment.finish(exit_code=0 if status == "success" else 1)  # Lightning leaves that to the exit

    def _each(self, what: str, *arguments: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, what)(*arguments)
            except Exception as error:  # a server that is gone ends no training
                self.loggers.remove(logger)
                why = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"{type(logger).__name__} is told nothing from here on: {why}", stacklevel=2)


def _started(name: str, run: Run, known: str | None) -> Any:
    if name == "tensorboard":
        from lightning.fabric.loggers import TensorBoardLogger  # noqa: PLC0415

        return TensorBoardLogger(run.path, name=run.tensorboard.name, version="")
    from lightning.pytorch import loggers  # noqa: PLC0415

    title = run.path.resolve().name
    if name == "wandb":
        more: dict[str, Any] = {"id": known, "resume": "must"} if known else {}
        return loggers.WandbLogger(name=title, save_dir=run.path, project=PROJECT, **more)
    return loggers.MLFlowLogger(PROJECT, run_name=title, save_dir=str(run.path / "mlruns"), run_id=known)


def _id_of(name: str, logger: Any) -> str:
    if name == "wandb":
        return str(getattr(logger.experiment, "id", "") or "")
    return str(logger.run_id or "") if name == "mlflow" else ""


@contextmanager
def _in_one_line(logger: Any) -> Iterator[None]:
    """What a logger cannot do at its start."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{type(logger).__name__} cannot be started: {why}") from error


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings under their names on the command line."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = str(value) if isinstance(value, list | tuple) else value
    return found
