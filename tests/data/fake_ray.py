"""Ray as `crosslevel.data.cluster` uses it, in this process: machines that come and go, and a clock of its own."""

import pickle
import sys
import types
import warnings
from contextlib import contextmanager

import torch

from crosslevel.data import cluster


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Method:
    def __init__(self, actor, name):
        self.actor, self.name = actor, name

    def remote(self, *given):
        ref = Ref()
        self.actor.waiting.append((ref, self.name, pickle.dumps(given)))
        return ref


class Ref:
    """What will be of a call: ``outcome`` is its result, or an error, once it is done."""

    def __init__(self):
        self.done, self.outcome = False, None

    def end(self, outcome):
        self.done, self.outcome = True, outcome


class Actor:
    """Work for one machine; ``made`` is the object there, from when it has a place."""

    def __init__(self, kind, asked, given):
        self.kind, self.asked, self.given = kind, asked, given
        self.waiting, self.machine, self.made, self.killed = [], None, None, False
        self.begin, self.work = Method(self, "begin"), Method(self, "work")


class Machine:
    def __init__(self, **resources):
        self.resources, self.lost = resources, False

    def free(self, actors):
        taken = [actor.asked for actor in actors if actor.machine is self and not actor.killed]
        return {name: has - sum(t.get(name, 0) for t in taken) for name, has in self.resources.items()}


class FakeRay(types.ModuleType):
    """``machines`` are those that are there; ``on_wait`` is called whenever results are waited for.

    Attributes:
        now: seconds; each wait for nothing takes its time.
        actors: all that were ever asked for, in order.
        killed: those that were killed, in order.

    """

    __version__ = "fake"

    def __init__(self, *machines, on_wait=lambda ray: None):
        super().__init__("ray")
        self.machines, self.on_wait, self.now = list(machines), on_wait, 0.0
        self.actors, self.killed, self.here, self.waits = [], [], None, 0
        self.exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.util = types.ModuleType("ray.util")

    def is_initialized(self):
        return True

    def put(self, value):
        return pickle.dumps(value)

    def remote(self, kind):
        def options(num_cpus=0, num_gpus=0):
            def begun(given):
                self.actors.append(Actor(kind, {"CPU": num_cpus, "GPU": num_gpus}, given))
                return self.actors[-1]

            return types.SimpleNamespace(remote=begun)

        return types.SimpleNamespace(options=options)

    def cluster_resources(self):
        total = {}
        for machine in self.machines:
            for name, has in machine.resources.items():
                if has:
                    total[name] = total.get(name, 0) + has
        return total

    def nodes(self):
        return [{"NodeID": id(machine), "Resources": machine.resources} for machine in self.machines]

    def get_runtime_context(self):
        return types.SimpleNamespace(get_node_id=lambda: id(self.here))

    def lose(self, machine):
        """All that runs there is gone."""
        self.machines.remove(machine)
        for actor in self.actors:
            if actor.machine is machine:
                self._end(actor, RayError("the machine is lost"))

    def _end(self, actor, why):
        actor.killed = True
        for ref, *_ in actor.waiting:
            ref.end(why)
        actor.waiting = []

    def kill(self, actor):
        self._end(actor, RayError("it was killed"))
        self.killed.append(actor)

    def wait(self, refs, timeout):
        assert refs, "waits for nothing"
        self.waits += 1
        assert self.waits < 1000, "waits for ever"
        self.on_wait(self)
        if not any(ref.done for ref in refs):
            self._place()
            self._work()
        done = [ref for ref in refs if ref.done]
        self.now += 0.5 if done else timeout
        return done[:1], [ref for ref in refs if ref not in done[:1]]

    def _place(self):
        for actor in self.actors:
            for machine in self.machines:
                free = machine.free(self.actors)
                fits = all(free.get(name, 0) >= asked for name, asked in actor.asked.items() if asked)
                if fits and actor.machine is None and not actor.killed:
                    actor.machine = machine

    def _work(self):
        """The first call of each actor that has a place."""
        for actor in self.actors:
            if actor.machine is None or not actor.waiting:
                continue
            ref, name, given = actor.waiting.pop(0)
            self.here = actor.machine
            try:
                with warnings.catch_warnings():  # an actor's filters are those of a process of its own
                    if actor.made is None:
                        actor.made = actor.kind(pickle.loads(actor.given))
                    ref.end(pickle.loads(pickle.dumps(getattr(actor.made, name)(*pickle.loads(given)))))
            except RayError as error:
                actor.waiting.insert(0, (ref, name, given))
                self._end(actor, error)
            except Exception as error:
                ref.end(RayTaskError(error))

    def get(self, ref):
        assert ref.done
        if isinstance(ref.outcome, RayError):
            raise ref.outcome
        return ref.outcome


@contextmanager
def in_place(monkeypatch, ray):
    """While the block runs, ``ray`` is what is imported under this name, and its clock the cluster's."""
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setitem(sys.modules, "ray.util", ray.util)
        patch.setattr(cluster, "time", types.SimpleNamespace(monotonic=lambda: ray.now))
        yield ray
    torch.set_num_threads(threads)
