"""One process a folder: who comes second is told who is there; who is killed is there no more. With real processes."""

import os
import signal
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
from forks import fork
from PIL import Image
from strangers import refused

from crosslevel.data import pack_writer
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.features import embed as embedding
from crosslevel.features import pieces
from crosslevel.models.encoder import Encoder, View
from crosslevel.settings.parser import run


@pytest.fixture
def photos(tmp_path):
    folder, draws = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(draws.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


def stopped_at(place, name, call):
    """Another process that does `call` until it comes to `place.name`, and waits there; its number."""
    reading, writing = os.pipe()
    child = fork()
    if child == 0:

        def wait(*arguments, **options):
            os.write(writing, b"there")
            signal.pause()

        setattr(place, name, wait)
        try:
            call()
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as told:
        assert told.read(5) == b"there"
    return child


def killed(child):
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_folder_is_packed_by_one_process(photos, tmp_path, capsys):
    """And by another one when the first was killed, from where it was."""
    arguments = [str(photos), "-o", str(tmp_path / "p"), "--size=12", "--workers=0"]
    small = pack_writer.Sizes(part=4, at_once=2)
    first = stopped_at(pack_writer.PackWriter, "finish", lambda: run(pack, arguments, sizes=small))
    try:
        said = refused(pack, arguments, capsys)
        assert f"p is in use by crosslevel pack (process {first} on {socket.gethostname()})" in said
        assert said.endswith("wait until it has ended, or take another folder\n")
    finally:
        killed(first)
    run(pack, arguments, sizes=small)
    assert "continuing at image 12" in capsys.readouterr().out
    source, made = open_images(photos), open_images(tmp_path / "p")
    assert all((source[i][0] == made[i][0]).all() for i in range(12))
    assert sorted(os.listdir(tmp_path / "p")) == ["00000.bin", "index.safetensors", "pack.json"]


def test_a_table_is_made_by_one_process(photos, tmp_path, capsys):
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    encoder.save(tmp_path / "encoder.safetensors")
    options = ["--device=cpu", "--workers=0", "--batch_size=4"]

    def arguments(name):
        return [str(tmp_path / "encoder.safetensors"), str(photos), "-o", str(tmp_path / name), *options]

    first = stopped_at(pieces.Pieces, "join", lambda: run(embedding.embed, arguments("f.parquet"), rows=4))
    try:
        said = refused(embedding.embed, arguments("f.parquet"), capsys)
        assert f"f.parquet.parts is in use by crosslevel embed (process {first} on " in said
        run(embedding.embed, arguments("g.parquet"), rows=4)  # beside it there is room
    finally:
        killed(first)
    capsys.readouterr()
    run(embedding.embed, arguments("f.parquet"), rows=4)
    assert pq.read_table(tmp_path / "f.parquet").equals(pq.read_table(tmp_path / "g.parquet"))
    assert not list(tmp_path.glob("*.parts"))


def test_workers_of_one_search_share_its_folder_and_those_of_another_are_refused(photos, tmp_path, capsys):
    pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
    from crosslevel.tuning.plan import Plan, url
    from crosslevel.tuning.search_space import parse
    from crosslevel.tuning.study import Search
    from crosslevel.utils.errors import FolderInUse

    def plan(storage):
        space = parse(["lr=0.1,0.2"], {"lr": 0.1, "method": {"class_path": "crosslevel.methods.SimCLR"}})
        return Plan(
            folder=tmp_path / "s", storage=url(storage, tmp_path / "s"), space=space, start=[], epochs=1, budget=2.0,
            trials=None, sampler="random", pruning=False, seed=0, agreed={},
        )  # fmt: skip

    def call():
        Search(plan(None)).work(None)

    first = stopped_at(Search, "work", call)
    try:
        Search(plan(None)).close()
        with pytest.raises(
            FolderInUse, match=rf"s is in use by crosslevel tune \(process {first} on .*another --storage"
        ):
            Search(plan(f"sqlite:///{tmp_path}/other.db"))
    finally:
        killed(first)
    Search(plan(f"sqlite:///{tmp_path}/other.db")).close()
