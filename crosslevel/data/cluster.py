"""Work for the machines of a Ray cluster: a worker on each GPU, or else each core, of which any may be lost.

Workers open sources themselves, by texts that mean the same on every machine. What is asked of a lost one is asked of
another. Results come in order, and no more are asked for than a few ahead: memory does not grow with their number.
"""

from __future__ import annotations

import logging
import os
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
from crosslevel.data.uri import parse
from crosslevel.utils.errors import CrosslevelError, MachineError, MissingExtra, UserError

Engine = Literal["local", "ray"]
Job = Callable[[Any], Any]
Result = TypeVar("Result")
_IN_FLIGHT, _AHEAD = 2, 8  # what a worker is asked at a time, and how far results may be ahead, for each worker
_TRIES = 4  # of one key, of which each but the last ended with its worker


class Opened(NamedTuple):
    """A source that other machines open as well: what they need for it, what it is, and which of its images count."""

    images: str
    data_root: str | None
    crops: Crops | None
    identity: str
    chosen: Int64[Tensor, " N"] | None = None

    @classmethod
    def of(cls, images: str, data_root: str | None, crops: Crops | None, source: Images) -> Opened:
        """That of a source which is open here."""
        root = data_root and os.path.abspath(data_root)
        return cls(parse(images).absolute().text, root, crops, source.identity())

    def mapped(self, job_of: Callable[[Images], Dataset[Result]], keys: Sequence[Any]) -> Iterator[Result]:
        """What a job of the images makes of each key, on all machines, in the keys' order; errors of `by_workers`."""
        return by_workers(partial(_job, self, job_of), keys, "--engine ray")

    def open(self) -> Images:
        """Open it on another machine.

        Raises:
            UserError: there it is another one.

        """
        source = open_images(self.images, data_root=self.data_root, crops=self.crops)
        if source.identity() != self.identity:
            raise UserError(f"{self.images} is not the same on all machines: give a disk or store that they share")
        return source if self.chosen is None else take(source, self.chosen)


def _job(opened: Opened, job_of: Callable[[Images], Dataset[Any]]) -> Job:
    return job_of(opened.open()).__getitem__


def ray_for(what: str) -> Any:
    """Ray, connected to a cluster: that of RAY_ADDRESS, or else this machine.

    Raises:
        MissingExtra: it is not installed; ``what`` needs it.

    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415
        import ray.util  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra(f"{what} needs Ray: pip install 'crosslevel[ray]'") from error
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    return ray


def by_workers(make: Callable[[], Job], keys: Sequence[Any], what: str, on_gpu: bool = False) -> Iterator[Any]:
    """What a job makes of each key, in their order; each worker makes the job for itself.

    Args:
        make: makes the job; it is sent to the workers, as are the keys.
        keys: what the job is called with.
        what: the option that asks for it.
        on_gpu: whether each worker has a GPU of its own; a core otherwise.

    Raises:
        MachineError: a key ended all workers that it was given to, or the cluster cannot go on.
        CrosslevelError: what a job had to say.

    """
    if keys:
        yield from _Workers(ray_for(what), make, keys, on_gpu).results()


class _Workers:
    def __init__(self, ray: Any, make: Callable[[], Job], keys: Sequence[Any], on_gpu: bool) -> None:
        self.ray, self.keys, self.on_gpu = ray, keys, on_gpu
        self.make = ray.put(make)
        kind = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": 1}
        self.worker = ray.remote(_Worker).options(**kind)
        self.all: list[Any] = []
        self.ready: list[Any] = []
        self.pending: dict[Any, tuple[int | None, Any]] = {}  # the key's number; None while a worker begins
        self.left, self.tries = deque(range(len(keys))), Counter[int]()

    def results(self) -> Iterator[Any]:
        """All, in order."""
        done: dict[int, Any] = {}
        told = 0
        try:
            self._hire()
            while told < len(self.keys):
                self._ask(told + _AHEAD * len(self.all))
                finished, _ = self.ray.wait(list(self.pending), timeout=5)
                for ref in finished:
                    self._take(ref, done)
                while told in done:
                    yield done.pop(told)
                    told += 1
        finally:
            for worker in self.all:
                self.ray.kill(worker)

    def _hire(self) -> None:
        """As many workers as there is room for, and as have something to do."""
        room = int(self.ray.cluster_resources().get("GPU" if self.on_gpu else "CPU", 1))
        for _ in range(max(1, min(len(self.left), room)) - len(self.all)):
            worker = self.worker.remote(self.make)
            self.all.append(worker)
            self.pending[worker.begin.remote()] = (None, worker)

    def _ask(self, before: int) -> None:
        """Give each worker that has begun enough to do, of the keys before one."""
        busy = Counter(worker for _, worker in self.pending.values())
        for _ in range(_IN_FLIGHT):
            for worker in self.ready:
                if self.left and self.left[0] < before and busy[worker] < _IN_FLIGHT:
                    number = self.left.popleft()
                    self.pending[worker.work.remote(self.keys[number])] = (number, worker)
                    busy[worker] += 1

    def _take(self, ref: Any, done: dict[int, Any]) -> None:
        """What has come of one request."""
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
        else:
            done[number] = result

    def _lose(self, number: int | None, worker: Any, error: Exception) -> None:
        """A worker is gone, or what it made: what it was asked is asked again."""
        for mine in (self.all, self.ready):
            if worker in mine:
                mine.remove(worker)
        if number is not None:
            self.tries[number] += 1
            self.left = deque(sorted([*self.left, number]))
            if self.tries[number] >= _TRIES:
                why = " ".join(str(error).split())[-200:]
                raise MachineError(f"the cluster could not go on: {_TRIES} workers were lost with one task: {why}")
        self._hire()


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
