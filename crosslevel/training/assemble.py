"""The parts of a training, put together: what is given, and by the rules of `defaults` what is not."""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.images import Images
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.methods import METHODS, USUAL, Method
from crosslevel.models.encoder import Encoder
from crosslevel.settings import describe as settings
from crosslevel.training import defaults
from crosslevel.training.module import Optimizer, share_hidden
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware

Batches = TrainBatches | StreamBatches

MEASURED = "CROSSLEVEL_IMAGES_A_SECOND"
"""What the first process of a distributed run measured; the others, which it starts later, need the same."""

MEASURED_WITH = 128  # images a step
TIMED, ENOUGH = 10, 5.0  # steps, and seconds after which fewer do


class Plan(NamedTuple):
    """What a training is made of. ``settings``: as the run's config.yaml has them; ``choices``: what rules gave."""

    method: Method
    cld: CrossLevel | None
    batches: Batches
    steps: int
    warmup_steps: int
    settings: dict[str, Any]
    choices: list[defaults.Choice]


def assemble(
    source: Images | ImageStream,
    encoder: Encoder,
    cld: CrossLevel,
    views: Views,
    method: Callable[[nn.Module, int | None], Method] | None,
    *,
    epoch_size: int | None,
    epochs: float | None,
    minutes: float | None,
    batch_size: int | None,
    optimizer: Optimizer,
    lr: float | None,
    weight_decay: float | None,
    warmup_epochs: float | None,
    devices: int,
    share: bool,
    hardware: Hardware,
    rank: int,
    made: Callable[[int], Batches],
) -> Plan:
    """Build the method, and settle what was left open; ``made`` gives the batches of a size.

    Raises:
        ValueError: settings that do not fit each other.

    """
    known, branch = len(source) if isinstance(source, Images) else None, cld if cld.weight else None
    build: Callable[..., Method] = method or METHODS[USUAL]
    chosen, rules = build(encoder, known), defaults.Chosen()
    images, given_online = known or epoch_size or 0, chosen.online
    if branch is not None:
        chosen.online = max(chosen.online, 2)  # CLD compares two views that the trained network has seen
    views.count, views.plain = chosen.views, chosen.plain_views
    if not views.chosen:
        views.choose(rules(None, defaults.preset(views.size)))
    if share and branch is not None:
        share_hidden(chosen, branch)
    if minutes is not None:
        tried = made(batch_size or min(MEASURED_WITH, max(2, images // devices)))
        rate = devices * _images_a_second(encoder, views, tried, hardware, rank)
        epochs = rules(None, defaults.affordable_epochs(minutes, rate, images))
    epochs = float(rules(epochs, defaults.epochs(images)))
    if epochs <= 0 or (warmup_epochs is not None and not 0 <= warmup_epochs <= epochs):
        raise ValueError(
            f"epochs={epochs:g}, warmup_epochs={warmup_epochs}: give more than no epoch, and no longer a warm-up"
        )
    size = rules(batch_size, defaults.batch_size(images, epochs, devices, hardware.device.type))
    batches = made(size)
    steps, batch = max(1, round(epochs * len(batches))), batches.batch_size * devices
    _settle(chosen, rules, known, steps, batch)
    _check(encoder, branch, chosen, views, batches.batch_size, devices, known)
    if branch is not None:
        rules(branch.groups, defaults.groups(batch if branch.gather else batches.batch_size))
    rates = _rates(rules, optimizer, chosen.sgd_rate, batch, epochs, lr, weight_decay, warmup_epochs)
    told = {"epochs": epochs, "minutes": None, "batch_size": size, **rates, "method": _described(chosen, given_online)}
    return Plan(chosen, branch, batches, steps, round(rates["warmup_epochs"] * len(batches)), told, rules.made)


def _described(method: Method, online: int) -> dict[str, Any]:
    """The method as its options would build it again; ``online`` as they were given."""
    arguments = settings.describe(method, skip=("encoder", "images"))
    if "online" in arguments:
        arguments["online"] = online
    return {"class_path": f"{type(method).__module__}.{type(method).__name__}", "init_args": arguments}


def _settle(method: Any, rules: defaults.Chosen, images: int | None, steps: int, batch: int) -> None:
    """What a method leaves open until the number of steps is known."""
    if getattr(method, "momentum", 0) is None:
        method.momentum = rules(None, defaults.momentum(steps))
    if getattr(method, "queue", 0) is None:
        method.set_queue(rules(None, defaults.queue(images, batch)))


def _rates(
    rules: defaults.Chosen,
    optimizer: Optimizer,
    sgd: float,
    batch: int,
    epochs: float,
    lr: float | None,
    decay: float | None,
    warmup: float | None,
) -> dict[str, float]:
    return {
        "lr": rules(lr, defaults.learning_rate(optimizer, sgd, batch)),
        "weight_decay": rules(decay, defaults.weight_decay(optimizer)),
        "warmup_epochs": rules(warmup, defaults.warmup_epochs(epochs)),
    }


def _check(
    encoder: Encoder, cld: CrossLevel | None, method: Method, views: Views, batch: int, devices: int, images: int | None
) -> None:
    """Refuse, before anything is trained, what would fail in the first step."""
    if batch < 2:
        raise ValueError(f"batch_size={batch} leaves nothing to compare with: give at least 2")
    if batch < 2 * method.splits:
        raise ValueError(
            f"method.splits={method.splits} leaves some parts of the batch of {batch} images less than 2: lower splits "
            "or raise batch_size"
        )
    piece = method.piece_size(views.size)
    if piece is not None and encoder.fixed_size not in (None, piece):
        raise ValueError(
            f"{type(method).__name__}'s patches are {piece} pixels, {encoder.name} is built for {encoder.fixed_size}: "
            "give --method.jigsaw 0 or a convolutional encoder"
        )
    points = batch * (devices if cld is not None and cld.gather else 1)
    if cld is not None and cld.groups is not None and cld.groups > points:
        raise ValueError(
            f"cld.groups={cld.groups} exceeds the batch of {points} images: lower groups or raise batch_size"
        )
    needed, drawn = method.views - method.plain_views, len(views.augments)
    if 1 < drawn < needed:
        raise ValueError(
            f"views.preset={views.preset} has {drawn} different views, {type(method).__name__} "
            f"{'with CLD ' if cld is not None else ''}needs {needed}: choose a preset of one, such as mocov2"
        )
    queue = getattr(method, "queue", None)
    # Of a collection of few batches, what is not in this one is enough.
    if queue is not None and queue < min(batch * devices, (images or math.inf) - batch * devices):
        raise ValueError(f"method.queue={queue} is smaller than the batch of {batch * devices}: raise the queue")


def _images_a_second(encoder: Encoder, views: Views, batches: Batches, hardware: Hardware, rank: int) -> float:
    """Of one device, in a step; measured by the first process alone."""
    if rank == 0:
        os.environ[MEASURED] = str(batches.batch_size / seconds_a_step(encoder, views, batches, hardware))
    return float(os.environ[MEASURED])


def seconds_a_step(encoder: Encoder, views: Views, batches: Batches, hardware: Hardware) -> float:
    """What reading a batch, drawing its views, and a step of a copy of the encoder on all of them take.

    The encoder stays as it is, and so does the state of torch's random numbers. Heads, losses and memories are not
    measured: beside an encoder they are little.
    """
    with torch.random.fork_rng(devices=[]):
        network = copy.deepcopy(encoder).train().to(hardware.device).to(memory_format=torch.channels_last)
        draw = copy.deepcopy(views).to(hardware.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        ends: list[float] = []
        for batch in itertools.chain.from_iterable(itertools.repeat(batches)):
            shown = draw(batch.images.to(hardware.device))
            with hardware.autocast():
                features = [network(view.contiguous(memory_format=torch.channels_last)) for view in shown]
            optimizer.zero_grad()
            torch.stack([h.float().square().mean() for h in features]).sum().backward()
            optimizer.step()
            float(features[0].detach().flatten()[0])  # waits for the device
            ends.append(time.perf_counter())
            if len(ends) > TIMED or (len(ends) > 2 and ends[-1] - ends[0] > ENOUGH):
                break
    return (ends[-1] - ends[0]) / (len(ends) - 1)
