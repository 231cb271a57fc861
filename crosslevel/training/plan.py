"""How long, in which batches and steps: what is given, and by the rules of `defaults` what is not."""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from crosslevel.models.build import is_modern
from crosslevel.models.encoder import Encoder
from crosslevel.settings.describe import describe
from crosslevel.training import defaults
from crosslevel.training.inputs import Feed
from crosslevel.training.loop.fit import Batches
from crosslevel.training.loop.sharding import check_strategy
from crosslevel.training.options import Optimization, Resolved, Runtime
from crosslevel.training.parts import Parts
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import UserError

MEASURED = "CROSSLEVEL_IMAGES_A_SECOND"
"""What the first process of a distributed run measured; the others, which it starts later, need the same."""

MEASURED_WITH = 128  # images a step
TIMED, ENOUGH = 10, 5.0  # steps, and seconds after which fewer do


class Chosen:
    """What the rules chose for one run, in the order in which they were asked."""

    def __init__(self) -> None:
        self.made: list[defaults.Choice] = []

    def __call__(self, given: Any, choice: defaults.Choice) -> Any:
        """The value ``given``, or else the rule's, which is noted."""
        if given is not None:
            return given
        self.made.append(choice)
        return choice.value


class Plan(NamedTuple):
    """The batches and steps of a training; ``choices``: what rules gave, each with its reason."""

    batches: Batches
    optimization: Resolved
    steps: int
    warmup_steps: int
    choices: list[defaults.Choice]


def settle(
    parts: Parts,
    wanted: Optimization,
    feed: Feed,
    batches_of_size: Callable[[int], Batches],
    runtime: Runtime,
    epoch_size: int | None = None,
) -> Plan:
    """Choose what was left open, by what is known before the training; check that everything fits.

    Args:
        parts: the networks and losses; what a method leaves open until the number of steps is known is set.
        wanted: what was given.
        feed: the images.
        batches_of_size: makes the batches, for so many images on each device.
        runtime: where it runs.
        epoch_size: images that count as an epoch of a stream.

    Raises:
        ValueError: settings that do not fit each other.

    """
    rules, devices = Chosen(), runtime.world.size
    rules.made += feed.choices
    images = feed.known or epoch_size or 0
    views_open, epochs = not parts.views.chosen, wanted.epochs
    if views_open:
        _crops(parts, rules)
    if wanted.minutes is not None:
        tried = batches_of_size(wanted.batch_size or min(MEASURED_WITH, max(2, images // devices)))
        rate = devices * _images_a_second(parts, tried, runtime)
        epochs = rules(None, defaults.affordable_epochs(wanted.minutes, rate, images))
    epochs = float(rules(epochs, defaults.epochs(images)))
    if views_open:
        _flips(parts, rules, epochs)
    warmup = wanted.warmup_epochs
    if epochs <= 0:
        raise UserError(f"epochs={epochs:g} must be positive")
    if warmup is not None and not 0 <= warmup <= epochs:
        raise UserError(f"warmup_epochs={warmup:g} must be from 0 to epochs={epochs:g}: lower it or raise epochs")
    size = rules(wanted.batch_size, defaults.batch_size(images, epochs, devices, runtime.hardware.device.type))
    batches = batches_of_size(size)
    steps, batch = max(1, round(epochs * len(batches))), batches.batch_size * devices
    by_steps = {"momentum": lambda: defaults.momentum(steps), "queue": lambda: defaults.queue(feed.known, batch)}
    _complete(parts, rules, by_steps)
    _time(parts, rules, epochs)
    parts.check(batches.batch_size, devices, feed.known)
    if parts.cld is not None:
        rules(parts.cld.groups, defaults.groups(batch if parts.cld.gather else batches.batch_size))
    optimization = _rates(parts, wanted, rules, epochs, size, batch)
    check_strategy(runtime.strategy, optimization.optimizer, runtime.hardware.precision)
    return Plan(batches, optimization, steps, round(optimization.warmup_epochs * len(batches)), rules.made)


def _crops(parts: Parts, rules: Chosen) -> None:
    """How views are drawn, where no preset is given: all but what hangs on the number of epochs."""
    views = parts.views
    preset = rules(None, defaults.preset(views.size))
    small = views.size <= defaults.LARGE_VIEW
    views.choose(preset, scale=rules(views.arguments()["scale"], defaults.crop_scale(views.size)) if small else None)


def _flips(parts: Parts, rules: Chosen, epochs: float) -> None:
    """Whether views are mirrored, by the number of epochs."""
    views = parts.views
    if views.size <= defaults.LARGE_VIEW:
        views.choose(views.preset, flip=rules(views.arguments()["flip"], defaults.flip(epochs)))
    parts.settings["views"] = describe(views)


def _rates(parts: Parts, wanted: Optimization, rules: Chosen, epochs: float, size: int, batch: int) -> Resolved:
    """The optimizer and its rates; a choice that is the usual one (SGD, a rate of 1) is not listed."""
    started, modern = parts.encoder.started, is_modern(parts.encoder.architecture)
    usual = parts.method.usual_optimizer
    told = rules if modern or usual != "sgd" else Chosen()
    optimizer = told(wanted.optimizer, defaults.optimizer(modern, usual))
    lr = rules(wanted.lr, defaults.learning_rate(optimizer, parts.method.sgd_rate, batch))
    decay = rules(wanted.weight_decay, defaults.weight_decay(optimizer))
    warmup = rules(wanted.warmup_epochs, defaults.warmup_epochs(epochs))
    told = rules if started else Chosen()
    share = told(wanted.encoder_rate, defaults.encoder_rate(started))
    told = rules if started and modern else Chosen()
    by_layer = told(wanted.layer_decay, defaults.layer_decay(started, modern))
    for name, value in (("encoder_rate", share), ("layer_decay", by_layer)):
        if not 0 < value <= 1:
            raise UserError(f"{name}={value:g} must be above 0 and at most 1")
    return Resolved(epochs, size, optimizer, lr, decay, warmup, share, by_layer)


def _complete(parts: Parts, rules: Chosen, choices: Mapping[str, Callable[[], defaults.Choice]]) -> None:
    """What a method leaves open until these numbers are known; the settings have it too."""
    for name, choice in choices.items():
        if name in parts.method.open_settings():
            value = parts.settings["method"]["init_args"][name] = rules(None, choice())
            parts.method.complete(**{name: value})


def _time(parts: Parts, rules: Chosen, epochs: float) -> None:
    """The periods of schedules that were left open."""
    branches = (
        ("method", parts.method, parts.settings["method"]["init_args"]),
        ("cld", parts.cld, parts.settings["cld"]),
    )
    for name, branch, arguments in branches:
        schedule = None if branch is None else branch.schedule
        if schedule is not None and schedule.high is not None and schedule.period is None:
            choice = defaults.temperature_period(epochs)
            schedule.period = rules(None, choice._replace(setting=f"{name}.{choice.setting}"))
            arguments["temperature_period"] = schedule.period
    by_epochs = {"queue_start": defaults.queue_start, "teacher_warmup": defaults.teacher_warmup}
    _complete(parts, rules, {name: partial(rule, epochs) for name, rule in by_epochs.items()})
    for choice in () if parts.gh is None else defaults.harmonization(epochs):
        name = choice.setting.removeprefix("gh.")
        if getattr(parts.gh, name) is None:
            parts.settings["gh"][name] = rules(None, choice)
            setattr(parts.gh, name, choice.value)


def _images_a_second(parts: Parts, batches: Batches, runtime: Runtime) -> float:
    """Of one device, in a step; measured by the first process alone."""
    if runtime.world.rank == 0:
        seconds = seconds_a_step(parts.encoder, parts.views, batches, runtime.hardware)
        os.environ[MEASURED] = str(batches.batch_size / seconds)
    return float(os.environ[MEASURED])


def seconds_a_step(
    encoder: Encoder,
    views: Views,
    batches: Batches,
    hardware: Hardware,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """What reading a batch, drawing its views, and a step of a copy of the encoder on all of them take.

    The encoder stays as it is, and so does the state of torch's random numbers. Heads, losses and memories are not
    measured: beside an encoder they are little. The median of the steps, so that a stall of the machine does not count.
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
            ends.append(clock())
            if len(ends) > TIMED or (len(ends) > 2 and ends[-1] - ends[0] > ENOUGH):
                break
    return statistics.median(after - before for before, after in itertools.pairwise(ends))
