"""Signals that ask a command to end: `embed`, `pack` and `tune` say in one line what is kept, and go on from there.

`train` is in test_training.py.
"""

import csv
import hashlib
import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from forks import started, waited_for
from PIL import Image

from crosslevel.data import pack_writer
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.features import embed as embedding
from crosslevel.features import pieces
from crosslevel.inspection import inspect as inspecting
from crosslevel.models.encoder import Encoder, View
from crosslevel.settings.parser import run

SIGNALS = [
    (signal.SIGTERM, "process and group"),
    (signal.SIGHUP, "process"),
    (signal.SIGUSR1, "group"),
    (signal.SIGUSR2, "process"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("signals"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(64):
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / "photos" / f"{i:02}.png")
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    encoder.save(folder / "encoder.safetensors")
    return folder


def asked_to_end(folder, call, pausing, number, to):
    """A command in a session of its own that comes to a pause, and is asked to end there: its status and its lines.

    ``pausing`` makes it pause: it is given what to call at that place.
    """
    reading, writing = os.pipe()

    def pause():
        os.write(writing, b"there")
        time.sleep(300)

    def paused():
        pausing(pause)
        call()

    child = started(folder, paused)
    os.close(writing)
    with open(reading, "rb") as told:
        assert told.read(5) == b"there", (folder / "err").read_text()
    if "process" in to:
        os.kill(child, number)
    if "group" in to:
        os.killpg(child, number)
    return waited_for(folder, child)


def after(place, name, calls):
    """Makes a process pause before it calls ``place.name`` once more than ``calls`` times."""

    def pausing(pause):
        own, done = getattr(place, name), []

        def counted(*arguments, **options):
            if len(done) == calls:
                pause()
            done.append(1)
            return own(*arguments, **options)

        setattr(place, name, counted)

    return pausing


@pytest.mark.parametrize(("number", "to"), SIGNALS)
def test_embed_keeps_its_pieces(home, tmp_path, number, to):
    paths = [str(home / "encoder.safetensors"), str(home / "photos"), "-o", str(tmp_path / "f.parquet")]
    arguments = [*paths, "--device=cpu", "--precision=fp32", "--batch_size=16", "--workers=2"]
    pausing = after(pieces.Pieces, "write", 2)
    code, said = asked_to_end(tmp_path, lambda: run(embedding.embed, arguments, rows=16), pausing, number, to)
    name = signal.Signals(number).name
    assert said == f"crosslevel embed: stopped by {name}: 32 images are done; the same command continues there\n"
    assert code == 128 + number
    assert not (tmp_path / "f.parquet").exists()
    run(embedding.embed, [*arguments, "--workers=0"], rows=16)
    assert pq.read_table(tmp_path / "f.parquet")["path"].to_pylist() == [f"{i:02}.png" for i in range(64)]
    assert not (tmp_path / "f.parquet.parts").exists()


@pytest.mark.parametrize(("number", "to"), SIGNALS)
def test_pack_keeps_its_parts(home, tmp_path, number, to):
    arguments = [str(home / "photos"), "-o", str(tmp_path / "p"), "--size=16", "--workers=2"]
    small = pack_writer.Sizes(part=16, at_once=8)
    pausing = after(pack_writer.PackWriter, "_store", 2)
    code, said = asked_to_end(tmp_path, lambda: run(pack, arguments, sizes=small), pausing, number, to)
    name = signal.Signals(number).name
    assert said == f"crosslevel pack: stopped by {name}: 32 images are done; the same command continues there\n"
    assert code == 128 + number
    run(pack, [*arguments, "--workers=0"], sizes=small)
    assert len(open_images(tmp_path / "p")) == 64
    assert sorted(os.listdir(tmp_path / "p")) == ["00000.bin", "index.safetensors", "pack.json"]


@pytest.mark.parametrize(("number", "to"), SIGNALS)
def test_tune_keeps_its_study(home, tmp_path, number, to):
    pytest.importorskip("optuna", reason="needs optuna: pip install 'crosslevel[tune]'")
    from crosslevel.tuning.tune import tune

    pauses = []

    def training(images, base, options, folder, threads):
        if folder.name == "0001":
            for pause in pauses:
                pause()
        for epoch in (1, 2):
            score = int(hashlib.sha256(repr(options).encode()).hexdigest()[:4], 16)
            yield {"combined": score * epoch, "effective_rank": 5.0, "collapse": "", "symptoms": ""}

    searched = ["--search=lr=0.01,0.1", "--search=cld.weight=0.0,0.5", "--trials=9", "--sampler=random"]
    options = ["--pruning=false", "--epochs=2", "--device=cpu", f"--output={tmp_path}/t"]
    arguments = [str(home / "photos"), *searched, *options]
    code, said = asked_to_end(tmp_path, lambda: run(tune, arguments, training=training), pauses.append, number, to)
    name = signal.Signals(number).name
    # The second trial was cut off, which is an end as well.
    assert (
        said
        == f"crosslevel tune: stopped by {name}: 2 trials have ended and are kept; the same command continues there\n"
    )
    assert code == 128 + number
    run(tune, arguments, training=training)  # where nothing pauses
    with open(tmp_path / "t" / "trials.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    whole = {(row["lr"], row["cld.weight"]) for row in rows if row["outcome"] == "complete"}
    assert len(whole) == 4
    assert [row["outcome"] for row in rows].count("killed") == 1


def test_any_other_verb_ends_in_one_line_as_well(home, tmp_path):
    pausing = after(inspecting, "structure", 0)
    arguments = [str(home / "photos"), "--device=cpu", "--workers=0"]
    code, said = asked_to_end(
        tmp_path, lambda: run(inspecting.inspect, arguments), pausing, signal.SIGTERM, "process and group"
    )
    assert (code, said) == (143, "crosslevel inspect: stopped by SIGTERM\n")


def test_under_nohup_a_closed_terminal_is_no_signal(home, tmp_path):
    """And what comes to the command meanwhile ends it as before."""

    def call():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run(inspecting.inspect, [str(home / "photos"), "--device=cpu", "--workers=0"])

    def pausing(pause):
        own = inspecting.structure

        def hung_up(*arguments, **options):
            os.kill(os.getpid(), signal.SIGHUP)
            pause()
            return own(*arguments, **options)

        inspecting.structure = hung_up

    code, said = asked_to_end(tmp_path, call, pausing, signal.SIGUSR1, "process")
    assert (code, said) == (128 + signal.SIGUSR1, "crosslevel inspect: stopped by SIGUSR1\n")
