"""A plain training loop on labelled images, which continues after a kill; all protocols that train use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.features.extract import Runtime
from crosslevel.models.encoder import Encoder
from crosslevel.models.schedules import SCHEDULES
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import LAST
from crosslevel.utils.rng import generator
from crosslevel.utils.tensors import load_saved, write_saved

SMALL = 64  # pixels: in smaller images, crops of a twelfth would miss the object

Progress = Callable[[int, int], None]


@dataclass
class Training:
    """The settings of one training of a classifier: everything that its result depends on.

    ``rates`` has a learning rate for each of the optimizer's groups of parameters; ``schedule`` multiplies them.
    """

    epochs: int
    batch_size: int
    schedule: str
    weight_decay: float
    seed: int
    folder: Path | None = None


def train_classifier(
    network: Callable[[Tensor], Tensor],
    groups: list[dict[str, Any]],
    modules: nn.ModuleList,
    images: Images,
    encoder: Encoder,
    config: Training,
    runtime: Runtime,
    bad_files: BadFiles,
    progress: Progress | None = None,
) -> None:
    """Train ``network`` by cross-entropy on random crops and flips, with SGD of momentum 0.9.

    After each epoch the whole state is saved in ``config.folder``, where the same call continues.

    Args:
        network: normalized views (B, 3, s, s) to logits (B, C).
        groups: parameters and their rate, as PyTorch's optimizers take them.
        modules: all modules that change while training.
        images: with labels.
        encoder: defines the views.
        config: epochs, batch size, schedule.
        runtime: where it runs.
        bad_files: collects unreadable images.
        progress: called with the epochs done and their total.

    Raises:
        ValueError: the loss is no number.

    """
    views = crops_and_flips(encoder).to(runtime.hardware.device)
    batches = TrainBatches(
        images, config.batch_size, seed=config.seed, bad_files=bad_files,
        crops=None if isinstance(images, InMemoryImages) else views.crops, workers=runtime.workers or 0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=config.weight_decay)
    base = [group["lr"] for group in optimizer.param_groups]
    checkpoint = None if config.folder is None else config.folder / LAST
    start = _resume(checkpoint, modules, optimizer)
    factor = SCHEDULES[config.schedule]
    for epoch in range(start, config.epochs):
        batches.epoch = epoch
        total = torch.zeros((), device=runtime.hardware.device)
        for step, batch in enumerate(batches):
            done = (epoch + step / len(batches)) / config.epochs
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor(done)
            total += _step(network, views, batch.images, batch.labels, optimizer, runtime, (config.seed, epoch, step))
        if not bool(total.isfinite()) or not all(bool(p.isfinite().all()) for p in modules.parameters()):
            raise diverged(epoch + 1, base)
        if checkpoint is not None:
            state = {"modules": modules.state_dict(), "epoch": epoch + 1}
            if epoch + 1 < config.epochs:
                state["optimizer"] = optimizer.state_dict()
            write_saved(checkpoint, state)
        if progress is not None:
            progress(epoch + 1, config.epochs)


def _step(
    network: Callable[[Tensor], Tensor],
    views: Views,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    runtime: Runtime,
    seeds: tuple[int, ...],
) -> Float[Tensor, ""]:
    device = runtime.hardware.device
    rng = generator(*seeds)
    view = views(images.to(device, non_blocking=True), rng)[0].contiguous(memory_format=torch.channels_last)
    with runtime.hardware.autocast():
        logits = network(view)
    loss = F.cross_entropy(logits.float(), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _resume(checkpoint: Path | None, modules: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the saved state; return the next epoch."""
    if checkpoint is None:
        return 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not checkpoint.is_file():
        return 0
    state = load_saved(checkpoint)
    modules.load_state_dict(state["modules"])
    if "optimizer" in state:  # a finished training has no checkpoint
        optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


def diverged(epoch: int, rates: list[float]) -> UserError:
    """The error of a training whose loss is no number."""
    text = ", ".join(f"{rate:g}" for rate in rates)
    return UserError(f"the loss is no longer a number in epoch {epoch}: lower the learning rates ({text})")


def crops_and_flips(encoder: Encoder) -> Views:
    """The views of supervised training: crops of 8 % of the image and more (20 % of small images), flips."""
    size, mean, std = encoder.view
    least = 0.2 if size <= SMALL else 0.08
    views = Views("cifar", size=size, scale=(least, 1.0), jitter=0.0, grayscale=0.0, mean=mean, std=std)
    views.count = 1
    return views


def training_folder(run_dir: Path | None, *, name: str, **settings: Any) -> Path | None:
    """A folder of its own for each training, by everything that it depends on."""
    if run_dir is None:
        return None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return run_dir / "probe" / f"{name}-{digest[:12]}"
