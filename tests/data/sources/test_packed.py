"""Reading packs: the same pixels as decoding, shared by processes, and what is said of damaged ones."""

import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from container_samples import flat, labelled, write_tar
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data import pack as verb
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.pack_writer import Sizes
from crosslevel.data.sources.packed import Pack, SquarePack
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import SourceError


def write(root, count=12, square=False, seed=0):
    draws = np.random.default_rng(seed)
    for n in range(count):
        file = root / "ab"[n % 2] / f"{n:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (40, 40) if square else (30 + 3 * n, 70 - 2 * n)
        Image.fromarray(draws.integers(0, 256, (*shape, 3), np.uint8)).save(file)
    return root


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos")


SMALL = Sizes(part=1, shard=8000, at_once=1)


def packed(source, folder, size=32, **options):
    return open_images(verb.pack(str(source), str(folder), size, workers=0, **options))


def expected(image, size):
    return image if min(image.shape[1:]) <= size else tvf.resize(image, [size], antialias=True)


@pytest.mark.parametrize("size", [32, 50])
def test_images_are_those_of_the_source_resized_and_never_enlarged(photos, tmp_path, size):
    source, pack = open_images(photos), packed(photos, tmp_path / "p", size)
    assert isinstance(pack, Pack)
    assert len(pack) == 12
    for i in range(12):
        assert torch.equal(pack[i][0], expected(source[i][0], size))
        assert pack[i][1] == int(source.labels[i])
    assert torch.equal(pack[-1][0], pack[11][0])
    with pytest.raises(IndexError):
        pack[12]
    assert (pack.paths, pack.classes) == (source.paths, source.classes)
    assert torch.equal(pack.labels, source.labels)
    assert pack.tracks is None
    assert pack.name == str(tmp_path / "p")


def test_one_square_size_is_one_tensor(tmp_path):
    source = open_images(write(tmp_path / "photos", square=True))
    pack = packed(tmp_path / "photos", tmp_path / "p")
    assert isinstance(pack, InMemoryImages)
    want = torch.stack([expected(source[i][0], 32) for i in range(12)])
    assert torch.equal(pack.data, want)
    assert torch.equal(pack.batch(torch.tensor([3, 0, 3])), want[[3, 0, 3]])
    assert [pack[i][1] for i in range(12)] == source.labels.tolist()
    batches = TrainBatches(pack, 4, seed=0, bad_files=BadFiles())
    for batch in batches:
        assert torch.equal(batch.images, want[batch.index])
    views, plain = Views("cifar", 16), InMemoryImages(want, pack.paths)
    index = torch.arange(12)
    drawn = [views(p.batch(index), torch.Generator().manual_seed(1)) for p in (pack, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_a_data_set_by_name_keeps_its_tracks(tmp_path):
    name = "turntable:train,classes=3,objects=30,frames=2,size=16,test_objects=3,test_frames=2"
    source, pack = open_images(name), packed(name, tmp_path / "p")
    assert torch.equal(pack.data, source.data)
    assert torch.equal(pack.tracks, source.tracks)
    assert torch.equal(pack.labels, source.labels)
    assert pack.classes == source.classes


def test_many_shards_and_parts(photos, tmp_path):
    whole = packed(photos, tmp_path / "one")
    many = packed(photos, tmp_path / "many", sizes=SMALL)
    assert len(list((tmp_path / "many").glob("*.bin"))) > 3
    assert all(torch.equal(whole[i][0], many[i][0]) for i in range(12))
    assert whole.identity() == many.identity()


def test_square_images_stay_in_one_shard(tmp_path):
    source = write(tmp_path / "photos", square=True)
    assert isinstance(packed(source, tmp_path / "p", sizes=SMALL), SquarePack)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_pack_are_those_of_its_images(photos, tmp_path, workers):
    pack = packed(photos, tmp_path / "p")
    crops = Views("mocov2", 16).crops
    got = list(TrainBatches(pack, 5, seed=3, bad_files=BadFiles(), crops=crops, workers=workers))
    plain = [pack[i][0].clone(memory_format=torch.contiguous_format) for i in range(12)]

    class Plain(Pack):
        def __init__(self):
            self.name, self.paths = "plain", pack.paths

        def __getitem__(self, i):
            return plain[i], int(pack.labels[i])

    want = list(TrainBatches(Plain(), 5, seed=3, bad_files=BadFiles(), crops=crops))
    assert len(got) == len(want) == 2
    for one, other in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    evaluated = torch.cat([batch.images for batch in EvalBatches(pack, 5, 16, bad_files=BadFiles(), workers=workers)])
    assert evaluated.shape == (12, 3, 16, 16)


@pytest.mark.parametrize("square", [False, True])
def test_another_process_opens_the_files_itself(tmp_path, square):
    pack = packed(write(tmp_path / "photos", square=square), tmp_path / "p")
    sent = pickle.dumps(pack)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent)[5][0], pack[5][0])


def test_changes_in_memory_never_reach_the_files(photos, tmp_path):
    before = packed(photos, tmp_path / "p")[0][0].clone()
    open_images(tmp_path / "p")[0][0].zero_()
    assert torch.equal(open_images(tmp_path / "p")[0][0], before)


def test_identity_is_of_content_and_not_of_place(photos, tmp_path):
    first = packed(photos, tmp_path / "p").identity()
    shutil.copytree(tmp_path / "p", tmp_path / "q")
    assert open_images(tmp_path / "q").identity() == first
    assert packed(photos, tmp_path / "r", 30).identity() != first


def test_a_change_of_the_source_is_told_when_the_pack_is_opened(photos, tmp_path):
    packed(photos, tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path / "p")
    (photos / "a" / "00.png").rename(photos / "a" / "99.png")
    with pytest.warns(UserWarning, match="photos has changed since it was packed: crosslevel pack again") as told:
        open_images(tmp_path / "p")
    assert len(told) == 1
    photos.rename(tmp_path / "gone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path / "p")


def later(file):
    """Let ``file`` look as if it had been written again, in the same length."""
    os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1))


def shorter(file):
    """Cut off a byte, unseen by the time."""
    found = os.stat(file)
    os.truncate(file, found.st_size - 1)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def shards(folder):
    for k in range(2):
        write_tar(folder / f"{k}.tar", labelled(range(5 * k, 5 * k + 5)))


def tables(folder):
    for k in range(2):
        pq.write_table(pa.table({"image": [flat(i) for i in range(5)]}), folder / f"{k}.parquet")


def films(folder):
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'crosslevel[video]'")
    for k in range(2):
        with av.open(str(folder / f"{k}.avi"), "w") as target:
            stream = target.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuvj420p"
            for i in range(3):
                frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * i, np.uint8), format="rgb24")
                target.mux(stream.encode(frame))
            target.mux(stream.encode())


@pytest.mark.parametrize("change", [later, shorter, os.unlink])
@pytest.mark.parametrize("suffix", ["", "@repeat=2"])
@pytest.mark.parametrize(("make", "kind"), [(shards, "tar"), (tables, "parquet"), (films, "avi")])
def test_a_change_of_a_container_is_told_when_the_pack_is_opened(tmp_path, make, kind, suffix, change):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(f"{tmp_path}/data/*.{kind}{suffix}", tmp_path / "p")
        (tmp_path / "data" / "other").touch()
        open_images(tmp_path / "p")
    change(tmp_path / "data" / f"1.{kind}")
    with pytest.warns(UserWarning, match=r"p: .*data.* has changed since it was packed: crosslevel pack again") as told:
        open_images(tmp_path / "p")
    assert len(told) == 1
    shutil.rmtree(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path / "p")


@pytest.mark.parametrize(("make", "kind"), [(shards, "tar"), (tables, "parquet"), (films, "avi")])
def test_a_container_that_comes_into_a_folder_is_a_change(tmp_path, make, kind):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    packed(tmp_path / "data", tmp_path / "p")
    shutil.copyfile(tmp_path / "data" / f"1.{kind}", tmp_path / "data" / f"2.{kind}")
    with pytest.warns(UserWarning, match="data has changed since it was packed: crosslevel pack again"):
        open_images(tmp_path / "p")


def cut_shard(folder):
    os.truncate(folder / "00000.bin", 1000)


def lose_shard(folder):
    (folder / "00000.bin").unlink()


def cut_index(folder):
    os.truncate(folder / "index.safetensors", 50)


def lose_index(folder):
    (folder / "index.safetensors").unlink()


def cut_about(folder):
    (folder / "pack.json").write_text('{"version": 1,')


@pytest.mark.parametrize("damage", [cut_shard, lose_shard, cut_index, lose_index, cut_about])
def test_a_damaged_pack_is_refused_in_one_line(photos, tmp_path, damage):
    packed(photos, tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(SourceError, match=r"this pack is damaged .*: delete it and pack again") as caught:
        open_images(tmp_path / "p")
    assert str(tmp_path / "p") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused(photos, tmp_path):
    packed(photos, tmp_path / "p")
    about = json.loads((tmp_path / "p" / "pack.json").read_text())
    (tmp_path / "p" / "pack.json").write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(SourceError, match="a pack of version 99, this is 1: pack again"):
        open_images(tmp_path / "p")
