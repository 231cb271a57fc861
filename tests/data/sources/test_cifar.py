"""CIFAR files that the tests write themselves, in the official format."""

import itertools
import os
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest
from table_samples import write_encoder

import crosslevel
from crosslevel.data.sources.cifar import Cifar10, Cifar100
from crosslevel.utils.errors import SourceError


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote, as the official files are: one kind of string, of bytes."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch[bytes] = dispatch[str] = save_string


def official(file, array, **lists):
    """A CIFAR file in the documented format."""
    file.parent.mkdir(exist_ok=True)
    with open(file, "wb") as stream:
        Python2Pickler(stream, protocol=2).dump({"data": array, **lists})


@pytest.fixture
def cifar(tmp_path):
    """Both data sets, 7 images a file; a dictionary of what was written beside the folder."""
    generator = np.random.default_rng(0)
    wrote = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        wrote[name] = generator.integers(0, 256, (7, 3072), np.uint8), generator.integers(0, 10, 7).tolist()
        official(tmp_path / "cifar-10-batches-py" / name, wrote[name][0], labels=wrote[name][1])
    names = [f"class {i}".encode() for i in range(10)]
    official(tmp_path / "cifar-10-batches-py" / "batches.meta", None, label_names=names)
    for name in ("train", "test"):
        fine, coarse = generator.integers(0, 100, 7).tolist(), generator.integers(0, 20, 7).tolist()
        wrote[name] = generator.integers(0, 256, (7, 3072), np.uint8), fine, coarse
        official(tmp_path / "cifar-100-python" / name, wrote[name][0], fine_labels=fine, coarse_labels=coarse)
    meta = {f"{k}_label_names": [f"{k} {i}".encode() for i in range(n)] for k, n in (("fine", 100), ("coarse", 20))}
    official(tmp_path / "cifar-100-python" / "meta", None, **meta)
    return tmp_path, wrote


def test_cifar10(cifar):
    root, wrote = cifar
    train = Cifar10("train", data_root=str(root))
    want = np.concatenate([wrote[f"data_batch_{i}"][0] for i in range(1, 6)]).reshape(35, 3, 32, 32)
    np.testing.assert_array_equal(train.data.numpy(), want)
    assert train.labels.tolist() == list(itertools.chain(*(wrote[f"data_batch_{i}"][1] for i in range(1, 6))))
    assert train.classes == [f"class {i}" for i in range(10)]
    assert len(set(train.paths)) == 35
    test = Cifar10("test", data_root=str(root / "cifar-10-batches-py"))
    assert test.labels.tolist() == wrote["test_batch"][1]
    # The official layout is 1,024 red, then green, then blue values, row by row.
    assert test[3][0][1, 2, 5] == wrote["test_batch"][0][3, 1024 + 2 * 32 + 5]


@pytest.mark.parametrize(("labels", "column", "count"), [("fine", 1, 100), ("coarse", 2, 20)])
def test_cifar100(cifar, labels, column, count):
    root, wrote = cifar
    for split in ("train", "test"):
        images = Cifar100(split, labels, data_root=str(root))
        np.testing.assert_array_equal(images.data.numpy(), wrote[split][0].reshape(7, 3, 32, 32))
        assert images.labels.tolist() == wrote[split][column]
        assert images.classes == [f"{labels} {i}" for i in range(count)]


def test_cifar_equals_torchvision(cifar, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    theirs = CIFAR10(str(cifar[0]), train=True)
    ours = Cifar10(data_root=str(cifar[0]))
    np.testing.assert_array_equal(ours.data.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.labels.tolist() == theirs.targets


def test_missing_cifar_says_what_to_put_where(tmp_path):
    with pytest.raises(SourceError, match=r"--data-root is missing.*cifar-10-batches-py.*cifar-10-python.tar.gz"):
        Cifar10()
    with pytest.raises(
        SourceError, match=r"cifar-100-python is not there: unpack https://.*cifar-100-python.tar.gz in"
    ):
        Cifar100(data_root=str(tmp_path))
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(SourceError, match=r"still packed: tar -xzf cifar-10-python\.tar\.gz"):
        Cifar10(data_root=str(tmp_path))


def test_damaged_cifar(cifar):
    root, _ = cifar
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    whole = batch.read_bytes()
    batch.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"data_batch_3: damaged .*unpack the official archive again"):
        Cifar10(data_root=str(root))
    official(batch, np.zeros((7, 3000), np.uint8), labels=[0] * 7)
    with pytest.raises(SourceError, match="3,072 columns"):
        Cifar10(data_root=str(root))
    official(batch, np.zeros((7, 3072), np.uint8), labels=[0] * 6)
    with pytest.raises(SourceError, match="no 'labels', one for each of its 7 images"):
        Cifar10(data_root=str(root))
    batch.unlink()
    with pytest.raises(SourceError, match="data_batch_3: No such file"):
        Cifar10(data_root=str(root))
    with pytest.raises(SourceError, match="no split 'valid': use train or test"):
        Cifar10("valid", data_root=str(root))


def test_search_explore_and_curate_take_the_official_files(cifar, tmp_path, capsys):
    """By --data_root beside --images, or by the settings of a run that was trained on them."""
    run, root = write_encoder(tmp_path / "run"), str(cifar[0])
    (run / "config.yaml").write_text(f"images: cifar10:test\ndata_root: {root}\n")
    given = {"images": "cifar10:test", "data_root": root, "device": "cpu"}
    found = crosslevel.search(str(run), "test/00003", k=9, workers=0, **given)
    assert sorted(match["path"] for match in found[0]["matches"]) == [f"test/{i:05}" for i in range(7) if i != 3]
    assert crosslevel.search(str(run), "test/00003", k=9, workers=0, device="cpu") == found
    assert f"the features are those in {run / 'collection.parquet'}".replace(" ", "") in "".join(
        capsys.readouterr().out.split()
    )
    crosslevel.explore(str(run), export=str(tmp_path / "page"), quiet=True, **given)
    assert (tmp_path / "page" / "index.html").is_file()
    kept = crosslevel.curate(str(run), n=3, outliers="keep", output=str(tmp_path / "few.txt"), **given)
    assert len(kept.paths) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert f"--data-root {root}".replace(" ", "") in said.replace(" ", "")


class _Evil:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_rewritten_by_python_3_are_read_too(cifar, protocol):
    root, wrote = cifar
    data, labels = wrote["test_batch"]
    batch = root / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=protocol))
    np.testing.assert_array_equal(Cifar10("test", data_root=str(root)).data.flatten(1).numpy(), data)


def test_a_cifar_file_cannot_run_code(cifar):
    root, _ = cifar
    flag = root / "was run"
    batch = root / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({b"data": _Evil(str(flag))}, protocol=2))
    with pytest.raises(SourceError, match=r"asks for posix\.mkdir"):
        Cifar10("test", data_root=str(root))
    assert not flag.exists()
