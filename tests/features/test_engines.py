"""Features in a folder of parts that grows, and made by the machines of a cluster, one of which is lost."""

import importlib
import os
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crosslevel import Encoder
from crosslevel.features import embed
from crosslevel.models.encoder import View
from crosslevel.settings.parser import run
from crosslevel.utils.errors import MissingExtra


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with an encoder of random weights."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    folder = tmp_path_factory.mktemp("run")
    encoder.save(folder / "encoder.safetensors")
    return folder


def draw(folder, numbers, seed=0):
    for i in numbers:
        place = folder / ("b" if i % 3 else "a ü")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.png")


def embedded(trained, photos, output, *options):
    return run(
        embed.embed,
        [str(trained), str(photos), "-o", str(output), "--device=cpu", "--precision=fp32", *options],
        rows=8,
    )


def rows(place):
    """Label, class and feature by path; every path once."""
    table = pq.read_table(place).to_pydict()
    assert len(set(table["path"])) == len(table["path"])
    return {p: (n, c, f) for p, n, c, f in zip(*(table[k] for k in ("path", "label", "class", "feature")), strict=True)}


def same(one, other):
    assert one.keys() == other.keys()
    for path, (label, name, feature) in one.items():
        assert other[path][:2] == (label, name)
        np.testing.assert_allclose(feature, other[path][2], rtol=1e-4, atol=1e-5)


def test_a_folder_of_parts_has_the_rows_of_a_table_and_takes_what_is_new(trained, tmp_path, capsys):
    photos, folder = tmp_path / "photos", tmp_path / "features"
    draw(photos, range(30))
    (photos / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    embedded(trained, photos, folder)
    embedded(trained, photos, tmp_path / "f.parquet")
    same(rows(folder), rows(tmp_path / "f.parquet"))
    assert len(list(folder.glob("*.parquet"))) == 4
    assert "30 features added to" in capsys.readouterr().out
    assert "broken.png" in (tmp_path / "features.bad_files.txt").read_text()
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    embedded(trained, photos, folder)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.parquet")} == written
    assert "0 features added to" in capsys.readouterr().out
    draw(photos, range(30, 37))
    draw(photos, [4], seed=1)  # another picture under an old name
    embedded(trained, photos, folder)
    assert "8 features added to" in capsys.readouterr().out
    paths = pq.read_table(folder)["path"].to_pylist()
    assert len(paths) == 38
    assert sorted(set(paths)) == sorted(
        rows(tmp_path / "f.parquet").keys() | {f"{'b' if i % 3 else 'a ü'}/{i:03}.png" for i in range(37)}
    )


def test_a_folder_takes_no_features_of_another_encoder(trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    draw(photos, range(4))
    embedded(trained, photos, tmp_path / "features")
    other = Encoder("resnet18", True, 0.0625)
    other.view = View(16)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other" / "encoder.safetensors")
    with pytest.raises(SystemExit):
        embedded(tmp_path / "other", photos, tmp_path / "features")
    assert "has features of another encoder, or none: give a folder of its own" in capsys.readouterr().err


def test_without_ray_the_install_command_is_told(trained, tmp_path, monkeypatch):
    draw(tmp_path / "photos", range(4))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"^--engine ray needs Ray: pip install 'crosslevel\[ray\]'$"):
        embed.embed(str(trained), str(tmp_path / "photos"), str(tmp_path / "f.parquet"), engine="ray")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one core each on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is of pip install 'crosslevel[ray]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    made = importlib.import_module("ray.cluster_utils").Cluster()
    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    made.add_node(**size)
    second = made.add_node(**size)
    ray.init(address=made.address, log_to_driver=False)
    yield made, second
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_makes_the_same_rows_and_a_lost_node_costs_time_only(trained, tmp_path, cluster):
    nodes, second = cluster
    photos = tmp_path / "photos"
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
