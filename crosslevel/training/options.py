"""The settings of a training, in groups; open settings are chosen by `plan.settle`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from crosslevel.data.loaders.workers import cores
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import Source
from crosslevel.settings.describe import describe
from crosslevel.training.cluster.launch import Launcher
from crosslevel.training.components import Components, MakeCLD, MakeEncoder, MakeGH, MakeMethod, MakeViews
from crosslevel.training.inputs import Order
from crosslevel.training.loop.graph import Compile
from crosslevel.training.loop.module import Optimizer
from crosslevel.training.loop.sharding import Strategy
from crosslevel.training.monitor import Which
from crosslevel.utils.device import Device, Hardware
from crosslevel.utils.errors import UserError
from crosslevel.utils.processes import World
from crosslevel.utils.rng import mixed

SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max  # of the positive, finite numbers


@dataclass(frozen=True)
class Data:
    """The images, and how they are read."""

    images: Source
    data_root: str | None
    crops: Crops | None
    epoch_size: int | None
    order: Order
    track_positives: float
    hold_out: int | None
    memory: float
    workers: int | None


@dataclass(frozen=True)
class Optimization:
    """How long, and in which steps."""

    epochs: float | None
    minutes: float | None
    batch_size: int | None
    optimizer: Optimizer | None
    lr: float | None
    weight_decay: float | None
    warmup_epochs: float | None
    encoder_rate: float | None
    layer_decay: float | None
    accumulate: int


@dataclass(frozen=True)
class Runtime:
    """The hardware and processes of a training."""

    device: Device
    hardware: Hardware
    world: World
    sync_batchnorm: bool
    seed: int
    compile: Compile
    strategy: Strategy
    launcher: Launcher
    max_failures: int


@dataclass(frozen=True)
class Logging:
    """The logging and saving of a training."""

    log_every: int
    monitor: Which | None
    monitor_every: int | None
    checkpoint_minutes: float
    report_html: bool
    stop_fall: bool
    logger: str | None


@dataclass(frozen=True)
class Makers:
    """The factories of a training's components."""

    encoder: MakeEncoder
    cld: MakeCLD | None
    views: MakeViews
    method: MakeMethod | None
    gh: MakeGH | None
    share_hidden: bool


@dataclass(frozen=True)
class Resolved:
    """An `Optimization` with nothing left open."""

    epochs: float
    batch_size: int
    optimizer: Optimizer
    lr: float
    weight_decay: float
    warmup_epochs: float
    encoder_rate: float
    layer_decay: float
    accumulate: int


def check_numbers(data: Data, steps: Optimization, logging: Logging, seed: int) -> None:
    """Refuse numbers that suit no images at all, before images are opened and anything is written.

    Raises:
        UserError: a number is out of its range.

    """
    mixed(seed)  # refuses negative ones
    ranges: list[tuple[str, float | None, float, float, str]] = [
        ("seed", seed, 0, 2**64 - 1, " must be below 2^64"),
        ("epochs", steps.epochs, SMALLEST, LARGEST, " must be positive"),
        ("minutes", steps.minutes, SMALLEST, LARGEST, " must be positive"),
        ("batch_size", steps.batch_size, 2, LARGEST, " leaves nothing to compare with: give at least 2"),
        ("accumulate", steps.accumulate, 1, LARGEST, ": one part or more"),
        ("lr", steps.lr, 0, LARGEST, " must be 0 or more"),
        ("weight_decay", steps.weight_decay, 0, LARGEST, " must be 0 or more"),
        ("warmup_epochs", steps.warmup_epochs, 0, LARGEST, " must be 0 or more"),
        ("encoder_rate", steps.encoder_rate, SMALLEST, 1, " must be above 0 and at most 1"),
        ("layer_decay", steps.layer_decay, SMALLEST, 1, " must be above 0 and at most 1"),
        ("epoch_size", data.epoch_size, 1, LARGEST, ": at least one image"),
        ("hold_out", data.hold_out, 0, LARGEST, ": 0 or more"),
        ("workers", data.workers, 0, LARGEST, " must be 0 or more"),
        ("memory", data.memory, 0, math.inf, " must be 0 or more"),
        ("track_positives", data.track_positives, 0, 1, " must be from 0 to 1"),
        ("log_every", logging.log_every, 1, LARGEST, " must be at least 1"),
        ("monitor_every", logging.monitor_every, 0, LARGEST, " must be 0 or more"),
        ("checkpoint_minutes", logging.checkpoint_minutes, 0, math.inf, " must be 0 or more"),
    ]
    for name, value, least, most, problem in ranges:
        if value is not None and not least <= value <= most:
            raise UserError(f"{name}={value}{problem}")
    epochs = steps.epochs if steps.minutes is None else None  # else they are measured
    if steps.warmup_epochs is not None and epochs is not None and steps.warmup_epochs > epochs:
        raise too_long_a_warmup(steps.warmup_epochs, epochs)


def too_long_a_warmup(warmup_epochs: float, epochs: float) -> UserError:
    """The error of a warm-up that is longer than the training."""
    return UserError(f"warmup_epochs={warmup_epochs:g} must be from 0 to epochs={epochs:g}: lower it or raise epochs")


def workers_of(requested: int | None) -> int:
    """Processes that decode: one a core that this process may use, at most 8, unless given."""
    return min(8, cores()) if requested is None else requested


def figures_every(epochs: float, requested: int | None) -> int:
    """Epochs between figures of the features: a tenth of all, unless given."""
    return max(1, int(epochs) // 10) if requested is None else requested


def tree(
    data: Data, steps: Resolved, runtime: Runtime, logging: Logging, components: Components, share_hidden: bool
) -> dict[str, Any]:
    """All settings of a run in the form of the command line, including the chosen ones: enough to repeat it."""
    return {
        "images": data.images.absolute().text,
        **{name: components.settings[name] for name in ("encoder", "cld", "gh", "views", "method")},
        "epochs": steps.epochs,
        "minutes": None,
        "epoch_size": data.epoch_size,
        "batch_size": steps.batch_size,
        "optimizer": steps.optimizer,
        "lr": steps.lr,
        "weight_decay": steps.weight_decay,
        "warmup_epochs": steps.warmup_epochs,
        "encoder_rate": steps.encoder_rate,
        "layer_decay": steps.layer_decay,
        "accumulate": steps.accumulate,
        "device": runtime.device,
        "devices": runtime.world.devices,
        "nodes": runtime.world.nodes,
        "strategy": runtime.strategy,
        "launcher": runtime.launcher,
        "max_failures": runtime.max_failures,
        "share_hidden": share_hidden,
        "sync_batchnorm": runtime.sync_batchnorm,
        "precision": runtime.hardware.precision,
        "compile": runtime.compile,
        "workers": data.workers,
        "memory": data.memory,
        "order": data.order,
        "track_positives": data.track_positives,
        "hold_out": data.hold_out,
        "data_root": data.data_root,
        "crops": None if data.crops is None else describe(data.crops),
        "seed": runtime.seed,
        "log_every": logging.log_every,
        "monitor": logging.monitor,
        "monitor_every": logging.monitor_every,
        "checkpoint_minutes": logging.checkpoint_minutes,
        "report_html": logging.report_html,
        "stop_fall": logging.stop_fall,
        "logger": logging.logger,
    }
