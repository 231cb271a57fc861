"""The loop around the training step, in `_steps`; devices, precision and distribution are Lightning Fabric's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from rich.console import Console

from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.loaders.workers import worker_trouble
from crosslevel.models.numerics import avoid_faults, glance, say_once
from crosslevel.models.sync_batchnorm import synchronize
from crosslevel.runs import Run
from crosslevel.training.loop import checkpoints, graph
from crosslevel.training.loop.fabric import (
    all_ranks_end,
    check_memory,
    check_step,
    fabric_of,
    hold_images,
    memory_of,
    set_up,
)
from crosslevel.training.loop.graph import Backend, Compile
from crosslevel.training.loop.guards.collapse import CollapseWatch
from crosslevel.training.loop.guards.fall import FallGuard
from crosslevel.training.loop.log import Clock, Display, Log, Stream
from crosslevel.training.loop.loggers import Boards
from crosslevel.training.loop.module import Pretrain
from crosslevel.training.loop.sharding import Sharding, Strategy
from crosslevel.training.loop.state import collect, restore
from crosslevel.utils.console import printer, say
from crosslevel.utils.device import Hardware
from crosslevel.utils.distributed import mean
from crosslevel.utils.processes import StopRequest, World

SCALER = "MixedPrecision"  # where a checkpoint keeps float16's scale, as former versions did
Batches = TrainBatches | StreamBatches
ALONE = World(1, 1, 0)


class Outcome(NamedTuple):
    """The result of a run: finished ``steps``, whether it is ``finished``, and the ``signal`` that ended it, if any.

    ``fallen``: it ended early, because the features fell below those of the start.
    """

    steps: int
    finished: bool
    signal: int | None
    fallen: bool = False


class Loggers(NamedTuple):
    """The loggers beside metrics.csv: ``names`` from `loggers.logger_names`, and ``extra`` as objects."""

    names: Sequence[str]
    extra: Sequence[Any]


class Schedule(NamedTuple):
    """When the loop acts: a row every ``log_every`` steps, figures every ``monitor_every`` epochs, a checkpoint by
    `checkpoints.Pace`, at most ``checkpoint_minutes`` after the last one; ``stop_fall`` allows an early end.
    """

    log_every: int
    monitor_every: int
    checkpoint_minutes: float
    stop_fall: bool = True


def fit(
    module: Pretrain,
    batches: Batches,
    folder: Path,
    *,
    hardware: Hardware,
    ranks: World = ALONE,
    sync_batchnorm: bool = False,
    log_every: int = 10,
    checkpoint_minutes: float = 10,
    monitor: Callable[[], dict[str, float]] | None = None,
    monitor_every: int = 1,
    resume: bool = False,
    saved: Callable[[], None] = lambda: None,
    console: Console | None = None,
    compile: Compile = "off",
    stop_fall: bool = True,
    loggers: Loggers | None = None,
    callbacks: Sequence[Any] = (),
    strategy: Strategy = "ddp",
    backend: Backend = graph.BACKEND,
) -> Outcome:
    """Train ``module`` on ``batches`` up to its number of steps, leaving logs and checkpoints in ``folder``.

    A signal that asks the process to end (`StopRequest`) ends the training after the step, with a checkpoint.

    Args:
        module: the training step.
        batches: one epoch's batches; repeated in new order as often as needed.
        folder: the run's folder.
        hardware: device and precision.
        ranks: how many processes, each with one device, and which one this is; several train distributed (DDP).
        sync_batchnorm: normalize over the batches of all devices.
        log_every: steps between rows of the log.
        checkpoint_minutes: the most minutes between checkpoints.
        monitor: called every ``monitor_every`` epochs; its figures only go into the log.
        monitor_every: epochs.
        saved: called after each checkpoint.
        resume: continue from ``folder``'s last checkpoint.
        console: where progress is shown.
        stop_fall: end when an encoder that started from weights has a clearly lower figure than these (`FallGuard`).
        loggers: by name, and as objects; unless given, TensorBoard if it is installed.
        callbacks: objects of which ``on_train_start(run, module)``, ``on_log(step, figures, module)`` and
            ``on_train_end(run, module)`` are called where they have them: at the start on every rank, a logged row on
            the first, at the end on every rank.
        strategy: ddp: all weights on each device; fsdp: a part of the encoder's weights on each (`sharding`).
        compile: the encoder and, on CUDA, the whole step (`graph`); auto: if the run is long enough to pay for it.
        backend: the backend of torch.compile.

    Raises:
        NotFinite: the loss is no longer a number.
        UserError: a batch normalization that cannot be synchronized; a checkpoint that is missing, damaged or unfit.
        OSError: a file cannot be written, or a process that decodes images has died.

    """
    run, console = Run(folder), console or printer()
    state = checkpoints.read(run, ranks.rank == 0) if resume else None
    if sync_batchnorm:
        synchronize(module, hardware.device.type == "cuda")
    sharding = Sharding(module, hardware.precision) if strategy == "fsdp" and ranks.size > 1 else None
    fabric = fabric_of(hardware, ranks, callbacks, sharding)
    schedule = Schedule(log_every, monitor_every if monitor else 0, checkpoint_minutes, stop_fall)
    loop = _Loop(fabric, module, batches, run, schedule, saved, loggers, sharding)
    with all_ranks_end(fabric), worker_trouble(), StopRequest(lambda number: _announce_stop(console)) as stop:
        loop.prepare(state, hardware, console)
        loop.compile(compile, backend, hardware, ranks.size, console)
        fabric.call("on_train_start", run=folder, module=module)
        loop.train(monitor, stop, console)
        fabric.call("on_train_end", run=folder, module=module)
    if sharding is None:
        module.cpu()
    else:
        sharding.end()
    return Outcome(module.step, loop.fallen or module.step >= module.steps, loop.signal or None, loop.fallen)


class _Loop:
    """One training: its parts on their device, and its progress."""

    def __init__(
        self,
        fabric: Fabric,
        module: Pretrain,
        batches: Batches,
        run: Run,
        schedule: Schedule,
        saved: Callable[[], None],
        loggers: Loggers | None,
        sharding: Sharding | None,
    ) -> None:
        self.sharding, self.encoder = sharding, module.encoder if sharding is None else sharding.unsharded
        self.fabric, self.module, self.batches, self.run, self.loggers = fabric, module, batches, run, loggers
        self.schedule, self.after_save = schedule, saved
        self.signal, self.fallen, self.best = 0, False, checkpoints.BestEpoch()
        self.step: graph.Step = self._usual_step

    def prepare(self, state: dict[str, Any] | None, hardware: Hardware, console: Console) -> None:
        """Move everything to the device, and restore the checkpoint."""
        self.fabric.launch()
        # FSDP2 only takes weights in the default memory format.
        module = self.module.to(memory_format=torch.channels_last) if self.sharding is None else self.module
        view = module.views.size
        sizes = (view, module.method.piece_size(view) or (module.views.small_side if module.views.small else view))
        probe = partial(glance, module.encoder, *sizes, channels=module.views.channels)
        wrong = avoid_faults(module.encoder, probe, hardware, model=module)
        say_once(console, wrong)
        module.rank = self.fabric.global_rank
        check_memory(module, memory_of(self.fabric.device), 1 if self.sharding is None else self.fabric.world_size)
        self.step_module, self.optimizer, self.step_optimizer = set_up(self.fabric, module, self.sharding)
        hold_images(self.batches, self.fabric.device)
        if self.fabric.is_global_zero:
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            self.run.sweep()
        if state is not None:
            self._restore(state)
        check_step(self.fabric, module.step)
        self.pace = checkpoints.Pace(self.schedule.checkpoint_minutes)
        self.stream = Stream(self.batches, module.step)
        self.clock = Clock(self.stream)

    def compile(self, mode: Compile, backend: Backend, hardware: Hardware, devices: int, console: Console) -> None:
        """Choose how a step is computed; one line says what is compiled."""
        module = self.module
        choice = graph.choose(mode, module.steps - module.step, module, hardware, devices, self.batches)
        say(console, choice.line)
        if choice.graph:
            self.step = graph.Captured(module, self.optimizer, hardware, console, self._usual_step, backend=backend)
        elif choice.encoder:
            self.step = graph.Compiled(self._usual_step, module, console, backend)

    def _usual_step(self, batch: Batch) -> None:
        """One step, without compiling."""
        self.module.begin_step(self.optimizer)
        self.step_optimizer.zero_grad()
        updates = self.module.gradients(batch, self.step_module, self.fabric.backward)
        if self.sharding is not None:
            self.sharding.average()
        self.step_optimizer.step()
        self.module.end_step(*updates)

    def _restore(self, state: dict[str, Any]) -> None:
        restore(self.module, self.optimizer, state, checkpoints.parts_of(self.run, state), self.run.last)
        self.module.step = state["global_step"]
        self.best = checkpoints.BestEpoch(state["callbacks"][checkpoints.COUNT])
        if SCALER in state:
            self.fabric.strategy.precision.load_state_dict(state[SCALER])

    def train(self, monitor: Callable[[], dict[str, float]] | None, stop: StopRequest, console: Console) -> None:
        """Run all remaining steps, with rows, figures, warnings and progress on the first rank."""
        if not self.fabric.is_global_zero:
            for _ in self._steps(stop):
                pass
            return
        module, epoch = self.module, len(self.batches)
        log = Log(self.run, epoch, module.step, self._boards())
        watch = CollapseWatch(log, self.run, module, console)
        display = Display(log, console, module.step, module.steps)
        status = "failed"
        try:
            guard = self._guarded(monitor, log, console)
            for images in self._steps(stop):
                if self._is_logged():
                    figures = {**module.values(), **self.clock.read()}
                    log.record(module.step, figures)
                    self.fabric.call("on_log", step=module.step, figures=figures, module=module)
                    self.clock.restart()
                if monitor is not None and self._is_measured():
                    figures = monitor()
                    log.record(module.step, figures)
                    self.fabric.call("on_log", step=module.step, figures=figures, module=module)
                    self.fallen = guard is not None and guard.look(figures)
                    self.clock.restart()
                watch.look(images)
                display.update(module.step)
            if guard is not None:
                guard.restore()
            status = "success"
        finally:
            display.close()
            log.close(status)

    def _boards(self) -> Boards | None:
        if self.loggers is None:
            return None
        settings = self.run.settings() if self.run.config.is_file() else {}
        return Boards(self.run, self.loggers.names, self.loggers.extra, settings)

    def _guarded(self, monitor: Callable[[], dict[str, float]] | None, log: Log, console: Console) -> FallGuard | None:
        """Return the guard of pretrained weights, after logging their figure as the first row."""
        if monitor is None or not (self.schedule.stop_fall and self.module.encoder.started):
            return None
        guard = FallGuard(self.run, self.module, console, self.encoder)
        if self.module.step == 0:
            figures = monitor()
            log.record(0, figures)
            guard.begin(figures)
            self.clock.restart()
        return guard

    def _steps(self, stop: StopRequest) -> Iterator[int]:
        """Run one step after another; after each, yield its images, then write a checkpoint if one is due."""
        module, epoch = self.module, len(self.batches)
        source = iter(self.stream)
        while module.step < module.steps:
            batch = self.fabric.to_device(next(source))
            self.step(batch)
            self.best.add(module.losses["loss"])
            self.clock.images += len(batch.index) * self.fabric.world_size
            if self._is_logged():
                module.check_finite()
                # The logged loss is the mean over all ranks, as one process with the whole batch would compute it.
                if self.fabric.world_size > 1:
                    losses = torch.stack([value.float() for value in module.losses.values()])
                    module.losses = dict(zip(module.losses, mean(losses), strict=True))
            if self.sharding is not None and (self._is_measured() or module.step == module.steps):
                self.sharding.gather()
            yield len(batch.index)
            ended = module.step % epoch == 0
            due = self.fabric.is_global_zero and self.pace.due(ended)
            due, self.signal, self.fallen = self._agreed(due, stop.number, self.fallen)
            due = due or self.signal > 0 or self.fallen or module.step == module.steps
            best = ended and self.best.end(due)
            if due:
                module.check_finite()
                with self.pace.writing(self.run.last):
                    self._save(best)
            if self.signal or self.fallen:
                if self.sharding is not None:
                    self.sharding.gather()
                break

    def _is_measured(self) -> bool:
        step, every = self.module.step, self.schedule.monitor_every * len(self.batches)
        return every > 0 and (step % every == 0 or step == self.module.steps)

    def _is_logged(self) -> bool:
        step = self.module.step
        return step % self.schedule.log_every == 0 or step % len(self.batches) == 0 or step == self.module.steps

    def _agreed(self, due: bool, signal: int, fallen: bool) -> tuple[bool, int, bool]:
        """Combine the ranks' flags, as all must save and stop after the same step."""
        if self.fabric.world_size == 1:
            return due, signal, fallen
        wishes = torch.tensor([int(due), signal, int(fallen)], device=self.fabric.device)
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
        due_somewhere, number, fallen_there = wishes.tolist()
        return bool(due_somewhere), number, bool(fallen_there)

    def _save(self, best: bool) -> None:
        """Write a checkpoint; every rank must call it, since memories may be sharded."""
        tree, shards = collect(self.module, self.optimizer)
        state = {
            **tree,
            "epoch": self.module.step // len(self.batches),
            "global_step": self.module.step,
            "callbacks": {checkpoints.COUNT: self.best.state()},
        }
        scale = self.fabric.strategy.precision.state_dict()
        if scale:
            state[SCALER] = scale
        if shards:
            state[checkpoints.SHARDS] = checkpoints.write_parts(
                self.run, self.module.step, shards, self.fabric.broadcast, self.fabric.global_rank
            )
        if self.fabric.is_global_zero:
            checkpoints.write(self.run, state, best)
        self.after_save()
        self.clock.restart()


def _announce_stop(console: Console) -> None:
    say(console, "stopping after this step; Ctrl-C once more to stop at once")
