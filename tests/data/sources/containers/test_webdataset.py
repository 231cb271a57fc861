"""WebDataset shards, compared with the standard library's tarfile."""

import contextlib
import io
import json
import os
import pickle
import random
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from container_samples import flat, labelled, value, write_tar
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import encoded
from PIL import Image

from crosslevel import cli
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers import webdataset as shards
from crosslevel.data.sources.containers.webdataset import Shards
from crosslevel.utils.errors import BadImage, SourceError

NAME = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150).map(
    "n{}".format
)


@pytest.fixture
def pair(tmp_path):
    """Two shards of 23 and 18 labelled images."""
    write_tar(tmp_path / "a-000.tar", labelled(range(23)))
    write_tar(tmp_path / "a-001.tar", labelled(range(23, 41)))
    return tmp_path


def test_images_labels_paths_and_blocks(pair):
    images = open_images(f"{pair}/a-{{000..001}}.tar")
    assert images.paths == [f"a-{int(i >= 23):03d}.tar/{i:04d}.png" for i in range(41)]
    assert images.labels.tolist() == [i % 3 for i in range(41)]
    assert images.classes == ["0", "1", "2"]
    assert images.blocks == [range(23), range(23, 41)]
    order = random.Random(0).sample(range(41), 41)
    assert [value(images[i][0]) for i in order] == order
    assert [images[i][1] for i in order] == [i % 3 for i in order]
    assert value(images[-1][0]) == 40
    assert len(list(images)) == 41  # an IndexError ends the loop


@given(
    names=st.lists(st.lists(NAME, min_size=1, max_size=3).map("/".join), min_size=2, max_size=5, unique=True),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(tmp_path_factory, names, format):
    file = tmp_path_factory.mktemp("names") / "x.tar"
    members = [(f"{i}{name}.PNG", flat(i)) for i, name in enumerate(names)]
    members.insert(1, ("text.txt", b"no image"))
    write_tar(file, members, format=format)
    images = Shards([str(file)], "x")
    with tarfile.open(file) as want:
        found = [member for member in want if member.name.endswith(".PNG")]
    assert images.paths == [f"x.tar/{member.name.removeprefix('./')}" for member in found]
    assert images._offset.tolist() == [member.offset_data for member in found]
    assert [value(images[i][0]) for i in range(len(names))] == list(range(len(names)))


def test_tars_of_other_programs(tmp_path):
    """GNU tar and its formats, with folders, links, a leading ./ and names of more than 100 letters."""
    folder = tmp_path / "in" / ("long" * 30)
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"🐈 {i}\nx.png").write_bytes(flat(i))
    os.link(folder / "🐈 0\nx.png", folder / "🐈 zz.png")  # stored as a link, without data
    os.symlink("🐈 0\nx.png", folder / "link.png")
    for format in ("gnu", "pax", "ustar", "v7"):
        parent, at = (tmp_path / "in", ".") if format in ("gnu", "pax") else (folder, ".")
        command = ["tar", f"--format={format}", "--sort=name", "-C", str(parent), "-cf", str(tmp_path / "x.tar"), at]
        subprocess.run(command, check=True)
        images = open_images(tmp_path / "x.tar")
        prefix = "x.tar/" if parent == folder else f"x.tar/{'long' * 30}/"
        assert images.paths == [f"{prefix}🐈 {i}\nx.png" for i in range(3)]
        assert [value(image) for image, _ in images] == [0, 1, 2]


def test_labels(tmp_path):
    def opened(*members):
        return Shards([str(write_tar(tmp_path / "x.tar", members))], "x")

    json = opened(("a.json", b'{"label": 7}'), ("a.jpg", b"?"), ("d/b.seg.png", b"?"), ("d/b.json", b'{"label": 0}'))
    assert json.labels.tolist() == [7, 0]
    assert len(json.classes) == 8
    both = opened(("a.json", b'{"label": 7}'), ("a.cls", b"1\n"), ("a.jpg", b"?"), ("b.cls", b"2"), ("b.jpg", b"?"))
    assert both.labels.tolist() == [1, 2]
    huge = opened(("a.cls", b"9000000000"), ("a.jpg", b"?"), ("b.cls", b"3"), ("b.jpg", b"?"))
    assert huge.labels.tolist() == [1, 0]
    assert huge.classes == ["3", "9000000000"]
    for odd in (b"", b"dog", b"-1", b"1.5", b"\xff", b"9" * 5000):
        assert opened(("a.cls", odd), ("a.jpg", b"?"), ("b.json", b'["label"]'), ("b.jpg", b"?")).labels is None
    with pytest.warns(UserWarning, match="labels are left out: 1 of 2 images have none"):
        assert opened(("a.cls", b"3"), ("a.jpg", b"?"), ("b.jpg", b"?")).labels is None
    hidden = opened(("._a.jpg", b"?"), ("a.jpg", b"?"), ("d/.b.jpg", b"?"), ("b.jpg", b"?"))
    assert hidden.paths == ["x.tar/a.jpg", "x.tar/b.jpg"]


def test_the_index_is_remembered_until_the_shard_changes(pair):
    first = open_images(pair)
    for shard in pair.glob("*.tar"):
        status = shard.stat()
        shard.write_bytes(bytes(status.st_size))  # nothing that could be indexed
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = open_images(pair)
    assert again.paths == first.paths
    assert again.identity() == first.identity()
    write_tar(pair / "a-001.tar", labelled(range(50, 53)))
    with pytest.raises(BadImage, match=r"a-001.tar/0023.png: the shard cannot be read: it has changed"):
        first[23]
    changed = open_images(pair)
    assert len(changed) == 26
    assert value(changed[25][0]) == 52
    assert changed.identity() != first.identity()


def test_identity_is_the_same_elsewhere(pair, tmp_path_factory):
    first = open_images(pair).identity()
    moved = tmp_path_factory.mktemp("else") / "where"
    os.rename(pair, moved)
    assert open_images(f"{moved}/*.tar").identity() == first


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_read_two_shards_once_an_epoch(pair, workers):
    write_tar(pair / "a-001.tar", labelled(range(23, 46)))
    images = open_images(pair)
    for epoch in range(2):
        seen, values = [], []
        for rank in range(2):
            batches = TrainBatches(
                images, 23, seed=3, bad_files=BadFiles(), resize=4, workers=workers, rank=rank, world=2
            )
            batches.epoch = epoch
            for batch in batches:
                seen += batch.index.tolist()
                values += batch.images[:, 0, 0, 0].tolist()
        assert sorted(seen) == list(range(46))
        assert values == seen


def test_more_shards_than_may_stay_open(tmp_path):
    for k in range(shards.OPEN_SHARDS + 5):
        write_tar(tmp_path / f"{k:03d}.tar", [(f"{k}.png", flat(k))])
    images = pickle.loads(pickle.dumps(open_images(tmp_path)))
    shards.opened_shard.cache_clear()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(2):
        assert [value(image) for image, _ in images] == list(range(shards.OPEN_SHARDS + 5))
    if before:
        assert len(os.listdir("/proc/self/fd")) - before == shards.OPEN_SHARDS


def test_a_shard_cut_anywhere_keeps_its_whole_members(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", labelled(range(6))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [(member.offset_data + member.size, member.name) for member in tar]
    file = tmp_path / "cut\n🙂.tar"
    for size in (*range(ends[3][0], ends[-1][0] + 100, 97), *(end for end, _ in ends[4:])):
        file.write_bytes(whole[:size])
        names = [name for end, name in ends if end <= size]
        want = [f"{file.name}/{name}" for name in names if name.endswith("png")]
        want = want[: sum(name.endswith("cls") for name in names)]  # one without its label is left out
        with pytest.warns(UserWarning, match="truncated") as caught:
            images = Shards([str(file)], "x")
        assert images.paths == want
        assert images.labels.tolist() == [0, 1, 2, 0, 1, 2][: len(want)]
        assert [value(image) for image, _ in images] == list(range(len(want)))
        (line,) = [str(warning.message) for warning in caught]
        cut = str(file).replace("\n", "\\n")
        assert line == f"{cut}: truncated: it ends at byte {size:,}: {len(want)} images are left"
        assert images.left_out == {file.name: line.removeprefix(f"{cut}: ")}


@pytest.mark.filterwarnings("ignore:.*truncated")
def test_every_verb_names_a_shard_that_is_cut_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    pictures = [encoded(Image.fromarray(draws.integers(0, 256, (40, 30, 3), np.uint8)), "PNG") for _ in range(20)]
    write_tar("0.tar", ((f"{i}.png", data) for i, data in enumerate(pictures[:10])))
    cut = write_tar("1.tar", ((f"{i}.png", data) for i, data in enumerate(pictures[10:])))
    with tarfile.open(cut) as tar:
        end = tar.getmembers()[8].offset_data - 7
    os.truncate(cut, end)
    want = {"1.tar": f"truncated: it ends at byte {end:,}: 8 images are left"}
    line = f"1.tar\t{want['1.tar']}\n"
    plain = ["--workers=0", "--device=cpu"]
    cli.main(["inspect", "*.tar", "-o", "seen.json", *plain])
    told = json.loads(Path("seen.json").read_text())
    assert (told["broken"], told["readable"]) == (want, 18)
    assert f"1.tar: {want['1.tar']}\n" in capsys.readouterr().out
    assert "<td>1.tar</td>" in Path("seen.html").read_text()
    cli.main(["pack", "*.tar@repeat=2", "-o", "packed", "--workers=0"])
    assert Path("packed/bad_files.txt").read_text() == line
    tiny = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=4", "--report_html=false", "--cld.groups=2"]
    cli.main(["train", "*.tar", "--run=run", "--epochs=1", *tiny, *plain])
    assert Path("run/bad_files.txt").read_text() == line
    cli.main(["embed", "run", "*.tar", "-o", "f.npy", *plain])
    assert Path("f.bad_files.txt").read_text() == line
    assert len(np.load("f.npy")) == 18
    names = [line.split(",")[0] for line in Path("f.csv").read_text().splitlines()[1:]]
    Path("labels.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)))
    capsys.readouterr()
    cli.main(["evaluate", "run", "*.tar@list=labels.txt", "--test=*.tar@list=labels.txt", "-o", "e.json", *plain])
    assert "1 file is damaged, with images missing" in capsys.readouterr().out
    [record] = json.loads(Path("e.json").read_text())["results"]
    assert record["skipped"] == want


def test_damage_in_the_middle(tmp_path):
    file = write_tar(tmp_path / "x.tar", [(f"{i}.png", flat(i)) for i in range(9)])
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        member = tar.getmembers()[5]
    data[member.offset + 130] ^= 1
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"damaged: no header of a member at byte {member.offset:,}: 5 images"):
        assert len(open_images(file)) == 5


def test_a_broken_member_is_named(pair):
    write_tar(pair / "a-001.tar", [("ü 🙂\n.png", flat(0)[:-9]), ("good.png", flat(1)), ("empty.jpg", b"")])
    images, bad_files = Shards([str(pair / "a-001.tar")], "x"), BadFiles()
    assert len(torch.cat([batch.index for batch in EvalBatches(images, 2, 4, bad_files=bad_files)])) == 1
    assert set(bad_files.reasons) == {"a-001.tar/ü 🙂\n.png", "a-001.tar/empty.jpg"}
    assert "truncated" in bad_files.reasons["a-001.tar/ü 🙂\n.png"]
    bomb = Shards([str(pair / "a-001.tar")], "x", max_pixels=3)
    with pytest.raises(BadImage, match=r"a-001.tar/good.png: the member has 77 bytes, more than 3 pixels can need"):
        bomb[1]


def test_a_shard_that_vanishes_or_shrinks_during_a_run(pair):
    images = open_images(pair)
    assert value(images[0][0]) == 0
    os.truncate(pair / "a-000.tar", 2000)  # already open
    with pytest.raises(BadImage, match=r"a-000.tar/0020.png: truncated: the shard gave 0 of"):
        images[20]
    os.remove(pair / "a-001.tar")
    with pytest.raises(BadImage, match=r"a-001.tar/0023.png: the shard cannot be read: No such file"):
        images[23]


def test_refusals_are_one_line(tmp_path):
    cases = {
        b"": "an empty file",
        b"P" * 5000: "not a tar file",
        b"short": "not a tar file",
        bytes(10240): "at least 2 images, found 0",
        write_tar(tmp_path / "one.tar", [("a.png", flat(1))]).read_bytes(): "at least 2 images, found 1",
    }
    for content, says in cases.items():
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(SourceError, match=says) as caught:
            open_images(tmp_path / "bad.tar")
        assert "bad.tar" in str(caught.value)
        assert "\n" not in str(caught.value)


@given(data=st.binary(max_size=1600), at=st.integers(0, 3000), flips=st.binary(min_size=1, max_size=40))
def test_any_bytes_are_images_or_a_source_error(tmp_path_factory, data, at, flips):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{'n' * 120 * (i == 1)}{i}.png")
            info.size = len(flat(i))
            tar.addfile(info, io.BytesIO(flat(i)))
    damaged = bytearray(stream.getvalue())
    damaged[at : at + len(flips)] = flips
    file = tmp_path_factory.mktemp("any") / "x.tar"
    for content in (data, damaged):
        file.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                images = Shards([str(file)], "x")
            except SourceError:
                continue
        for i in range(len(images)):
            with contextlib.suppress(BadImage):
                assert images[i][0].dtype == torch.uint8
