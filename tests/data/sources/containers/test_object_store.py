"""Shards, Parquet files and packs in a bucket of an S3 server on loopback, whose answers are spoilt."""

import io
import json
import logging
import os
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from container_samples import flat, labelled, value, write_tar
from object_store import FAULTS, proxied
from run_samples import losses, write_images

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.data.sources.containers import copies
from crosslevel.data.uri import parse
from crosslevel.features.embed import embed
from crosslevel.settings.parser import run
from crosslevel.training.train import train
from crosslevel.utils.errors import SourceError, UserError
from crosslevel.utils.tensors import load_tensors

server = pytest.importorskip("moto.server", reason="the S3 server is of pip install 'crosslevel[test]'")
s3fs = pytest.importorskip("s3fs")

KEY, SECRET = "AKIAEXAMPLEKEY", "sEcReT-that-nobody-may-read"
CLEAN = set()  # objects that a former test has left without a secret
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    """The proxy before a server with an empty bucket, and what fsspec has to know of it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    with proxied(moto.get_host_and_port()[1]) as proxy:
        told = {
            "endpoint_url": proxy.address, "key": KEY, "secret": SECRET,
            "config_kwargs": {"retries": {"total_max_attempts": 1}},
        }  # fmt: skip
        fsspec.config.conf["s3"] = told
        store = fsspec.filesystem("s3")
        if store.exists("bucket"):  # moto keeps what a former server of this process had
            store.rm("bucket", recursive=True)
        store.mkdir("bucket")
        yield proxy
        del fsspec.config.conf["s3"]
    moto.stop()


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path, bucket):
    """Small requests, short pauses, a cache of its own, and no faults unless a test asks for some."""
    monkeypatch.setenv("CROSSLEVEL_RETRY_SECONDS", "0,0.05,0.1,0.1")
    monkeypatch.setenv("CROSSLEVEL_REQUEST_KB", "2")
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    bucket.wanted, bucket.injected = 0, 0
    bucket.seen.clear()
    bucket.spoilt.clear()


class Recorded:
    """What is written to standard output and error, all of it, also what a test has read."""

    def __init__(self, capture):
        self.capture, self.whole = capture, ""

    def readouterr(self):
        read = self.capture.readouterr()
        self.whole += read.out + read.err
        return read


@pytest.fixture
def capfd(capfd):
    return Recorded(capfd)


@pytest.fixture(autouse=True)
def _no_secret_is_left(_apart, bucket, tmp_path, capfd, caplog):
    """Neither in a file, the cache included, nor in the bucket, in what is said, or in the log."""
    caplog.set_level(logging.DEBUG, logger="crosslevel")
    yield
    bucket.wanted = 0
    capfd.readouterr()
    assert told_in(tmp_path, capfd.whole, caplog.text) == []


def told_in(folder, said, logged):
    """The places that have a secret in them."""
    store = fsspec.filesystem("s3", use_listings_cache=False)
    contents = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name, about in store.find("bucket", detail=True).items():
        if (name, about["ETag"]) not in CLEAN:
            contents[f"s3://{name}"] = store.cat_file(name)
    contents |= {"said": said.encode(), "logged": logged.encode()}
    found = [name for name, text in contents.items() if KEY.encode() in text or SECRET.encode() in text]
    if not found:
        CLEAN.update((name, about["ETag"]) for name, about in store.find("bucket", detail=True).items())
    return found


def test_a_secret_is_found_wherever_it_is(tmp_path):
    assert told_in(tmp_path, "", "") == []
    (tmp_path / "a" / ".b").mkdir(parents=True)
    (tmp_path / "a" / ".b" / "c").write_text(f"key: {KEY}")
    fsspec.filesystem("s3").pipe("bucket/told", f"secret={SECRET}".encode())
    found = told_in(tmp_path, f"{KEY}: refused", SECRET)
    fsspec.filesystem("s3").rm("bucket/told")
    (tmp_path / "a" / ".b" / "c").unlink()
    assert found == [str(tmp_path / "a" / ".b" / "c"), "s3://bucket/told", "said", "logged"]


def test_credentials_in_variables_are_used_and_not_told(bucket, shards, monkeypatch, tmp_path):
    monkeypatch.delitem(fsspec.config.conf, "s3")
    other = {"AWS_ACCESS_KEY_ID": KEY + "2", "AWS_SECRET_ACCESS_KEY": SECRET + "2", "AWS_ENDPOINT_URL": bucket.address}
    for name, text in other.items():
        monkeypatch.setenv(name, text)
    s3fs.S3FileSystem.clear_instance_cache()
    assert len(open_images("s3://bucket/shards/s-0.tar")) == 30
    pack("s3://bucket/shards/s-0.tar", output=str(tmp_path / "packed"), size=4)
    with pytest.raises(SourceError, match="cannot be opened") as caught:
        open_images("s3://bucket/none/x.tar")
    assert KEY not in str(caught.value)
    assert KEY + "2" in bucket.keys


@pytest.fixture(scope="module")
def shards(bucket, tmp_path_factory):
    """Eight shards of 30 images."""
    home, store = tmp_path_factory.mktemp("shards"), fsspec.filesystem("s3")
    for i in range(8):
        file = write_tar(home / f"s-{i}.tar", labelled(range(30 * i, 30 * i + 30)))
        store.put(str(file), f"bucket/shards/s-{i}.tar")
    return "s3://bucket/shards/s-*.tar"


def crops(image, generator):
    return image.unsqueeze(0)


def test_of_200_spoilt_answers_no_row_is_lost_and_none_comes_twice(bucket, shards):
    bucket.wanted = 200
    stream, found, bad_files = open_images(shards, streams=True), [], BadFiles()
    for rank in range(2):
        batches = StreamBatches(stream, 8, 240, seed=0, bad_files=bad_files, crops=crops, rank=rank, world=2)
        found += [int(number) for batch in batches for number in batch.images[:, 0, 0, 0, 0]]
    assert sorted(found) == list(range(240))
    assert not len(bad_files)
    assert bucket.injected == 200
    assert set(bucket.kinds) == set(FAULTS)
    assert set(bucket.spoilt) == {"GET", "HEAD", "LIST"}


def test_a_store_tells_sizes_by_one_listing_of_a_folder(bucket, shards):
    stream = open_images(shards, streams=True)
    store = fsspec.filesystem("s3")
    assert stream.sizes() == [store.size(f"bucket/shards/s-{i}.tar") for i in range(len(stream.shards))]
    assert min(stream.sizes()) > 0
    stream.shards[0] = "s3://bucket/shards/nowhere.tar"
    assert stream.sizes()[0] == 0
    stream.shards[0] = "s3://bucket/none/s-0.tar"
    assert stream.sizes()[0] == 0


def test_shards_are_copied_once_for_what_reads_them_at_any_place(bucket, shards):
    bucket.wanted = 16  # each shard's first two answers
    images = open_images(shards)
    assert bucket.injected == 16
    assert [value(images[i][0]) for i in range(len(images))] == list(range(240))
    assert images.paths[31] == "s-1.tar/0031.png"
    assert images.labels.tolist() == [i % 3 for i in range(240)]
    assert images.name == shards
    copied = _copies()
    assert len(open_images(shards)) == 240
    assert len(open_images("s3://bucket/shards/s-{0..1}.tar")) == 60
    assert _copies() == copied  # nothing is copied again


def _copies():
    """Each copy's file: what is copied again is another one of the same name."""
    return {file.name: file.stat().st_ino for file in Path(os.environ["CROSSLEVEL_CACHE"]).rglob("s-*.tar")}


def test_what_was_written_anew_is_copied_anew(tmp_path):
    store = fsspec.filesystem("s3")
    for first in (0, 100):
        store.put(str(write_tar(tmp_path / "x.tar", labelled(range(first, first + 4)))), "bucket/new/x.tar")
        store.invalidate_cache()
        images = open_images("s3://bucket/new/x.tar")
        assert [value(images[i][0]) for i in range(4)] == list(range(first, first + 4))


def test_parquet_in_a_bucket():
    file = io.BytesIO()
    rows = [{"bytes": flat(i), "path": f"{i}.png"} for i in range(6)]
    pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(6)]}), file)
    fsspec.filesystem("s3").pipe("bucket/tables/a.parquet", file.getvalue())
    images = open_images("s3://bucket/tables/a.parquet,column=image", streams=True)
    assert [value(images[i][0]) for i in range(6)] == list(range(6))
    assert len(open_images("s3://bucket/tables/a.parquet@list=" + _listed(images))) == 3


def _listed(images):
    file = os.path.join(os.environ["CROSSLEVEL_CACHE"], "list.txt")
    with open(file, "w") as lines:
        lines.write("".join(f"{images.paths[i]}\n" for i in range(3)))
    return file


def test_a_pack_in_a_bucket_is_read_as_it_was_made(bucket, tmp_path):
    write_tar(tmp_path / "x.tar", labelled(range(40)))
    folder = pack(str(tmp_path / "x.tar"), output=str(tmp_path / "packed"), size=4, quiet=True)
    fsspec.filesystem("s3").put(str(folder), "bucket/packed", recursive=True)
    bucket.wanted = 6  # of pack.json, the index and a shard
    images, here = open_images("s3://bucket/packed"), open_images(str(folder))
    assert bucket.injected == 6
    assert list(images.paths) == list(here.paths)
    assert all(torch.equal(images[i][0], here[i][0]) for i in range(40))


def test_refusals_are_one_line_and_tell_no_secret(bucket, shards, monkeypatch):
    for source, says in {
        "s3://bucket/none/x.tar": "s3://bucket/none/x.tar: cannot be opened: .*",
        "s3://bucket/none/*.tar": r"s3://bucket/none/\*.tar: no file matches this pattern",
        "s3://bucket/none": "s3://bucket/none: no pack and no .tar or .parquet files: .*",
    }.items():
        with pytest.raises(SourceError, match=f"^{says}") as caught:
            open_images(source)
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: _Full())
    with pytest.raises(SourceError, match=r"GB have to be copied once, and .* set CROSSLEVEL_CACHE to a larger disk$"):
        open_images(shards)
    monkeypatch.undo()


class _Full:
    free = 0


def test_what_no_attempt_can_read_costs_its_shard_alone(bucket, shards, monkeypatch):
    monkeypatch.setattr(
        type(bucket),
        "fault",
        lambda self, handler: "busy" if "GET /bucket/shards/s-3.tar" in handler.requestline else None,
    )
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    bad_files = BadFiles()
    monkeypatch.setenv("CROSSLEVEL_RETRY_SECONDS", "0")
    stream = open_images("s3://bucket/shards/s-{2..3}.tar", streams=True)
    batches = StreamBatches(stream, 10, 30, seed=0, bad_files=bad_files, crops=crops)
    found = [int(number) for batch in batches for number in batch.images[:, 0, 0, 0, 0]]
    assert set(found) == set(range(60, 90))
    assert list(bad_files.reasons) == ["s-3.tar"]
    with pytest.raises(SourceError, match=r"s-3.tar: cannot be read, tried 2 times: "):
        open_images("s3://bucket/shards/s-3.tar")
    monkeypatch.undo()


def test_copies_say_where_they_are_from(shards):
    open_images("s3://bucket/shards/s-0.tar")
    copy = Path(copies.local(parse("s3://bucket/shards/s-0.tar")).path)
    told = json.loads((copy.parent / ".s-0.tar.origin.json").read_text())
    assert set(told) == {"state"}
    assert "ETag" in told["state"]


def test_a_pack_is_made_in_a_bucket(tmp_path, capfd):
    write_tar(tmp_path / "x.tar", labelled(range(20)))
    at, here = "s3://bucket/made", pack(str(tmp_path / "x.tar"), output=str(tmp_path / "packed"), size=4, quiet=True)
    pack(str(tmp_path / "x.tar"), output=at, size=4)
    assert "sent to s3://bucket/made; next: crosslevel train s3://bucket/made" in capfd.readouterr().out
    names = {file.name: file.read_bytes() for file in here.iterdir() if file.name != ".crosslevel.lock"}
    store = fsspec.filesystem("s3")
    assert {Path(name).name: store.cat_file(name) for name in store.find("bucket/made")} == names
    found, same = open_images(at), open_images(str(here))
    assert all(torch.equal(found[i][0], same[i][0]) for i in range(20))
    pack(str(tmp_path / "x.tar"), output=at, size=4)
    assert "s3://bucket/made is complete: 20 images" in capfd.readouterr().out
    write_tar(tmp_path / "x.tar", labelled(range(30)))
    pack(str(tmp_path / "x.tar"), output=at, size=4, quiet=True)
    assert len(open_images(at)) == 30
    with pytest.raises(UserError, match="s3://bucket/shards: there is something else in it: give another folder"):
        pack(str(tmp_path / "x.tar"), output="s3://bucket/shards", size=4, quiet=True)


class Killed(BaseException):
    """Nothing of the run's own code gets to act on it."""


class KilledAt:
    def on_log(self, step, figures, module):
        if step == 6:
            raise Killed


def test_a_run_lives_in_a_bucket_and_goes_on_on_another_machine(bucket, tmp_path, monkeypatch, capfd):
    photos, at, store = write_images(tmp_path / "photos"), "s3://bucket/runs/a", fsspec.filesystem("s3")
    line = [str(photos), "--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--workers=0"]
    line += ["--device=cpu", "--report_html=false", "--monitor_every=0", "--epochs=3", "--checkpoint_minutes=0"]
    run(train, [*line, f"--run={tmp_path}/whole"])
    with pytest.raises(Killed):
        run(train, [*line, f"--run={at}"], callbacks=[KilledAt()])
    assert not store.exists("bucket/runs/a/encoder.safetensors")
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "another"))
    bucket.wanted = 8
    run(train, ["--resume", at])
    assert bucket.injected == 8
    said = capfd.readouterr().out
    assert f"run: {at}" in said
    assert f"crosslevel embed {at} " in said
    store.get("bucket/runs/a", str(tmp_path / "copy"), recursive=True)
    assert losses(tmp_path / "copy") == losses(tmp_path / "whole")
    assert sorted(file.name for file in (tmp_path / "copy" / "checkpoints").iterdir()) == [
        "best.ckpt", "last.ckpt", "previous.ckpt",
    ]  # fmt: skip
    steps = {
        name: load_tensors(tmp_path / "copy/checkpoints" / f"{name}.ckpt")["global_step"]
        for name in ("last", "previous")
    }
    assert steps == {"last": 9, "previous": 8}
    run(embed, [at, str(photos), f"--output={tmp_path}/f.parquet", "--device=cpu", "--workers=0"])
    assert len(pq.read_table(tmp_path / "f.parquet")) == 24
    with pytest.raises(SystemExit):
        run(train, [*line, f"--run={at}"])
    assert f"--run {at}: it already holds a run: give another folder, or --resume {at}" in capfd.readouterr().err
