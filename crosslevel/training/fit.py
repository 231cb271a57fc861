"""Pretraining: the training step, and the loop around it. The only training room that knows Lightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.models.numerics import avoid_faults, glance, tell
from crosslevel.models.sync_batchnorm import synchronize
from crosslevel.training.callbacks import Checkpoints, Clock, Display, Monitor, Recorder, StopOnSignal, Stream
from crosslevel.training.collapse import CollapseWatch
from crosslevel.training.module import Pretrain
from crosslevel.utils.device import Hardware
from crosslevel.utils.tensors import load_tensors

LAST = "last.ckpt"
_PARTS = {"state_dict", "optimizer_states", "loops", "callbacks", "epoch", "global_step"}
PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


class Outcome(NamedTuple):
    """How far the run came: ``steps`` of all, ``finished``, and the ``signal`` that ended it, if one did."""

    steps: int
    finished: bool
    signal: int | None


def fit(
    module: Pretrain,
    batches: TrainBatches | StreamBatches,
    folder: Path,
    *,
    hardware: Hardware,
    devices: int = 1,
    sync_batchnorm: bool = False,
    log_every: int = 10,
    checkpoint_minutes: float = 10,
    monitor: Callable[[], dict[str, float]] | None = None,
    monitor_every: int = 1,
    resume: bool = False,
    saved: Callable[[], None] = lambda: None,
    console: Console | None = None,
) -> Outcome:
    """Train ``module`` on ``batches`` up to its number of steps, leaving logs and checkpoints in ``folder``.

    Args:
        module: the training step.
        batches: one epoch's batches; repeated in new order as often as needed.
        folder: the run's folder.
        hardware: device and precision.
        devices: how many of that device; more than one trains distributed (DDP).
        sync_batchnorm: normalize over the batches of all devices.
        log_every: steps between rows of the log.
        checkpoint_minutes: at most so many between checkpoints within an epoch.
        monitor: called every ``monitor_every`` epochs; its figures go into the log and nowhere else.
        monitor_every: epochs.
        saved: called after each checkpoint.
        resume: continue from ``folder``'s last checkpoint.
        console: where progress is shown.

    Raises:
        NotFinite: the loss is no longer a number.
        FileNotFoundError: there is no checkpoint to continue from.
        ValueError: a batch normalization that cannot be synchronized, or no checkpoint of tensors and plain values.

    """
    checkpoints_folder = folder / "checkpoints"
    last = checkpoints_folder / LAST
    if resume and not last.is_file():
        raise FileNotFoundError(f"{last} does not exist: there is nothing to resume; start the run anew")
    if resume:
        _check(last)
    checkpoints_folder.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    epoch, clock = len(batches), Clock()
    recorder = Recorder(folder, epoch, log_every, clock)
    display = Display(recorder, console)
    checkpoints = Checkpoints(checkpoints_folder, epoch, checkpoint_minutes, clock, saved)
    stopper = StopOnSignal(checkpoints, console)
    callbacks: list[L.Callback] = [recorder]
    if monitor is not None:
        callbacks.append(Monitor(monitor, monitor_every, epoch, recorder))
    callbacks += [CollapseWatch(recorder, folder, module.warmup_steps, console), display, checkpoints, stopper]
    _quiet()
    on_gpu = hardware.device.type == "cuda"
    if sync_batchnorm:
        synchronize(module, on_gpu)  # Lightning's conversion would drop the activations in timm's normalizations
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else hardware.device.type,
        devices=devices,
        precision=PRECISIONS[hardware.precision],
        max_steps=module.steps,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=on_gpu,
        default_root_dir=folder,
    )
    module.to(memory_format=torch.channels_last)
    view = module.views.size
    sizes = (view, module.method.piece_size(view) or view)
    tell(console, avoid_faults(module.encoder, lambda: glance(module.encoder, *sizes), hardware, whole=module))
    module.stream = lambda: _stream(batches, trainer, clock)
    try:
        trainer.fit(module, ckpt_path=last if resume else None, weights_only=True)
    finally:
        display.release()
        stopper.release()
    return Outcome(trainer.global_step, trainer.global_step >= module.steps, stopper.requested)


def _stream(batches: TrainBatches | StreamBatches, trainer: L.Trainer, clock: Clock) -> Stream:
    clock.stream = Stream(batches, trainer.global_step)
    return clock.stream


def _check(checkpoint: Path) -> None:
    """Refuse a checkpoint that Lightning could not take up, before anything is built for it."""
    state = load_tensors(checkpoint, mmap=True)
    lacks = _PARTS - state.keys() if isinstance(state, dict) else _PARTS
    if lacks:
        raise ValueError(f"{checkpoint} is no checkpoint of a run: it lacks {', '.join(sorted(lacks))}")


def _quiet() -> None:
    """Lightning's banners and advice are for its own users; ours get one line about device and precision."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory.*",
        ".*not resumable.*",
        ".*isinstance.treespec.*",
    ):
        warnings.filterwarnings("ignore", message=text)
