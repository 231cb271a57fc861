"""The settings of a training, in groups; what is left open is chosen in one place, `resolve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import Source
from crosslevel.methods import Method
from crosslevel.settings.describe import describe
from crosslevel.training.inputs import Order
from crosslevel.training.module import Optimizer
from crosslevel.training.monitor import Which
from crosslevel.training.parts import Parts
from crosslevel.utils.device import Device, Hardware
from crosslevel.utils.errors import UserError

BASE_RATES = {"adamw": 1e-3, "lars": 0.3}  # at 256 images a batch; SGD's is the method's own
BASE_DECAYS = {"sgd": 5e-4, "adamw": 0.05, "lars": 1e-6}


@dataclass(frozen=True)
class Data:
    """What is read, and how."""

    images: Source
    data_root: str | None
    crops: Crops | None
    epoch_size: int | None
    order: Order
    memory: float
    workers: int


@dataclass(frozen=True)
class Optimization:
    """How long, and in which steps."""

    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float | None
    weight_decay: float | None
    warmup_epochs: float | None


@dataclass(frozen=True)
class Runtime:
    """Where it runs."""

    device: Device
    hardware: Hardware
    devices: int
    sync_batchnorm: bool
    seed: int
    rank: int


@dataclass(frozen=True)
class Logging:
    """What is told of it, and kept."""

    log_every: int
    monitor: Which | None
    monitor_every: int
    checkpoint_minutes: float
    report_html: bool


@dataclass(frozen=True)
class Resolved:
    """An `Optimization` with nothing left open."""

    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float
    weight_decay: float
    warmup_epochs: float


def resolve(wanted: Optimization, method: Method, devices: int) -> Resolved:
    """Choose what was left open, by what is known before the training.

    Raises:
        UserError: epochs and warm-up that cannot be.

    """
    epochs, warmup = wanted.epochs, wanted.warmup_epochs
    if epochs < 1 or (warmup is not None and not 0 <= warmup <= epochs):
        raise UserError(f"epochs={epochs}, warmup_epochs={warmup}: give at least one epoch, and no longer a warm-up")
    rate = BASE_RATES.get(wanted.optimizer, method.sgd_rate) * wanted.batch_size * devices / 256
    return Resolved(
        epochs,
        wanted.batch_size,
        wanted.optimizer,
        rate if wanted.lr is None else wanted.lr,
        BASE_DECAYS[wanted.optimizer] if wanted.weight_decay is None else wanted.weight_decay,
        warmup_of(epochs, warmup),
    )


def warmup_of(epochs: int, given: float | None) -> float:
    """The epochs in which the learning rate rises: a tenth of all, at most 5, unless given."""
    return min(5.0, epochs / 10) if given is None else given


def workers_of(given: int | None) -> int:
    """Processes that decode: one a core, at most 8, unless given."""
    return min(8, os.cpu_count() or 1) if given is None else given


def figures_every(epochs: int, given: int | None) -> int:
    """Epochs between figures of the features: a tenth of all, unless given."""
    return max(1, epochs // 10) if given is None else given


def tree(
    data: Data, steps: Resolved, runtime: Runtime, logging: Logging, parts: Parts, share_hidden: bool
) -> dict[str, Any]:
    """All settings of a run as the command line has them, with what was chosen: enough to repeat it."""
    return {
        "images": data.images.absolute().text,
        **{name: parts.settings[name] for name in ("encoder", "cld", "views", "method")},
        "epochs": steps.epochs,
        "epoch_size": data.epoch_size,
        "batch_size": steps.batch_size,
        "optimizer": steps.optimizer,
        "lr": steps.lr,
        "weight_decay": steps.weight_decay,
        "warmup_epochs": steps.warmup_epochs,
        "device": runtime.device,
        "devices": runtime.devices,
        "share_hidden": share_hidden,
        "sync_batchnorm": runtime.sync_batchnorm,
        "precision": runtime.hardware.precision,
        "workers": data.workers,
        "memory": data.memory,
        "order": data.order,
        "data_root": data.data_root,
        "crops": None if data.crops is None else describe(data.crops),
        "seed": runtime.seed,
        "log_every": logging.log_every,
        "monitor": logging.monitor,
        "monitor_every": logging.monitor_every,
        "checkpoint_minutes": logging.checkpoint_minutes,
        "report_html": logging.report_html,
    }
