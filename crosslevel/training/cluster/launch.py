"""``--launcher ray``: a Ray cluster starts a training's commands on all machines, and all again when one is lost.

Each machine runs the command as it was given, as under SLURM: Ray finds the machines, numbers them, and passes on the
first one's output. No image and no weight passes through Ray.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from crosslevel.data.cluster import on_gpus, ray_for
from crosslevel.data.sources.containers.remote import stat_of
from crosslevel.data.uri import is_remote
from crosslevel.training.cluster.machine import PREFIX, Machine
from crosslevel.utils.console import say
from crosslevel.utils.device import Device
from crosslevel.utils.errors import Interrupted, MachineError, NotFinite, SourceError, UserError
from crosslevel.utils.processes import ATTEMPT, StopRequest

Launcher = Literal["local", "ray"]
LOST = -signal.SIGKILL  # the message about a lost machine
_GRACE = 20.0  # seconds for the others to notice that one is lost


class Request(NamedTuple):
    """A training to start: its folder ``run``, on ``nodes`` machines with ``devices`` each, of kind ``device``."""

    run: str
    devices: int
    nodes: int
    device: Device


def by_ray(request: Request, max_failures: int, console: Console) -> Path:
    """Train on a Ray cluster, and start again from the last checkpoint when a machine or a process is lost.

    Args:
        request: the training, and the number of machines.
        max_failures: the most restarts.
        console: prints the first machine's output.

    Raises:
        MissingExtra: Ray is not installed.
        MachineError: a machine or process was lost more often than that, or the training ended without progress.
        Interrupted: a signal ended the training, after it was saved.
        NotFinite: the loss is no longer a number.

    """
    if max_failures < 0:
        raise UserError(f"max_failures={max_failures} must be at least 0")
    ray = ray_for("--launcher ray")
    with StopRequest() as stop:
        for attempt in range(max_failures + 1):
            before = _saved(request.run)
            ended = Attempt(ray, request, attempt, console, stop).ended()
            if not any(ended.statuses):
                return Path(request.run)
            if stop.number:
                raise Interrupted(stop.number, request.run)
            if 1 in ended.statuses:
                raise NotFinite(ended.reason)
            going = _saved(request.run) != before or any(status < 0 for status in ended.statuses)
            if not going or attempt == max_failures:
                break
            say(console, f"{ended.reason}: started again ({attempt + 1} of at most {max_failures} times)")
    raise MachineError(ended.reason)


class Ended(NamedTuple):
    """The exit status of each machine's command, and the reason to report."""

    statuses: list[int]
    reason: str


class Attempt:
    """The commands of all machines, for one start."""

    def __init__(self, ray: Any, request: Request, attempt: int, console: Console, stop: StopRequest) -> None:
        self.ray, self.request, self.attempt, self.console, self.stop = ray, request, attempt, console, stop

    def ended(self) -> Ended:
        """Start them, pass on the first one's output, and wait for their end."""
        ray, group = self.ray, self._machines()
        try:
            placed = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
            machine = ray.remote(Machine)
            machines = [
                machine.options(
                    num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_concurrency=3,
                    scheduling_strategy=placed(group, placement_group_bundle_index=i),
                ).remote()
                for i, bundle in enumerate(group.bundle_specs)
            ]  # fmt: skip
            return self._watched(machines)
        finally:
            ray.util.remove_placement_group(group)  # ends the commands there

    def _machines(self) -> Any:
        """Reserve room for the commands, as soon as the cluster has it."""
        ray, request = self.ray, self.request
        kind = "GPU" if on_gpus(ray, request.device) else "CPU"
        group = ray.util.placement_group([{kind: request.devices}] * request.nodes, strategy="SPREAD")
        if not group.wait(10):
            say(
                self.console, f"waiting for {request.nodes} machines with {request.devices} {kind}s each in the cluster"
            )
            while not group.wait(2):
                if self.stop.number:
                    ray.util.remove_placement_group(group)
                    raise Interrupted(self.stop.number, request.run)
        return group

    def _watched(self, machines: list[Any]) -> Ended:
        ray, request = self.ray, self.request
        statuses, errors, deadline, notified = [0] * request.nodes, [""] * request.nodes, float("inf"), False
        pending: dict[Any, int] = {}
        try:
            host, port = ray.get(machines[0].address.remote())
            for node, machine in enumerate(machines):
                environment = {"NODE_RANK": str(node), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
                line = [sys.executable, "-m", "crosslevel", *sys.argv[1:]]
                pending[machine.run.remote(line, environment | {ATTEMPT: str(self.attempt)}, os.getcwd())] = node
        except ray.exceptions.RayError as error:
            return Ended([LOST] * request.nodes, f"a machine is lost: {_line(error)}")
        while pending and time.monotonic() < deadline:
            done, _ = ray.wait(list(pending), timeout=0.5)
            self._pass_on(machines[0])
            if self.stop.number and not notified:
                notified = True
                for machine in machines:
                    machine.stop.remote(self.stop.number)
            for ref in done:
                node = pending.pop(ref)
                try:
                    statuses[node], errors[node] = ray.get(ref)
                except ray.exceptions.RayError as error:
                    statuses[node], errors[node] = LOST, f"machine {node} is lost: {_line(error)}"
                if statuses[node] and not self.stop.number:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        self._pass_on(machines[0])
        for node in pending.values():
            statuses[node] = statuses[node] or LOST
        for machine in machines:
            machine.stop.remote(signal.SIGKILL)
        # The error of a lost machine is more useful than the others' errors that follow from it.
        failed = sorted((status >= 0, node) for node, status in enumerate(statuses) if status)
        reason = next((errors[node] for _, node in failed if errors[node]), "")
        return Ended(statuses, reason)

    def _pass_on(self, machine: Any) -> None:
        """Print the first machine's new output."""
        output: list[tuple[bool, str]] = []
        with suppress(self.ray.exceptions.RayError):
            output = self.ray.get(machine.output.remote(), timeout=5)
        for of_errors, text in output:
            if not of_errors:
                say(self.console, text)
            elif not text.startswith(PREFIX) or ": warning: " in text:
                print(text, file=sys.stderr)


def _saved(run: str) -> str:
    """A state that changes when there is a new checkpoint."""
    last = f"{run.rstrip('/')}/checkpoints/last.ckpt"
    try:
        return stat_of(last).state if is_remote(run) else str(os.stat(last).st_mtime_ns)
    except (OSError, SourceError):
        return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[-200:]
