"""Training on streams, end to end through the command."""

import csv
import io
import re
import tarfile
import uuid

import fsspec
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from train_samples import Killed, killed_after

from crosslevel import load_encoder
from crosslevel.cli import main
from crosslevel.settings.parser import run
from crosslevel.training.train import train as train_verb

TINY = [
    "--encoder.width=0.0625",
    "--views.size=16",
    "--batch_size=8",
    "--log_every=1",
    "--device=cpu",
    "--workers=0",
    "--report_html=false",
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_RETRY_SECONDS", "0")


def write_shards(place, counts=(20, 21, 23), size=(18, 22)):
    """Shards of noisy pictures, the second picture of the first shard unreadable, the last shard cut in the middle."""
    draws = np.random.default_rng(0)
    for s, count in enumerate(counts):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for i in range(count):
                picture = io.BytesIO()
                Image.fromarray(draws.integers(0, 256, (*size, 3), np.uint8)).save(picture, "png")
                data = b"nothing" if (s, i) == (0, 1) else picture.getvalue()
                member = tarfile.TarInfo(f"{i:03}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        data = archive.getvalue()
        with fsspec.open(f"{place}/train-{s:03}.tar", "wb") as file:
            file.write(data if s < len(counts) - 1 else data[: len(data) // 2])
    return f"{place}/train-{{000..{len(counts) - 1:03}}}.tar"


@pytest.fixture(scope="module")
def source():
    return write_shards(f"memory://{uuid.uuid4()}")


def train(*arguments):
    main(["train", *map(str, arguments)])


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file) if row["loss"]}


def same_weights(a, b):
    first, second = (load_encoder(folder).state_dict() for folder in (a, b))
    return all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", ["MoCo", "SimCLR", "BYOL", "InfoMin"])
def test_methods_without_a_bank_train_on_a_stream(source, tmp_path, method, capsys):
    # 32 images in 3 shards of about 50 in all.
    train(source, *TINY, "--method", method, "--epoch_size=32", "--epochs=2", f"--run={tmp_path}/r")
    folder = tmp_path / "r"
    assert list(losses(folder)) == list(range(1, 9))
    assert load_encoder(folder).view.size == 16
    damaged = (folder / "bad_files.txt").read_text().splitlines()
    assert len(damaged) == 2
    assert damaged[0].startswith("train-000.tar/001.png\tnot an image")
    assert damaged[1].startswith("train-002.tar\ttruncated inside 0")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["images"], saved["epoch_size"]) == (source, 32)
    out = capsys.readouterr().out
    assert "3 shards, 4 steps an epoch" in out
    assert "skipped 2 images or shards that could not be read" in out
    assert f"crosslevel embed {folder} IMAGES" in out


def test_the_config_alone_repeats_the_run(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_shards(f"file://{tmp_path}/data")
    monkeypatch.chdir(tmp_path)
    run = ["--epoch_size=24", "--epochs=1"]
    train("stream:data/*.tar", *TINY[:-1], *run)
    folder = tmp_path / "runs" / "data-simclr-cld"
    monkeypatch.chdir(tmp_path / "runs")
    train("--config", folder / "config.yaml", f"--run={tmp_path}/b", "--report_html=false")
    assert losses(folder) == losses(tmp_path / "b")
    assert same_weights(folder, tmp_path / "b")
    page = re.sub(r"base64,[\w+/=]*", "", (folder / "report.html").read_text())  # letters of pictures say nothing
    assert "3 shards of stream:data/*.tar" in page
    assert "Nearest neighbours" in page
    assert "kNN" not in page


def test_a_run_killed_within_an_epoch_continues_with_other_workers(source, tmp_path):
    options = [source, *TINY, "--epoch_size=32", "--epochs=2", "--checkpoint_minutes=0"]
    train(*options, f"--run={tmp_path}/whole")
    with pytest.raises(Killed):
        run(train_verb, [*options, f"--run={tmp_path}/cut"], callbacks=[killed_after(6)])
    train("--resume", tmp_path / "cut", "--workers=2")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    both = [(tmp_path / name / "bad_files.txt").read_text() for name in ("cut", "whole")]
    assert both[0] == both[1]


def test_a_run_that_goes_on_with_another_batch_says_so(source, tmp_path, capsys):
    train(source, *TINY, "--epoch_size=16", "--epochs=1", f"--run={tmp_path}/r")
    assert "before: it continues" not in capsys.readouterr().out
    train("--resume", tmp_path / "r", "--epochs=2", "--batch_size=4")
    said = " ".join(capsys.readouterr().out.split())
    assert "4 images a step, 8 before: it continues with other batches than before; --batch_size 8 keeps" in said
    assert list(losses(tmp_path / "r")) == list(range(1, 9))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method=npid", "--epoch_size=32"], "NPID keeps a row for every image: it needs a source of known length"),
        ([], "nobody knows how many images a stream has before they are read: give --epoch_size N"),
        (["--epoch_size=0"], "epoch_size=0: at least one image"),
        (["--epoch_size=1"], "batch_size=1 leaves nothing to compare with"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_one_line(source, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as end:
        train(source, *TINY, *options, f"--run={tmp_path}/r")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_epoch_size_is_for_streams_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(
            "turntable,classes=2,objects=4,frames=3,size=16,imbalance=1", *TINY, "--epoch_size=8", f"--run={tmp_path}/r"
        )
    assert "epoch_size=8 is for streams: an epoch of turntable" in capsys.readouterr().err


def test_other_commands_refuse_a_stream(source, tmp_path, capsys):
    """At an address they read a copy; shards of this machine that are named as a stream are not counted."""
    train(source, *TINY, "--epoch_size=8", "--epochs=1", f"--run={tmp_path}/r")
    local = f"stream:{write_shards(tmp_path)}"
    for verb in (["embed", f"{tmp_path}/r", local], ["evaluate", f"{tmp_path}/r", local, "--test", local]):
        with pytest.raises(SystemExit):
            main(verb)
        assert f"{local}: a stream has no known number of images, only train" in capsys.readouterr().err


def test_no_shard_at_all_ends_before_the_run_begins(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("memory://nowhere/{1..3}.tar", *TINY, "--epoch_size=8", f"--run={tmp_path}/r")
    assert "none of its 3 shards can be read (the first: " in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
