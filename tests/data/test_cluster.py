"""What a cluster is asked for, by a Ray that is none; `test_ray` has what a real one makes of it."""

import pickle
import shutil
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow.parquet as pq
import pytest
import torch
from embed_samples import draw, embedded, random_encoder, rows, same
from fake_ray import Actor, FakeRay, Machine, RayError, in_place

from crosslevel import Encoder
from crosslevel.data import cluster
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.cluster import Opened, by_workers, cores_each, on_gpus
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.data.sources.containers import copies
from crosslevel.data.sources.labels import state_of
from crosslevel.data.uri import parse
from crosslevel.features.embed import embed
from crosslevel.inspection.inspect import inspect
from crosslevel.inspection.sketch import sketch
from crosslevel.settings.parser import run as called
from crosslevel.training.cluster.launch import Attempt, Request
from crosslevel.utils.errors import MachineError, UserError
from crosslevel.utils.locks import LOCK
from crosslevel.utils.processes import StopRequest


def doubled(key):
    return 2 * key


def make():
    return doubled


def of(ray, count=40, on_gpu=False, job=make):
    assert ray.is_initialized()
    return list(by_workers(job, list(range(count)), "--engine ray", on_gpu))


def test_a_cluster_that_grows_is_used_and_results_keep_their_order(monkeypatch):
    """It has no machine at first, and gets one whenever somebody waits for it, as an autoscaler does."""
    waiting, asked, told = [], [], 0

    def grow(ray):
        pending = [actor for actor in ray.actors if actor.machine is None and not actor.killed]
        alive = sum(not actor.killed for actor in ray.actors)
        waiting.append(alive - ray.cluster_resources().get("CPU", 0))
        asked.append(max((ahead(call) for actor in ray.actors for call in actor.waiting), default=0))
        if pending and len(ray.machines) < 3:
            ray.machines.append(Machine(CPU=2))

    def ahead(call):
        key = pickle.loads(call[2])
        return key[0] - told if key else 0

    with in_place(monkeypatch, FakeRay(on_wait=grow)) as ray:
        for result in by_workers(make, list(range(60)), "--engine ray"):
            assert result == 2 * told
            told += 1
    assert told == 60
    assert len(ray.machines) == 3
    begun = Counter(actor.machine for actor in ray.actors if actor.made is not None)
    assert begun == dict.fromkeys(ray.machines, 2)
    assert max(waiting) == cluster.SPARE
    assert 0 < max(asked) <= cluster.AHEAD * 6
    # Who waits for a place goes first, so that none begins in one that is given up.
    begun = [actor.made is not None for actor in ray.killed]
    assert begun == sorted(begun)
    assert set(ray.killed) == set(ray.actors)


@pytest.mark.parametrize("full_scan", [False, True])
def test_an_inspection_of_a_sample_is_that_of_one_machine(tmp_path, monkeypatch, full_scan):
    draw(tmp_path / "photos", range(30))
    usual = {"sample": 20, "full_scan": full_scan, "workers": 0, "device": "cpu", "quiet": True}
    with in_place(monkeypatch, FakeRay(Machine(CPU=2))):
        figures = inspect(str(tmp_path / "photos"), engine="ray", **usual)
    assert (figures["looked_at"], figures["compared"]) == (30 if full_scan else 20, 20)
    assert figures == inspect(str(tmp_path / "photos"), **usual)


def test_sketches_of_several_machines_merge(tmp_path, monkeypatch):
    draw(tmp_path / "photos", range(30))
    source, sampled = open_images(str(tmp_path / "photos")), torch.arange(0, 30, 2)
    elsewhere = Opened.of(parse(tmp_path / "photos"), source=source, data_root=None, crops=None)
    with in_place(monkeypatch, FakeRay(Machine(CPU=1), Machine(CPU=1))):
        merged, records = sketch(source, sampled, BadFiles(), elsewhere=elsewhere, at_once=4)
    whole, alone = sketch(source, sampled, BadFiles(), 0)
    assert (merged.readable, merged.formats, merged.width) == (whole.readable, whole.formats, whole.width)
    assert all(torch.equal(a, b) for a, b in zip(records, alone, strict=True))


def test_no_more_workers_are_asked_for_than_have_something_to_do(monkeypatch):
    with in_place(monkeypatch, FakeRay(Machine(CPU=64))) as ray:
        assert of(ray, 3) == [0, 2, 4]
    assert len(ray.actors) == 3


def test_what_a_lost_machine_was_asked_is_asked_of_another(monkeypatch):
    first, second = Machine(CPU=2), Machine(CPU=2)

    def lose(ray):
        if ray.waits == 10:
            ray.lose(second)

    with in_place(monkeypatch, FakeRay(first, second, on_wait=lose)) as ray:
        assert of(ray) == [2 * key for key in range(40)]
    assert any(actor.machine is second and actor.made is not None for actor in ray.actors)


def ends(key):
    if key == 5:
        raise RayError("the worker died")
    return key


def make_ends():
    return ends


def ends_at_once():
    raise RayError("the worker died")


@pytest.mark.parametrize(
    ("job", "said"),
    [(make_ends, "4 workers were lost with one task"), (ends_at_once, "8 workers were lost before they had begun")],
)
def test_what_ends_every_worker_ends_the_command(monkeypatch, job, said):
    said = f"^the cluster could not go on: {said}: the worker died$"
    with in_place(monkeypatch, FakeRay(Machine(CPU=2))) as ray, pytest.raises(MachineError, match=said):
        of(ray, job=job)


def refuses(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (UserError("give another source"), UserError, "^give another source$"),
        (ValueError("3 is no\nshape"), MachineError, "^a worker of the cluster failed: 3 is no shape$"),
    ],
)
def test_what_a_worker_has_to_say_is_said(monkeypatch, error, kind, said):
    with in_place(monkeypatch, FakeRay(Machine(CPU=2))) as ray, pytest.raises(kind, match=said):
        of(ray, job=partial(refuses, error))


@pytest.mark.parametrize(("on_gpu", "what"), [(True, "GPU"), (False, "core")])
@pytest.mark.parametrize(("there", "after"), [(0, 10), (1, 60)])
def test_what_cannot_be_placed_says_so_once_and_begins_when_it_can(monkeypatch, on_gpu, what, there, after):
    """On a cluster that has nothing, or whose only machine somebody else uses; there workers may just be starting."""
    said = []

    def come(ray):
        if ray.now > 100:
            ray.machines[:] = [Machine(CPU=1, GPU=1)]

    def shown(text, *_):
        said.append((str(text), ray.now))

    with in_place(monkeypatch, FakeRay(*[Machine(CPU=1, GPU=1)] * there, on_wait=come)) as ray:
        for machine in ray.machines:
            ray.actors.append(Actor(None, machine.resources, None))
            ray.actors[-1].machine = machine
        monkeypatch.setattr(warnings, "showwarning", shown)
        assert of(ray, 5, on_gpu) == [0, 2, 4, 6, 8]
    [(text, when)] = said
    assert text == f"no worker has begun yet: waiting for a {what} in the cluster, which has {there}"
    assert after <= when < after + 5


def test_where_a_cluster_works_and_with_how_many_cores(monkeypatch):
    large = Machine(CPU=16, GPU=4)
    with in_place(monkeypatch, FakeRay(Machine(CPU=3), large)) as ray:
        assert on_gpus(ray, "auto")
        assert not on_gpus(ray, "cpu")
        for machine, cores in ((ray.machines[0], 3), (large, 4)):
            ray.here = machine
            assert cores_each() == cores
    with in_place(monkeypatch, FakeRay(Machine(CPU=0))) as ray:
        assert on_gpus(ray, "cuda")  # they will come
        told = r"^--device auto: the cluster has no machine yet to choose by: give --device cuda or cpu$"
        with pytest.raises(UserError, match=told):
            on_gpus(ray, "auto")
        with pytest.raises(UserError, match=told), StopRequest() as stop:  # of a training on machines
            Attempt(ray, Request("run", 1, 2, "auto"), 0, None, stop).ended()


def test_processes_that_decode_beside_those_of_the_cluster_are_refused(tmp_path, monkeypatch):
    draw(tmp_path / "photos", range(4))
    photos, told = str(tmp_path / "photos"), r"^--workers 3: with --engine ray each core has a worker of its own"
    random_encoder(tmp_path / "run")
    with in_place(monkeypatch, FakeRay(Machine(CPU=1))):
        with pytest.raises(UserError, match=told):
            pack(photos, str(tmp_path / "packed"), workers=3, engine="ray", quiet=True)
        with pytest.raises(UserError, match=told):
            inspect(photos, workers=3, engine="ray", quiet=True)
        with pytest.raises(UserError, match=told):
            embed(str(tmp_path / "run"), photos, str(tmp_path / "features"), workers=3, engine="ray", quiet=True)
    assert {file.name for file in tmp_path.iterdir()} == {"photos", "run"}


def table(trained, photos, output):
    called(embed, [str(trained), str(photos), "-o", str(output), "--engine=ray"], rows=21)
    return rows(output)


def test_on_gpus_each_worker_decodes_with_its_share_of_the_cores(tmp_path, monkeypatch, capsys):
    """Of a cluster whose GPUs this machine does not see, and which does not find the folder of the run."""
    photos, trained, pools = tmp_path / "photos", tmp_path / "run", []
    draw(photos, range(20))
    (photos / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    embedded(random_encoder(trained), photos, tmp_path / "alone.parquet")

    def begin(ray):
        shutil.rmtree(trained, ignore_errors=True)

    class Noted(Pool):
        def __init__(self, job, keys, workers, persistent):
            pools.append((type(job).__name__, workers))
            super().__init__(job, keys, workers, persistent)

    for name in ("batches", "records"):
        monkeypatch.setattr(f"crosslevel.data.loaders.{name}.Pool", Noted)
    with in_place(monkeypatch, FakeRay(Machine(CPU=4, GPU=2), on_wait=begin)) as ray:
        for output in ("features.parquet", "features"):
            random_encoder(trained)
            same(table(trained, photos, tmp_path / output), rows(tmp_path / "alone.parquet"))
        random_encoder(trained)
        draw(photos, [3], seed=1)  # another picture, beside its former self
        called(embed, [str(trained), str(photos), "-o", str(tmp_path / "features"), "--engine=ray"], rows=21)
    assert len(pq.read_table(tmp_path / "features")) == 21
    assert {(actor.asked["CPU"], actor.asked["GPU"]) for actor in ray.actors} == {(0, 1)}
    assert set(pools) == {("_EvalJob", 2), ("_Job", 2)}
    said = capsys.readouterr().out
    assert "cuda: GPUs of the cluster, fp32 (as set)" in said
    assert "1 feature added to" in said
    assert "19 were there" in said


def test_workers_that_find_other_images_or_make_another_encoder_are_refused(tmp_path, monkeypatch):
    photos, trained = tmp_path / "photos", random_encoder(tmp_path / "run")
    draw(photos, range(4))
    line = (str(trained), str(photos), str(tmp_path / "features.parquet"))

    def other_images(ray):
        draw(photos, [1], seed=len(ray.actors))

    def other_encoder(ray):
        monkeypatch.setattr(Encoder, "identity", lambda encoder: "another")

    of_images = "photos is not the same on all machines: give a disk or store that they share$"
    for other, told in ((other_images, of_images), (other_encoder, "^resnet18 is not the same on all machines: ")):
        with in_place(monkeypatch, FakeRay(Machine(CPU=1), on_wait=other)), pytest.raises(UserError, match=told):
            embed(*line, device="cpu", engine="ray", quiet=True)
    assert not (tmp_path / "features.parquet").exists()


def test_what_several_workers_need_of_a_store_is_copied_once(tmp_path, monkeypatch):
    """Four of one machine ask at once, for two files of different folders; the others wait for the one that copies."""
    asked, together = [], threading.Barrier(4)

    def download(address, target, size, closing):
        asked.append(address)
        assert not target.exists()
        time.sleep(0.2)  # long enough for the others, if they did not wait
        target.write_bytes(b"x" * size)

    def wanted(worker):
        together.wait()
        return copies.copied_paths(files, "the source", download)

    files = [copies.RemoteFile(f"s3://{name}/a.tar", tmp_path / name / "a.tar", 3, "1") for name in ("one", "other")]
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as workers:
        found = list(workers.map(wanted, range(4)))
    assert sorted(asked) == [file.address for file in files]
    assert found == [[str(file.copy) for file in files]] * 4
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"a.tar", ".a.tar.origin.json", LOCK}
    # Copies are alike, whichever machine made them; those of another version are not.
    other = files[1]._replace(copy=tmp_path / "third" / "a.tar", state="2")
    copies.copied_paths([other], "the source", download)
    one, same, changed = (state_of(str(file.copy)) for file in (*files, other))
    assert one == same != changed
