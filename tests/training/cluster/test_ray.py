"""On a Ray cluster of two nodes on this machine, which all tests here share: a training and a table that lose one."""

import importlib.util
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from container_samples import write_tar
from embed_samples import draw, embedded, random_encoder, rows, same
from fork_server import stand_in
from run_samples import metrics, write_images

from crosslevel import load_encoder
from crosslevel.data.pack import pack
from crosslevel.data.pack_writer import Sizes
from crosslevel.inspection.inspect import inspect
from crosslevel.settings.parser import run as called
from crosslevel.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    """An S3 server with an empty bucket, that processes know which are started from now on."""
    server = pytest.importorskip("moto.server", reason="the S3 server is of pip install 'crosslevel[test]'")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto.get_host_and_port()[1]}")
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.mkdir("bucket")
        yield store
    moto.stop()


@pytest.fixture(scope="module")
def nodes(bucket, tmp_path_factory):
    """Two nodes of one core each, with as few of Ray's processes as there can be, and a cache of their own.

    What they start, workers and trainings, are forks from before Ray was imported: it reads variables at its import.
    """
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is of pip install 'crosslevel[ray]'")
    forks = stand_in(tmp_path_factory.mktemp("python")) if "ray" not in sys.modules else nullcontext()
    with pytest.MonkeyPatch.context() as patch, forks as python:
        ray = importlib.import_module("ray")
        node = importlib.import_module("ray._private.node").Node
        if python:
            patch.setattr(sys, "executable", python)
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_health_check_period_ms", "1000")
        patch.setattr(node, "start_api_server", lambda *given, **named: None)  # of the dashboard
        made = Nodes(importlib.import_module("ray.cluster_utils").Cluster(), str(tmp_path_factory.mktemp("cache")))
        ray.init(address=made.cluster.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.cluster.shutdown()


class Nodes:
    """A cluster of two nodes, of which the second may be lost and come again."""

    def __init__(self, cluster, cache):
        self.cluster, self.cache, self.second = cluster, cache, None
        self.add()
        self.second = self.add()

    def add(self):
        size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        less = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True, "setup_worker_path": "-u"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CROSSLEVEL_CACHE", self.cache)
            return self.cluster.add_node(**size, **less)

    def lose(self):
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def complete(self):
        if self.second is None:
            self.second = self.add()


@contextmanager
def meanwhile(ready, work):
    """While the block runs, ``work`` is called with the first true value of ``ready``: whether it was is what is given.

    It is waited for no longer than the block runs, and five minutes.
    """
    ended, called_with, errors = threading.Event(), [], []

    def wait():
        deadline = time.monotonic() + 300
        try:
            while not (found := ready()):
                if ended.wait(0.05) or time.monotonic() > deadline:
                    return
            called_with.append(found)
            work(found)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield called_with
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()
    assert not errors


def trainings(folder):
    """The processes that train in ``folder``, by which of the two machines they are."""
    found = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            told = dict(part.split("=", 1) for part in environment.read_text().split("\0") if "=" in part)
            if "CROSSLEVEL_ATTEMPT" in told and f"{folder}/run" in (environment.parent / "cmdline").read_text():
                found[told["NODE_RANK"]] = int(environment.parent.name)
        except (OSError, ValueError):
            continue
    return found


def test_a_training_on_two_machines_starts_again_when_one_is_lost(tmp_path, nodes, monkeypatch, capsys):
    photos = write_images(tmp_path / "photos", count=32)
    # A network without statistics of batches, in which rounding does not grow.
    usual = ["train", str(photos), "--encoder.name=vit_tiny_patch16_224", "--encoder.image_size=16"]
    usual += ["--encoder.arguments={depth: 2, embed_dim: 24, num_heads: 2, patch_size: 4}", "--views.size=16"]
    usual += ["--device=cpu", "--precision=fp32", "--workers=0", "--epochs=3", "--log_every=1", "--monitor_every=0"]
    usual += ["--checkpoint_minutes=0", "--report_html=false", "--sync_batchnorm=true", "--cld.weight=0"]
    line = [*usual, "--batch_size=8", "--nodes=2", "--launcher=ray", f"--run={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["crosslevel", *line])

    def logged():
        there = (tmp_path / "run" / "metrics.csv").exists()
        return there and len(metrics(tmp_path / "run")) >= 4 and trainings(tmp_path).get("1")

    with meanwhile(logged, lambda process: os.kill(process, signal.SIGKILL)) as killed:
        called(train, line[1:])
    said = capsys.readouterr().out
    assert re.search(r"status -9: started again \(1 of at most 3 times\)", said)
    assert "next:" in said
    assert killed
    called(train, [*usual[1:], "--batch_size=16", f"--run={tmp_path}/alone"])
    losses = [[float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    load_encoder(tmp_path / "run")


def test_a_pack_and_an_inspection_are_those_of_one_machine(tmp_path, nodes):
    """The pack is of a folder, the inspection of a Parquet file with the same images."""
    photos, made = tmp_path / "photos", {}
    draw(photos, range(90))
    (photos / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    shutil.copy(photos / "b" / "001.png", photos / "b" / "copy.png")
    content = [file.read_bytes() for file in sorted(photos.rglob("*.png"))]
    pq.write_table(pa.table({"image": content}), tmp_path / "photos.parquet")
    for engine in ("local", "ray"):
        sizes, usual = Sizes(part=16, at_once=8), {"workers": 0, "engine": engine, "quiet": True}
        folder = pack(str(photos), str(tmp_path / engine), size=8, sizes=sizes, **usual)
        figures = inspect(str(tmp_path / "photos.parquet"), sample=60, full_scan=True, device="cpu", **usual)
        made[engine] = {file.name: file.read_bytes() for file in folder.iterdir()}, figures
    assert "bad_files.txt" in made["ray"][0]
    assert len(made["ray"][1]["broken"]) == 1
    assert made["ray"][1]["exact_duplicates"] == {"sets": 1, "superfluous": 1}
    assert (made["ray"][1]["looked_at"], made["ray"][1]["compared"]) == (92, 60)
    assert made["ray"] == made["local"]


@pytest.fixture
def shard(tmp_path, bucket):
    """160 images with labels in a tar file, which is in the bucket as well."""
    photos = tmp_path / "photos"
    draw(photos, range(160))
    members = [
        member
        for file in sorted(photos.rglob("*.png"))
        for member in ((file.name, file.read_bytes()), (f"{file.stem}.cls", b"%d" % (int(file.stem) % 3)))
    ]
    file = write_tar(tmp_path / "photos.tar", members)
    bucket.put(str(file), "bucket/photos.tar")
    return file


def test_a_lost_node_costs_time_only(tmp_path, nodes, shard):
    """One table of a tar file, and a folder of parts of the same in a bucket, which each node copies for itself."""
    trained, sources = random_encoder(tmp_path / "encoder"), (str(shard), "s3://bucket/photos.tar")
    embedded(trained, shard, tmp_path / "alone.parquet")
    alone = rows(tmp_path / "alone.parquet")
    assert {label for label, *_ in alone.values()} == {0, 1, 2}
    for source, output in zip(sources, ("features.parquet", "features"), strict=True):
        nodes.complete()
        pieces = tmp_path / ("features.parquet.parts" if "." in output else output)
        with meanwhile(lambda p=pieces: len(list(p.glob("0*.parquet"))), lambda _: nodes.lose()) as seen:
            embedded(trained, source, tmp_path / output, "--engine=ray")
        assert 0 < seen[0] < 20
        same(rows(tmp_path / output), alone)
    assert pq.read_table(tmp_path / "features.parquet")["path"].to_pylist() == list(alone)
