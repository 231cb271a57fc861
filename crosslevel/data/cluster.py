"""Work on the machines of a Ray cluster: one worker for each GPU, or else for each core; any of them may be lost.

Workers open sources themselves, by texts that mean the same on every machine. The keys of a lost worker go to another
one. Results come in order, and only a few are computed ahead, so that memory does not grow with their number.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets.select import take
from crosslevel.data.uri import Source
from crosslevel.utils.device import Device
from crosslevel.utils.errors import CrosslevelError, MachineError, MissingExtra, UserError

Engine = Literal["local", "ray"]
Job = Callable[[Any], Any]
Result = TypeVar("Result")
_IN_FLIGHT, AHEAD = 2, 8  # keys that a worker has at a time, and results that may be ahead for each worker
_TRIES = 4  # attempts at one key, if its workers are lost one after another
SPARE = 4  # workers requested beyond the cluster's free room: they make an autoscaling cluster grow
_ROUND = 2.0  # seconds between two checks of the free room
_PATIENCE, _START = 10.0, 60.0  # seconds without any worker before a message says so: without free room, and with some


class Opened(NamedTuple):
    """A source that other machines open too: how they open it, what it must be, and which of its images are used."""

    images: str
    data_root: str | None
    crops: Crops | None
    identity: str
    subset: Int64[Tensor, " N"] | None = None

    @classmethod
    def of(cls, images: Source, data_root: str | None, crops: Crops | None, source: Images) -> Opened:
        """Describe a source that is open in this process."""
        root = data_root and os.path.abspath(data_root)
        return cls(images.absolute().text, root, crops, source.identity())

    def mapped(self, job_of: Callable[[Images], Dataset[Result]], keys: Sequence[Any]) -> Iterator[Result]:
        """Run a job of these images on each key, on all machines, in the keys' order; errors of `by_workers`."""
        return by_workers(partial(_job, self, job_of), keys, "--engine ray")

    def open(self) -> Images:
        """Open it on another machine.

        Raises:
            UserError: the source is a different one there.

        """
        source = open_images(self.images, data_root=self.data_root, crops=self.crops)
        if source.identity() != self.identity:
            raise UserError(f"{self.images} is not the same on all machines: give a disk or store that they share")
        return source if self.subset is None else take(source, self.subset)


def _job(opened: Opened, job_of: Callable[[Images], Dataset[Any]]) -> Job:
    return job_of(opened.open()).__getitem__


def ray_for(purpose: str) -> Any:
    """Ray, connected to a cluster: that of RAY_ADDRESS, or else this machine.

    Raises:
        MissingExtra: it is not installed; ``purpose`` needs it.

    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415
        import ray.util  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra(f"{purpose} needs Ray: pip install 'crosslevel[ray]'") from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    return ray


def ready(engine: Engine, workers: int | None) -> None:
    """Refuse settings that do not work on the cores of a cluster, before anything starts.

    Raises:
        MissingExtra: Ray is not installed.
        UserError: processes that decode beside the cluster's.

    """
    if engine == "ray":
        ray_for("--engine ray")
        alone(workers)


def alone(workers: int | None) -> None:
    """Refuse processes that decode where each core has a worker of its own."""
    if workers:
        raise UserError(f"--workers {workers}: with --engine ray each core has a worker of its own: leave it out")


def on_gpus(ray: Any, device: Device) -> bool:
    """Whether the cluster's GPUs do the work: if requested, those that it has or will have.

    Raises:
        UserError: the device is to be chosen automatically, and the cluster has no machine yet.

    """
    if device != "auto":
        return device == "cuda"
    resources = ray.cluster_resources()
    if not resources.get("GPU") and not resources.get("CPU"):
        raise UserError("--device auto: the cluster has no machine yet to choose by: give --device cuda or cpu")
    return bool(resources.get("GPU"))


def cores_each() -> int:
    """CPU cores per GPU of a worker's machine, at least 1."""
    import ray  # noqa: PLC0415

    here, nodes = ray.get_runtime_context().get_node_id(), ray.nodes()  # type: ignore[no-untyped-call]
    has = next(node["Resources"] for node in nodes if node["NodeID"] == here)
    return max(1, int(has.get("CPU", 1) // max(1, has.get("GPU", 1))))


def by_workers(make: Callable[[], Job], keys: Sequence[Any], purpose: str, on_gpu: bool = False) -> Iterator[Any]:
    """Run a job on each key, on all machines, and yield the results in order; each worker builds its own job.

    Args:
        make: makes the job; it is sent to the workers, as are the keys.
        keys: what the job is called with.
        purpose: the option that asks for it.
        on_gpu: whether each worker has a GPU of its own; a core otherwise.

    Raises:
        MachineError: a key ended all workers that it was given to, or the cluster cannot go on.
        CrosslevelError: the error of a job.

    """
    if keys:
        yield from _Workers(ray_for(purpose), make, keys, on_gpu).results()


class _Workers:
    def __init__(self, ray: Any, make: Callable[[], Job], keys: Sequence[Any], on_gpu: bool) -> None:
        self.ray, self.keys, self.resource = ray, keys, "GPU" if on_gpu else "CPU"
        self.make = ray.put(make)
        kind = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": 1}
        self.worker = ray.remote(_Worker).options(**kind)
        self.all: list[Any] = []
        self.ready: list[Any] = []
        self.pending: dict[Any, tuple[int | None, Any]] = {}  # the key's number; None while a worker begins
        self.waiting, self.tries = deque(range(len(keys))), Counter[int | None]()
        self.room, self.next_look, self.idle_since = 0, 0.0, time.monotonic()

    def results(self) -> Iterator[Any]:
        """All, in order."""
        done: dict[int, Any] = {}
        next_index = 0
        try:
            while next_index < len(self.keys):
                self._hire()
                self._ask(next_index + AHEAD * max(1, len(self.ready)))
                finished, _ = self.ray.wait(list(self.pending), timeout=_ROUND)
                for ref in finished:
                    self._take(ref, done)
                while next_index in done:
                    yield done.pop(next_index)
                    next_index += 1
        finally:
            # First the workers that wait for room: none of them should start in the room that is freed here.
            for worker in sorted(self.all, key=self.ready.__contains__):
                self.ray.kill(worker)

    def _hire(self) -> None:
        """Start as many workers as there is room for, and a few to spare, but no more than there are keys waiting."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + _ROUND
        self.room = int(self.ray.cluster_resources().get(self.resource, 0))
        for _ in range(min(len(self.waiting), self.room + SPARE) - len(self.all)):
            worker = self.worker.remote(self.make)
            self.all.append(worker)
            self.pending[worker.begin.remote()] = (None, worker)
        if not self.ready and now - self.idle_since >= (_START if self.room else _PATIENCE):
            self.idle_since = float("inf")
            unit = {"GPU": "GPU", "CPU": "core"}[self.resource]
            warnings.warn(
                f"no worker has begun yet: waiting for a {unit} in the cluster, which has {self.room}", stacklevel=2
            )

    def _ask(self, before: int) -> None:
        """Give each worker that has begun enough to do, of the keys before one."""
        busy = Counter(worker for _, worker in self.pending.values())
        for _ in range(_IN_FLIGHT):
            for worker in self.ready:
                if self.waiting and self.waiting[0] < before and busy[worker] < _IN_FLIGHT:
                    number = self.waiting.popleft()
                    self.pending[worker.work.remote(self.keys[number])] = (number, worker)
                    busy[worker] += 1

    def _take(self, ref: Any, done: dict[int, Any]) -> None:
        """Store the result of one request."""
        number, worker = self.pending.pop(ref)
        errors = self.ray.exceptions
        try:
            result = self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, CrosslevelError):
                raise error.cause from error
            raise MachineError(f"a worker of the cluster failed: {' '.join(str(error).split())[-300:]}") from error
        except errors.RayError as error:
            self._lose(number, worker, error)
            return
        if number is None:
            self.ready.append(worker)
            self.tries[None] = 0
        else:
            done[number] = result

    def _lose(self, number: int | None, worker: Any, error: Exception) -> None:
        """Queue the keys of a worker again, after it or its results were lost."""
        for workers in (self.all, self.ready):
            if worker in workers:
                workers.remove(worker)
        if not self.ready:
            self.idle_since = time.monotonic()
        if number is not None:
            self.waiting = deque(sorted([*self.waiting, number]))
        self.next_look = 0.0
        self.tries[number] += 1
        if self.tries[number] < (_TRIES if number is not None else _TRIES * max(1, self.room)):
            return
        reason, occasion = (
            " ".join(str(error).split())[-200:],
            "before they had begun" if number is None else "with one task",
        )
        raise MachineError(f"the cluster could not go on: {self.tries[number]} workers were lost {occasion}: {reason}")


class _Worker:
    """An actor of Ray's."""

    def __init__(self, make: Callable[[], Job]) -> None:
        self.make = make
        self.job: Job | None = None

    def begin(self) -> None:
        """Make the job."""
        torch.set_num_threads(1)  # as many workers as there are cores
        warnings.simplefilter("ignore")
        self.job = self.make()

    def work(self, key: Any) -> Any:
        """Do it."""
        assert self.job is not None
        return self.job(key)
