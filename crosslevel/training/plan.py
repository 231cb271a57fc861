"""The length, batches and steps of a training: given, or chosen by the rules of `defaults`."""

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

from crosslevel.cld.loss import CrossLevel
from crosslevel.models.build import is_modern
from crosslevel.models.encoder import Encoder
from crosslevel.settings.describe import describe
from crosslevel.training import defaults
from crosslevel.training.components import Components
from crosslevel.training.inputs import Feed
from crosslevel.training.loop.fit import Batches
from crosslevel.training.loop.sharding import check_strategy
from crosslevel.training.options import Optimization, Resolved, Runtime, too_long_a_warmup
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import UserError

MEASURED = "CROSSLEVEL_IMAGES_A_SECOND"
"""The first process's measurement in a distributed run; the others, which it starts later, need the same value."""

MEASURED_WITH = 128  # images a step
TIMED, ENOUGH = 10, 5.0  # steps, and seconds after which fewer suffice


class Choices:
    """The choices of the rules for one run, in order."""

    def __init__(self) -> None:
        self.choices: list[defaults.Choice] = []

    def __call__(self, value: Any, choice: defaults.Choice) -> Any:
        """Return ``value`` if given, or the rule's choice, which is recorded."""
        if value is not None:
            return value
        self.choices.append(choice)
        return choice.value


class Plan(NamedTuple):
    """The batches and steps of a training; ``choices``: those of the rules, each with its reason."""

    batches: Batches
    optimization: Resolved
    steps: int
    warmup_steps: int
    choices: list[defaults.Choice]


def settle(
    components: Components,
    requested: Optimization,
    feed: Feed,
    batches_of_size: Callable[[int], Batches],
    runtime: Runtime,
    epoch_size: int | None = None,
) -> Plan:
    """Choose the open settings from what is known before the training; check that everything fits.

    Args:
        components: the networks and losses; a method's settings that depend on the number of steps are set here.
        requested: the given settings.
        feed: the images.
        batches_of_size: makes the batches, by the number of images on each device.
        runtime: hardware and processes.
        epoch_size: images that count as an epoch of a stream.

    Raises:
        ValueError: settings that do not fit each other.

    """
    rules, devices = Choices(), runtime.world.size
    rules.choices += feed.choices
    images = feed.length or epoch_size or 0
    views_open, epochs = not components.views.chosen, requested.epochs
    if views_open:
        _crops(components, rules)
    if requested.minutes is not None:
        trial_batches = batches_of_size(requested.batch_size or min(MEASURED_WITH, max(2, images // devices)))
        rate = devices * _images_a_second(components, trial_batches, runtime)
        epochs = rules(None, defaults.affordable_epochs(requested.minutes, rate, images))
    epochs = float(rules(epochs, defaults.epochs(images)))
    if views_open:
        _flips(components, rules, epochs)
    warmup = requested.warmup_epochs
    if warmup is not None and warmup > epochs:
        raise too_long_a_warmup(warmup, epochs)
    size = rules(requested.batch_size, defaults.batch_size(images, epochs, devices, runtime.hardware.device.type))
    batches = batches_of_size(size)
    if batches.batch_size < size:
        size = rules(None, defaults.largest_batch(batches.batch_size, devices, size))
    steps, batch = max(1, round(epochs * len(batches))), batches.batch_size * devices
    by_steps = {"momentum": lambda: defaults.momentum(steps), "queue": lambda: defaults.queue(feed.length, batch)}
    _complete(components, rules, by_steps)
    _time(components, rules, epochs)
    compared = batches.batch_size // requested.accumulate
    if compared < 2 <= requested.accumulate:
        raise UserError(
            f"accumulate={requested.accumulate} leaves parts of less than 2 images of the batch of "
            f"{batches.batch_size}: lower it or raise batch_size"
        )
    components.check(compared, devices, feed.length)
    if components.cld is not None:
        rules(components.cld.groups, defaults.groups(compared * (devices if components.cld.gather else 1)))
    optimization = _rates(components, requested, rules, epochs, size, batch)
    check_strategy(runtime.strategy, optimization.optimizer, runtime.hardware.precision)
    return Plan(batches, optimization, steps, round(optimization.warmup_epochs * len(batches)), rules.choices)


def _crops(components: Components, rules: Choices) -> None:
    """Set the views, if no preset is given, except what depends on the number of epochs."""
    views = components.views
    preset = rules(None, defaults.preset(views.size))
    small = views.size <= defaults.LARGE_VIEW
    views.choose(preset, scale=rules(views.arguments()["scale"], defaults.crop_scale(views.size)) if small else None)


def _flips(components: Components, rules: Choices, epochs: float) -> None:
    """Set whether views are mirrored, by the number of epochs."""
    views = components.views
    if views.size <= defaults.LARGE_VIEW:
        views.choose(views.preset, flip=rules(views.arguments()["flip"], defaults.flip(epochs)))
    components.settings["views"] = describe(views)


def _rates(
    components: Components, requested: Optimization, rules: Choices, epochs: float, size: int, batch: int
) -> Resolved:
    """The optimizer and its rates; default choices (SGD, a rate of 1) are not listed."""
    started, modern = components.encoder.started, is_modern(components.encoder.architecture)
    preferred = components.method.usual_optimizer
    note = rules if modern or preferred != "sgd" else Choices()
    optimizer = note(requested.optimizer, defaults.optimizer(modern, preferred))
    lr = rules(requested.lr, defaults.learning_rate(optimizer, components.method.sgd_rate, batch))
    decay = rules(requested.weight_decay, defaults.weight_decay(optimizer))
    warmup = rules(requested.warmup_epochs, defaults.warmup_epochs(epochs))
    note = rules if started else Choices()
    share = note(requested.encoder_rate, defaults.encoder_rate(started))
    note = rules if started and modern else Choices()
    by_layer = note(requested.layer_decay, defaults.layer_decay(started, modern))
    return Resolved(epochs, size, optimizer, lr, decay, warmup, share, by_layer, requested.accumulate)


def _complete(components: Components, rules: Choices, choices: Mapping[str, Callable[[], defaults.Choice]]) -> None:
    """Complete the method's open settings with these numbers, in the tree of settings too."""
    for name, choice in choices.items():
        if name in components.method.open_settings():
            value = components.settings["method"]["init_args"][name] = rules(None, choice())
            components.method.complete(**{name: value})


def _time(components: Components, rules: Choices, epochs: float) -> None:
    """Choose the open periods of schedules."""
    branches = (
        ("method", components.method, components.settings["method"]["init_args"]),
        ("cld", components.cld, components.settings["cld"]),
    )
    for name, branch, arguments in branches:
        schedule = None if branch is None else branch.schedule
        if schedule is not None and schedule.high is not None and schedule.period is None:
            choice = defaults.temperature_period(epochs)
            schedule.period = rules(None, choice._replace(setting=f"{name}.{choice.setting}"))
            arguments["temperature_period"] = schedule.period
    by_epochs = {"queue_start": defaults.queue_start, "teacher_warmup": defaults.teacher_warmup}
    _complete(components, rules, {name: partial(rule, epochs) for name, rule in by_epochs.items()})
    for choice in () if components.gh is None else defaults.harmonization(epochs):
        name = choice.setting.removeprefix("gh.")
        if getattr(components.gh, name) is None:
            components.settings["gh"][name] = rules(None, choice)
            setattr(components.gh, name, choice.value)


def _images_a_second(components: Components, batches: Batches, runtime: Runtime) -> float:
    """Images a second of one device; measured by the first process alone."""
    if runtime.world.rank == 0:
        seconds = seconds_a_step(components.encoder, components.views, batches, runtime.hardware, cld=components.cld)
        os.environ[MEASURED] = str(batches.batch_size / seconds)
    return float(os.environ[MEASURED])


def seconds_a_step(
    encoder: Encoder,
    views: Views,
    batches: Batches,
    hardware: Hardware,
    clock: Callable[[], float] = time.perf_counter,
    cld: CrossLevel | None = None,
) -> float:
    """Median seconds of reading a batch, drawing its views, and a step of a copy of the encoder on all of them.

    With ``cld`` the group branch is part of the step: beside a narrow encoder on a CPU it takes a quarter of it. The
    parts and the state of torch's random numbers are not changed. The method's heads, loss and memory are not measured:
    they are small. The median ignores a stall of the machine.
    """
    with torch.random.fork_rng(devices=[]):
        network = copy.deepcopy(encoder).train().to(hardware.device).to(memory_format=torch.channels_last)
        draw, branch = copy.deepcopy(views).to(hardware.device), copy.deepcopy(cld)
        trained = [*network.parameters()]
        if branch is not None:
            trained += branch.to(hardware.device).parameters()
        optimizer = torch.optim.SGD(trained, lr=0.0)
        ends: list[float] = []
        for batch in itertools.chain.from_iterable(itertools.repeat(batches)):
            drawn_views = draw(batch.images.to(hardware.device))
            with hardware.autocast():
                features = [network(view.contiguous(memory_format=torch.channels_last)) for view in drawn_views]
            optimizer.zero_grad()
            loss = torch.stack([h.float().square().mean() for h in features]).sum()
            if branch is not None and len(features) > 1:
                loss = loss + branch(*features[:2])
            loss.backward()
            optimizer.step()
            float(features[0].detach().flatten()[0])  # waits for the device
            ends.append(clock())
            if len(ends) > TIMED or (len(ends) > 2 and ends[-1] - ends[0] > ENOUGH):
                break
    return statistics.median(after - before for before, after in itertools.pairwise(ends))
