"""Data sets of the `datasets` library: saved ones, local repositories, and a hub that cannot be reached."""

import os
import pickle
import shutil
import sys
import warnings

import pytest
import torch
from container_samples import flat, value

from crosslevel.data import pack
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.open import open_images
from crosslevel.utils.errors import BadImage, SourceError

datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'crosslevel[hub]'")


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    """No progress bars, and what the library prepares goes into a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def rows(numbers, names=("cat", "dog"), **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    data = {"image": [{"bytes": flat(i), "path": None} for i in numbers], "label": [i % len(names) for i in numbers]}
    found = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    for key, (cells, feature) in columns.items():
        found = found.add_column(key, cells).cast_column(key, feature)
    return found


@pytest.fixture
def saved(tmp_path):
    """Two splits, as save_to_disk writes them."""
    splits = {"train": rows(range(20)), "test": rows(range(20, 27))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "my set: a@b")
    return tmp_path / "my set: a@b"


def test_a_saved_data_set(saved):
    images = open_images(f"hf://{saved}")
    assert [value(image) for image, _ in images] == list(range(20))
    assert images.labels.tolist() == [0, 1] * 10
    assert images.classes == ["cat", "dog"]
    assert images.paths[3] == "train/3"
    test = open_images(f"hf://{saved}:test")
    assert [value(image) for image, _ in pickle.loads(pickle.dumps(test))] == list(range(20, 27))
    assert test.paths[-1] == "test/6"
    assert test.name == f"hf://{saved}:test"
    one = open_images(f"hf://{saved}/test")
    assert len(one) == 7


def test_a_local_repository_of_files(tmp_path):
    for split, numbers in {"train": range(6), "validation": range(6, 10)}.items():
        rows(numbers).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert len(open_images(f"hf://{tmp_path}")) == 6
    images = open_images(f"hf://{tmp_path}:validation")
    assert [value(image) for image, _ in images] == [6, 7, 8, 9]
    assert len(open_images(f"hf://{tmp_path}:train[1:5]")) == 4
    with pytest.raises(SourceError, match='Unknown split "valid"'):
        open_images(f"hf://{tmp_path}:valid")


def test_identity_is_that_of_the_rows(saved, tmp_path):
    first = open_images(f"hf://{saved}").identity()
    assert open_images(f"hf://{saved}:train").identity() == first
    assert open_images(f"hf://{saved}:test").identity() != first
    datasets.DatasetDict({"train": rows(range(1, 21))}).save_to_disk(tmp_path / "other")
    assert open_images(f"hf://{tmp_path / 'other'}").identity() != first


def later(file):
    """Let ``file`` look as if it had been written again, in the same length."""
    os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1))


def told(packed):
    """What is said of changes when a pack is opened."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_images(packed)
    return [str(warning.message) for warning in said]


def write_saved(folder):
    datasets.DatasetDict({"train": rows(range(6)), "test": rows(range(6, 9))}).save_to_disk(folder)


def write_tables(folder):
    folder.mkdir()
    rows(range(6)).to_parquet(folder / "train-00000-of-00001.parquet")


def write_images(folder):
    for i in range(6):
        file = folder / "train" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(flat(i))


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (write_saved, lambda folder: later(next((folder / "train").glob("*.arrow")))),
        (write_saved, lambda folder: rows(range(1, 7)).save_to_disk(folder / "train")),
        (write_tables, lambda folder: rows(range(1, 7)).to_parquet(folder / "train-00000-of-00001.parquet")),
        (write_tables, lambda folder: rows(range(9)).to_parquet(folder / "train-00001-of-00002.parquet")),
        (write_images, lambda folder: (folder / "train" / "b" / "1.png").unlink()),
    ],
)
def test_a_changed_data_set_is_told_when_its_pack_is_opened(tmp_path, write, change):
    write(tmp_path / "set")
    packed = str(pack.pack(f"hf://{tmp_path}/set", str(tmp_path / "p"), workers=0))
    assert told(packed) == []
    open_images(f"hf://{tmp_path}/set")  # looking is no change
    if write is write_saved:
        later(next((tmp_path / "set" / "test").glob("*.arrow")))  # nor is that of another split
    assert told(packed) == []
    change(tmp_path / "set")
    (found,) = told(packed)
    assert found == f"{packed}: hf://{tmp_path}/set has changed since it was packed: crosslevel pack again"
    assert len(open_images(str(pack.pack(f"hf://{tmp_path}/set", packed, workers=0)))) >= 5
    assert told(packed) == []


@pytest.mark.parametrize(("address", "noticed"), [("hf://owner/name", True), ("hf://owner/name@v1.0", False)])
def test_another_revision_that_was_loaded_since_is_a_change(tmp_path, monkeypatch, address, noticed):
    """The library keeps revisions side by side, here as it does for files."""
    write_tables(tmp_path / "set")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load(str(tmp_path / "set")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    packed = str(pack.pack(address, str(tmp_path / "p"), workers=0))
    open_images(address)
    assert told(packed) == []
    rows(range(1, 7)).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    open_images(address)
    assert bool(told(packed)) is noticed
    shutil.rmtree(tmp_path / "prepared")  # a cache may be emptied at any time
    assert told(packed) == []


def test_damage_is_found_by_this_decoder(tmp_path):
    cells = [{"bytes": data, "path": None} for data in (flat(0), flat(1)[:-9], b"", flat(3))]
    cells.append(None)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path / "set")
    images, bad_files = open_images(f"hf://{tmp_path}/set"), BadFiles()
    assert images.labels is None
    assert torch.cat([batch.index for batch in EvalBatches(images, 3, 4, bad_files=bad_files)]).tolist() == [0, 3]
    assert "truncated" in bad_files.reasons["train/1"]
    assert bad_files.reasons["train/2"] == "empty file"
    assert bad_files.reasons["train/4"] == "no image in this row"
    assert len(bad_files) == 3
    assert value(images[-2][0]) == 3
    with pytest.raises(IndexError):
        images[5]


def test_images_that_stay_in_files_of_their_own(tmp_path):
    for i in range(6):
        file = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(flat(i))
    images = open_images(f"hf://{tmp_path}")
    assert images.classes == ["a", "b"]
    assert [value(image) for image, _ in images] == [0, 2, 4, 1, 3, 5]
    file.unlink()
    with pytest.raises(BadImage, match="train/5: cannot be opened: No such file"):
        images[-1]


def test_which_column(tmp_path):
    masks = [{"bytes": flat(i + 100), "path": None} for i in range(4)]
    both = rows(range(4)).rename_column("image", "a").add_column("b", masks).cast_column("b", datasets.Image())
    both = both.add_column("blob", [flat(9)] * 4).add_column("fine", [3, 1, 2, 0]).add_column("text", list("abcd"))
    both.save_to_disk(tmp_path / "set")
    source = f"hf://{tmp_path}/set"
    assert value(open_images(f"{source},column=b")[1][0]) == 101
    assert value(open_images(f"{source},column=blob")[1][0]) == 9  # plain bytes
    fine = open_images(f"{source},column=a,label=fine")
    assert fine.labels.tolist() == [3, 1, 2, 0]
    assert fine.classes == ["0", "1", "2", "3"]
    assert fine.identity() != open_images(f"{source},column=a").identity()
    for options, says in {
        "": "several columns hold images: a, b: name one: column=NAME",
        ",column=c": "no column 'c'; it has a, label, b, blob, fine, text",
        ",column=fine": "column=fine holds no images",
        ",column=a,label=text": "label=text is .*it needs whole numbers",
        ",columns=a": "no key 'columns': did you mean column=a",
    }.items():
        with pytest.raises(SourceError, match=says) as caught:
            open_images(f"{source}{options}")
        assert "\n" not in str(caught.value)
    rows(range(3)).remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(SourceError, match="no column of images among label"):
        open_images(f"hf://{tmp_path}/none")


def test_workers_and_ranks_read_every_row_once(saved):
    images = open_images(f"hf://{saved}")
    seen, values = [], []
    for rank in range(2):
        for batch in TrainBatches(images, 5, seed=0, bad_files=BadFiles(), resize=4, workers=2, rank=rank, world=2):
            seen += batch.index.tolist()
            values += batch.images[:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(20))
    assert values == seen


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf://mnist", ("mnist", None, None, None)),
        ("hf://owner/name", ("owner/name", None, None, None)),
        ("hf://owner/name:test", ("owner/name", None, None, "test")),
        ("hf://owner/name@refs/convert/parquet:train[:9]", ("owner/name", None, "refs/convert/parquet", "train[:9]")),
        ("hf://owner/name/small@v1.0:test", ("owner/name", "small", "v1.0", "test")),
    ],
)
def test_what_is_asked_of_the_library(source, asked, monkeypatch):
    seen = []

    def load(path, name=None, *, revision=None, split=None):
        seen.append((path, name, revision, split))
        return rows(range(3)) if split else datasets.DatasetDict({"validation": rows(range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_images(source)) == 3
    assert seen == [asked]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), TimeoutError(), OSError("Network down")])
def test_a_hub_that_cannot_be_reached_is_one_line(error, monkeypatch):
    def load(*_, **__):
        try:
            raise error
        except OSError as cause:
            raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore") from cause

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError) as caught:
        open_images("hf://owner/name")
    assert str(caught.value).startswith("hf://owner/name: the hub cannot be reached: check the network")
    assert "\n" not in str(caught.value)


def test_other_refusals(tmp_path, monkeypatch):
    rows(range(1)).save_to_disk(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    for source, says in {
        f"hf://{tmp_path}/one": "at least 2 images, has 1",
        f"hf://{tmp_path}/one:test": "no split 'test'|at least 2",
        f"hf://{tmp_path}/empty": "any data|no .*data",
        f"hf://{tmp_path}/nothing": "any data",
        "hf://a/b/c/d": "write it as hf://owner/name",
        "hf://": "write it as hf://owner/name",
    }.items():
        with pytest.raises(SourceError, match=says) as caught:
            open_images(source)
        assert "\n" not in str(caught.value)

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'crosslevel\[hub\]'"):
        open_images("hf://owner/name")
