"""Parquet files with images, written by pyarrow and by the datasets library."""

import json
import multiprocessing
import os
import pickle
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from container_samples import flat, value

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers.parquet import Parquet
from crosslevel.utils.errors import BadImage, SourceError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}


def cells(numbers):
    return pa.array([{"bytes": flat(i), "path": f"{i}.png"} for i in numbers], IMAGE)


def write(file, numbers, group=7, features=FEATURES, **columns):
    columns = columns or {"image": cells(numbers), "label": pa.array([i % 3 for i in numbers])}
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=group, compression="none", write_page_checksum=True)
    return file


@pytest.fixture
def folder(tmp_path):
    """Two files of 20 and 13 labelled images in groups of 7."""
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train-0.parquet", range(20))
    write(tmp_path / "rows" / "train-1.parquet", range(20, 33))
    return tmp_path / "rows"


def test_images_labels_paths_and_blocks(folder):
    for source in (folder, f"{folder}/*.parquet", f"{folder}/train-{{0..1}}.parquet"):
        images = open_images(source)
        assert images.paths == [f"train-{int(i >= 20)}.parquet/{i % 20}" for i in range(33)]
        assert images.paths[-2:] == ["train-1.parquet/11", "train-1.parquet/12"]
        assert images.labels.tolist() == [i % 3 for i in range(33)]
        assert images.classes == ["cat", "dog", "emu"]
        assert images.blocks == [range(7), range(7, 14), range(14, 20), range(20, 27), range(27, 33)]
        assert [value(image) for image, _ in images] == list(range(33))
        assert images[-33][1] == 0
    with pytest.raises(IndexError):
        images[33]


def test_files_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'crosslevel[hub]'")
    features = datasets.Features({"kind": datasets.ClassLabel(names=["b", "a"]), "photo": datasets.Image()})
    rows = {"kind": [0, 1, 1], "photo": [{"bytes": flat(i), "path": None} for i in range(3)]}
    with open(tmp_path / "x.parquet", "wb") as file:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    images = open_images(tmp_path / "x.parquet")
    assert [value(image) for image, _ in images] == [0, 1, 2]
    assert images.labels.tolist() == [0, 1, 1]
    assert images.classes == ["b", "a"]


def test_which_column(tmp_path):
    plain = pa.array([flat(i) for i in range(4)])
    other = pa.array([flat(i + 100) for i in range(4)], pa.large_binary())
    words = pa.array(["dog", "cat", "dog", "ant"])

    def opened(options="", **columns):
        return open_images(f"{write(tmp_path / 'a, b.parquet', range(4), features=None, **columns)}{options}")

    assert value(opened(photo=plain, n=pa.array(range(4)))[2][0]) == 2
    assert value(opened(",column=mask", photo=plain, mask=other)[2][0]) == 102
    assert value(opened(image=plain, mask=other)[3][0]) == 3
    assert value(opened(picture=cells(range(4)), audio=other)[3][0]) == 3  # the struct, not the bytes
    assert value(opened(**{"a.b": plain})[1][0]) == 1
    named = opened(",column=image,label=kind", image=plain, kind=words.dictionary_encode())
    assert named.classes == ["ant", "cat", "dog"]
    assert named.labels.tolist() == [2, 1, 2, 0]
    assert opened(image=plain, label=pa.array([2, 0, 1, 5], pa.uint8())).classes == ["0", "1", "2", "3", "4", "5"]
    assert opened(image=plain, label=pa.array([0.5] * 4)).labels is None
    assert opened(image=plain, label=pa.array([-1] * 4)).labels is None
    with pytest.warns(UserWarning, match="labels are left out: 1 of 4 images have none"):
        assert opened(image=plain, label=pa.array(["a", "b", None, "a"])).labels is None


@pytest.mark.parametrize(
    ("options", "columns", "says"),
    [
        ("", {"text": pa.array(["a"]), "n": pa.array([1])}, "no images in text, n: name one that does"),
        ("", {"a": pa.array([b"a"]), "b": pa.array([b"a"])}, "several columns hold images: a, b: name one"),
        (",column=photo", {"image": pa.array([b"a"]), "n": pa.array([1])}, "no column 'photo'; it has image, n"),
        (",column=n", {"n": pa.array([1])}, "column=n is int64: it needs binary"),
        (",label=c", {"image": pa.array([b"a"])}, "no column 'c'; it has image"),
        (",label=image", {"image": pa.array([b"a"])}, "label=image is binary: it needs whole numbers"),
        (",colum=n", {"image": pa.array([b"a"])}, "no key 'colum': did you mean column=n"),
        ("", {"image": pa.array([b"a"])}, "at least 2 images, has 1"),
    ],
)
def test_refusals_are_one_line(tmp_path, options, columns, says):
    write(tmp_path / "x.parquet", [0], features=None, **columns)
    with pytest.raises(SourceError) as caught:
        open_images(f"{tmp_path}/x.parquet{options}")
    assert says in str(caught.value)
    assert "x.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_or_of_another_kind(folder):
    whole = (folder / "train-1.parquet").read_bytes()
    for content in (whole[:-3], whole[: len(whole) // 2], b"", b"no Parquet", whole[:-8] + b"\xff" * 4 + b"PAR1"):
        (folder / "train-1.parquet").write_bytes(content)
        with pytest.raises(SourceError, match=r"train-1.parquet: not a Parquet file, or cut off") as caught:
            open_images(folder / "train-1.parquet")
        assert "\n" not in str(caught.value)
    write(folder / "train-1.parquet", range(3), photo=cells(range(3)))
    with pytest.raises(SourceError, match=r"train-1.parquet: no column 'image'; it has photo"):
        open_images(folder)


def test_a_damaged_row_group_costs_its_images_alone(folder):
    file = folder / "train-0.parquet"
    column = pq.read_metadata(file).row_group(1).column(0)
    assert column.path_in_schema == "image.bytes"
    data = bytearray(file.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    data[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    file.write_bytes(data)
    images, bad_files = open_images(folder), BadFiles()
    batches = [batch.index for batch in EvalBatches(images, 4, 4, bad_files=bad_files)]
    assert torch.cat(batches).tolist() == [*range(7), *range(14, 33)]
    assert set(bad_files.reasons) == {f"train-0.parquet/{i}" for i in range(7, 14)}
    assert "row group 1 of its file cannot be read" in bad_files.reasons["train-0.parquet/7"]


def test_bad_rows(tmp_path):
    rows = [flat(0), None, b"", flat(3)[:-9], b"text", flat(5)]
    kinds = {
        "plain": pa.array(rows),
        "struct": pa.array([None if row is None else {"bytes": row} for row in rows], IMAGE),
    }
    for kind, column in kinds.items():
        images, bad_files = open_images(write(tmp_path / f"{kind} 🙂\n.parquet", [], image=column)), BadFiles()
        assert torch.cat([batch.index for batch in EvalBatches(images, 2, 4, bad_files=bad_files)]).tolist() == [0, 5]
        assert bad_files.reasons[f"{kind} 🙂\n.parquet/1"] == "no bytes of an image in this row"
        assert len(bad_files) == 4
    with pytest.raises(BadImage, match="69 bytes, more than 3 pixels can need"):
        Parquet(images.files, "x", max_pixels=3)[0]


def test_each_group_is_read_once_block_by_block(folder, monkeypatch):
    images = Parquet([str(file) for file in sorted(folder.iterdir())], "x", memory=1)
    read, real = [], Parquet._read
    monkeypatch.setattr(Parquet, "_read", lambda self, group: read.append(group) or real(self, group))
    for block in (images.blocks[k] for k in (3, 0, 4, 2, 1)):
        assert [value(images[i][0]) for i in reversed(block)] == list(reversed(block))
    assert read == [3, 0, 4, 2, 1]
    assert len(images._cache._groups) == 1  # more than the memory, but one always stays
    wide = Parquet(images.files, "x", memory=2 * 7 * 100)
    read.clear()
    for i in (0, 7, 1, 8, 14, 2, 0, 7):
        wide[i]
    assert read == [0, 1, 2, 0, 1]  # the one that was used last longest ago goes


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_read_every_image_once_an_epoch(folder, workers):
    write(folder / "train-1.parquet", range(20, 32))
    images = open_images(folder)
    assert value(images[0][0]) == 0  # workers begin with what this process has read
    seen, values = [], []
    for rank in range(2):
        batches = TrainBatches(images, 8, seed=3, bad_files=BadFiles(), resize=4, workers=workers, rank=rank, world=2)
        for batch in batches:
            seen += batch.index.tolist()
            values += batch.images[:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(32))
    assert values == seen


def test_a_fork_does_not_wait_for_a_lock_of_its_parent(folder):
    images = open_images(folder)
    assert value(images[0][0]) == 0
    with images._cache._lock:
        child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(value(images[9][0])))
        child.start()
        child.join(20)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 9


def test_many_threads_and_a_pickled_copy(folder):
    files = [str(file) for file in sorted(folder.iterdir())]
    images = pickle.loads(pickle.dumps(Parquet(files, "x", memory=1)))
    wrong = []

    def look(seed):
        for i in torch.randperm(33, generator=torch.Generator().manual_seed(seed)).tolist():
            if value(images[i][0]) != i:
                wrong.append(i)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_identity_follows_the_files(folder, tmp_path):
    first = open_images(folder).identity()
    assert open_images(folder).identity() == first
    os.rename(folder, tmp_path / "moved")
    moved = tmp_path / "moved"
    assert open_images(moved).identity() == first
    images = open_images(moved)
    images[0]
    write(moved / "train-0.parquet", range(1, 21))
    assert open_images(moved).identity() != first
    with pytest.raises(BadImage, match="changed since this run"):
        images[7]
