"""The settings that all workers of a study share."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crosslevel.data.bad_files import BadFiles
from crosslevel.tuning.search_space import Range
from crosslevel.utils.errors import UserError

Sampler = Literal["tpe", "random"]
FILE = "study.db"  # name of the database file in the study's folder
BEAT, GRACE = 20.0, 120.0  # seconds between signs of life; seconds without one after which a worker counts as dead
SILENT = 60  # seconds without a sign of life after which a machine loses the common lock
PAUSE = 0.1  # seconds before the study is queried again


@dataclass(frozen=True)
class Effort:
    """The number of trainings that a search may cost, and how their settings are chosen."""

    budget: float | None
    trials: int | None
    sampler: Sampler
    pruning: bool
    finalists: int | None

    def settled(self, epochs: float | None, minutes: float | None) -> tuple[float, int]:
        """The budget and the number of finalists, with defaults for open settings.

        Args:
            epochs: of a training, as far as given.
            minutes: likewise.

        Raises:
            UserError: there is nothing to compare.

        """
        budget = (12.0 if self.trials is None else float("inf")) if self.budget is None else self.budget
        if not budget >= 1 or (self.trials is not None and self.trials < 1) or (epochs is not None and epochs < 1):
            raise UserError(
                f"budget={budget:g}, trials={self.trials}, epochs={epochs}: give at least one full training"
            )
        if minutes is not None:
            raise UserError(f"minutes={minutes:g}: trials are compared after the same epochs: give --epochs")
        finite, finalists = math.isfinite(budget), self.finalists
        if finalists is None:
            finalists = max(0, int(budget // 4) - 1) if finite else 0
        if finalists and not finite:
            raise UserError(f"finalists={finalists}: they are trained out of a budget: give --budget")
        if finalists < 0 or (finalists and finalists + 2 > budget):
            raise UserError(
                f"finalists={finalists}, budget={budget:g}: their trainings, one for the settings as given, and one of "
                "the search have to fit: give more --budget or fewer --finalists"
            )
        return budget, finalists


@dataclass
class Plan:
    """The settings that all workers of a study share.

    - ``start``: the parameters of the first trials. The very first are the user's settings if ``as_given``, else the
      nearest ones in the ranges.
    - ``finalists``: how many of the best trials are trained once more, beside the settings as given; the budget pays.
    - ``warmup``: the first epochs, in which no trial counts as collapsed: features of low rank are usual there.
    - ``images``: the number of images; ``bad_files``: the unreadable ones so far.
    """

    folder: Path
    storage: str
    space: dict[str, Range]
    start: list[dict[str, Any]]
    epochs: int
    budget: float
    trials: int | None
    sampler: Sampler
    pruning: bool
    seed: int
    agreed: dict[str, Any]
    as_given: bool = True
    finalists: int = 0
    warmup: float = 0.0
    images: int = 0
    bad_files: BadFiles = field(default_factory=BadFiles)
    stop: threading.Event = field(default_factory=threading.Event)
    beat: float = BEAT
    grace: float = GRACE
    silent: int = SILENT
    pause: float = PAUSE


def url(storage: str | None, folder: Path) -> str:
    """The database's address for SQLAlchemy: a file in the folder, or PostgreSQL by psycopg."""
    if storage is None:
        return f"sqlite:///{(folder / FILE).resolve()}"
    scheme, mark, address = storage.partition("://")
    if not mark:
        redacted = f"***@{storage.rpartition('@')[2]}" if "@" in storage else storage
        raise UserError(f"--storage {redacted}: give an address such as postgresql://user:password@host/database")
    return f"postgresql+psycopg://{address}" if scheme in ("postgresql", "postgres") else storage
