"""On a Ray cluster of two nodes on this machine, which all tests here share: a training and a table that lose one."""

import importlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from embed_samples import draw, embedded, random_encoder, rows, same
from run_samples import metrics, write_images

from crosslevel import load_encoder
from crosslevel.data.pack import pack
from crosslevel.data.pack_writer import Sizes
from crosslevel.inspection.inspect import inspect
from crosslevel.settings.parser import run as called
from crosslevel.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each."""
    ray = pytest.importorskip("ray", reason="Ray is of pip install 'crosslevel[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_health_check_period_ms", "1000")
        made = importlib.import_module("ray.cluster_utils").Cluster()
        size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        made.add_node(**size)
        second = made.add_node(**size)
        ray.init(address=made.address, log_to_driver=False)
        yield made, second
        ray.shutdown()
        made.shutdown()


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


def test_a_training_on_two_machines_starts_again_when_one_is_lost(tmp_path, cluster, monkeypatch, capsys):
    photos = write_images(tmp_path / "photos", count=32)
    # A network without statistics of batches, in which rounding does not grow.
    usual = ["train", str(photos), "--encoder.name=vit_tiny_patch16_224", "--encoder.image_size=16"]
    usual += ["--encoder.arguments={depth: 2, embed_dim: 24, num_heads: 2, patch_size: 4}", "--views.size=16"]
    usual += ["--device=cpu", "--precision=fp32", "--workers=0", "--epochs=3", "--log_every=1", "--monitor_every=0"]
    usual += ["--checkpoint_minutes=0", "--report_html=false", "--sync_batchnorm=true", "--cld.weight=0"]
    line = [*usual, "--batch_size=8", "--nodes=2", "--launcher=ray", f"--run={tmp_path}/run"]
    killed = []

    def kill():
        while len(metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.csv").exists() else []) < 4:
            time.sleep(0.1)
        killed.append(trainings(tmp_path)["1"])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    monkeypatch.setattr(sys, "argv", ["crosslevel", *line])
    called(train, line[1:])
    thread.join()
    said = capsys.readouterr().out
    assert re.search(r"status -9: started again \(1 of at most 3 times\)", said)
    assert "next:" in said
    assert killed
    called(train, [*usual[1:], "--batch_size=16", f"--run={tmp_path}/alone"])
    losses = [[float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    load_encoder(tmp_path / "run")


def test_a_pack_and_an_inspection_are_those_of_one_machine(tmp_path, cluster):
    photos, made = tmp_path / "photos", {}
    draw(photos, range(90))
    (photos / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    shutil.copy(photos / "b" / "001.png", photos / "b" / "copy.png")
    for engine in ("local", "ray"):
        sizes = Sizes(part=16, at_once=8)
        folder = pack(str(photos), str(tmp_path / engine), size=8, workers=0, engine=engine, quiet=True, sizes=sizes)
        figures = inspect(str(photos), sample=60, workers=0, device="cpu", engine=engine, quiet=True)
        made[engine] = {file.name: file.read_bytes() for file in folder.iterdir()}, figures
    assert "bad_files.txt" in made["ray"][0]
    assert made["ray"] == made["local"]


def test_a_cluster_makes_the_same_rows_and_a_lost_node_costs_time_only(tmp_path, cluster):
    nodes, second = cluster
    trained, photos = random_encoder(tmp_path / "encoder"), tmp_path / "photos"
    draw(photos, range(160))
    embedded(trained, photos, tmp_path / "alone.parquet")
    lost = []

    def lose():
        pieces = tmp_path / "cluster.parquet.parts"
        while not list(pieces.glob("0*.parquet")):
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        lost.append(len(list(pieces.glob("0*.parquet"))))

    thread = threading.Thread(target=lose)
    thread.start()
    embedded(trained, photos, tmp_path / "cluster.parquet", "--engine=ray")
    thread.join()
    assert lost[0] < 20
    alone, found = pq.read_table(tmp_path / "alone.parquet"), pq.read_table(tmp_path / "cluster.parquet")
    assert found["path"].to_pylist() == alone["path"].to_pylist()
    same(rows(tmp_path / "cluster.parquet"), rows(tmp_path / "alone.parquet"))
    embedded(trained, photos, tmp_path / "parts", "--engine=ray")
    same(rows(tmp_path / "parts"), rows(tmp_path / "alone.parquet"))
