"""Folders, lists and CIFAR files that the tests write themselves."""

import itertools
import os
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslevel.images.sources import BadImage, Cifar10, Cifar100, Files, Packed, SourceError

COLORS = [(250, 10, 20), (10, 250, 20), (10, 20, 250), (250, 250, 20)]


def write(root, *names):
    """Small PNG files of one color each, whatever their names say."""
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), COLORS[i % len(COLORS)]).save(file, "PNG")


def test_a_folder_is_searched_recursively_and_sorted(tmp_path):
    names = ["b/z.JPG", "b/c/d/y.jpeg", "a.PNG", "w.webp", "v.bmp", "u.tif", "t.TIFF", "s.ppm", "r.pgm", "q.pbm"]
    write(tmp_path, *names, ".hidden.png", ".git/x.png", "b/.cache/y.png", "notes.txt", "png", "movie.mp4")
    images = Files.from_folder(str(tmp_path))
    assert list(images.paths) == sorted(names)
    assert images.labels is None
    assert images.classes is None
    assert images.name == str(tmp_path)
    image, label = images[images.paths.index("b/z.JPG")]
    assert image.shape == (3, 4, 6)
    assert image[:, 0, 0].tolist() == list(COLORS[0])
    assert label == -1


def test_class_folders_give_labels(tmp_path):
    write(tmp_path, "dog/1.png", "cat/deep/2.png", "cat/3.png")
    (tmp_path / "empty").mkdir()
    images = Files.from_folder(str(tmp_path))
    assert list(images.paths) == ["cat/3.png", "cat/deep/2.png", "dog/1.png"]
    assert images.classes == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1]
    assert images.labels.dtype == torch.int64
    assert images[2][1] == 1


@pytest.mark.parametrize("names", [("a/1.png", "b/2.png", "3.png"), ("a/b/1.png", "a/c/2.png"), ("1.png", "2.png")])
def test_other_layouts_give_none(tmp_path, names):
    write(tmp_path, *names)
    assert Files.from_folder(str(tmp_path)).labels is None


def test_odd_names(tmp_path):
    names = [
        "a b.png",
        "ü/ß.png",
        "日本.png",
        "😀.png",
        "new\nline.png",
        "tab\t.png",
        "-rf.png",
        "a%20'\".png",
        "..c.png",
    ]
    names += [os.fsdecode(b"latin\xe9.png")]
    write(tmp_path, *names)
    images = Files.from_folder(str(tmp_path))
    assert list(images.paths) == sorted(set(names) - {"..c.png"})
    for i in range(len(images)):
        assert images[i][0].shape == (3, 4, 6)


def test_links(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    write(outside, "o/1.png", "o/2.png", "3.png")
    write(root, "a/1.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "again").symlink_to(root / "a")
    (root / "linked").symlink_to(outside / "o")
    (root / "l.png").symlink_to(outside / "3.png")
    (root / "nowhere.png").symlink_to(outside / "gone.png")
    images = Files.from_folder(str(root))
    assert list(images.paths) == ["a/1.png", "l.png", "linked/1.png", "linked/2.png", "nowhere.png"]
    assert images[1][0].shape == (3, 4, 6)
    with pytest.raises(BadImage, match="No such file") as caught:
        images[4]
    assert caught.value.path == "nowhere.png"


def test_pipes_and_folders_with_an_image_name_are_left_out(tmp_path):
    write(tmp_path, "a.png", "b.png", "folder.png/c.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert list(Files.from_folder(str(tmp_path)).paths) == ["a.png", "b.png", "folder.png/c.png"]


PARTS = st.sampled_from(["a", "b", "a.png", "b.jpg", ".c.png", "A.TIF", "d e.bmp", "x.txt"])


@given(st.sets(st.lists(PARTS, min_size=1, max_size=4).map("/".join), min_size=1, max_size=12))
def test_listing_agrees_with_os_walk(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("tree")
    for name in names:
        if not any(
            (root / name).is_relative_to(root / other) or (root / other).is_relative_to(root / name)
            for other in names - {name}
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    want = [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.lower().endswith((".png", ".jpg", ".tif", ".bmp"))
    ]
    want = sorted(path for path in want if not any(part.startswith(".") for part in path.split("/")))
    if len(want) < 2:
        with pytest.raises(SourceError, match=r"no image found|needs at least 2 images"):
            Files.from_folder(str(root))
    else:
        assert list(Files.from_folder(str(root)).paths) == want


def test_no_system_call_for_a_single_file(tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i}.jpg").touch()
    calls = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: calls.append(a) or stat(*a, **k))
    assert len(Files.from_folder(str(tmp_path))) == 300
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("names", "says"), [((), "no image found"), (("a.png",), "needs at least 2 images, found only")]
)
def test_a_folder_with_too_little(tmp_path, names, says):
    write(tmp_path, *names)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match=says) as caught:
        Files.from_folder(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_closed_folder_is_named(tmp_path):
    write(tmp_path, "a.png", "b.png", "closed/c.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.warns(UserWarning, match=r"closed.* is left out: Permission denied"):
            assert list(Files.from_folder(str(tmp_path)).paths) == ["a.png", "b.png"]
        with pytest.raises(SourceError, match="Permission denied"):
            Files.from_folder(str(tmp_path / "closed"))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_list_keeps_its_order(tmp_path, monkeypatch):
    write(tmp_path, "b.png", "a.png")
    images = Files.from_list([tmp_path / "b.png", str(tmp_path / "a.png"), tmp_path / "b.png"])
    assert list(images.paths) == [str(tmp_path / name) for name in ("b.png", "a.png", "b.png")]
    assert [tuple(images[i][0][:, 0, 0].tolist()) for i in range(3)] == [COLORS[0], COLORS[1], COLORS[0]]
    monkeypatch.chdir(tmp_path)
    assert Files.from_list(["a.png", "b.png"])[1][0][:, 0, 0].tolist() == list(COLORS[0])
    with pytest.raises(SourceError, match="a list of 1 files: needs at least 2 images"):
        Files.from_list(["a.png"])


def test_a_text_file_lists_files_relative_to_itself(tmp_path):
    write(tmp_path, "sub/b ü.png", "a.png")
    outside = tmp_path / "else"
    write(outside, "c.png")
    text = tmp_path / "sub" / "list.txt"
    text.write_bytes(f"\ufeffb ü.png\r\n../a.png\n\n{outside}/c.png\n".encode())
    images = Files.from_text(str(text))
    assert list(images.paths) == ["b ü.png", "../a.png", f"{outside}/c.png"]
    assert [images[i][0].shape for i in range(3)] == [(3, 4, 6)] * 3
    text.write_text("a.png\n")
    with pytest.raises(SourceError, match="needs at least 2 images, one path a line; it names 1"):
        Files.from_text(str(text))


def test_the_pixel_limit_of_files(tmp_path):
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(BadImage, match="more than 23 pixels"):
        Files(str(tmp_path), ["a.png", "b.png"], max_pixels=23)[0]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 files, 3 labels"):
        Files("x", ["a", "b"], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 images, 3 paths"):
        Packed(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), ["a"] * 3)


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


@pytest.mark.parametrize("start", ["", "./", "photos/", "{root}/photos/"])
def test_a_list_has_the_classes_of_its_files_folders(tmp_path, start):
    """Below the folder that all of them share, wherever that is."""
    text = tmp_path / "list.txt"
    names = ["dog/a/1.png", "cat/2.png", "dog/3.png"]
    text.write_text("\n".join(start.format(root=tmp_path) + name for name in names))
    images = Files.from_text(str(text))
    assert (images.classes, images.labels.tolist()) == (["cat", "dog"], [1, 0, 1])


@pytest.mark.parametrize("names", [["cat/1.png", "2.png"], ["cat/1.png", "cat/2.png"], ["../1.png", "cat/2.png"]])
def test_a_list_without_class_folders_has_no_labels(tmp_path, names):
    text = tmp_path / "list.txt"
    text.write_text("\n".join(names))
    images = Files.from_text(str(text))
    assert (images.labels, images.classes) == (None, None)
