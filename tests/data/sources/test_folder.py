"""The list of a folder's files: right, made once, and made anew when a folder changes."""

import os
import shutil

import pytest
import torch
from PIL import Image

from crosslevel.data.index_cache import Paths, cache_folder
from crosslevel.data.sources.folder import Files
from crosslevel.data.sources.labels import below
from crosslevel.utils.errors import SourceError

LONG_AGO = 1_600_000_000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))


def age(root):
    """Every folder changed long ago: a list of folders that have just changed is not trusted."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def write(root, count, folders=4):
    for n in range(count):
        file = root / f"f{n % folders}" / f"{n:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    age(root)
    return root


@pytest.fixture
def scanned(monkeypatch):
    """The folders of photographs that are listed."""
    calls, scandir = [], os.scandir

    def noted(path):
        if "photos" in str(path):  # and not the cache, where what killed writers left is looked for
            calls.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    return calls


def same(one, other):
    assert one.paths == other.paths
    assert one.classes == other.classes
    assert torch.equal(one.labels, other.labels)
    assert one.labels.dtype == other.labels.dtype == torch.int64


def test_a_second_time_only_the_folders_are_looked_at(tmp_path, cache, scanned, monkeypatch):
    root = write(tmp_path / "photos", 5000, folders=25)
    scanned.clear()
    first = Files.from_folder(str(root))
    assert len(scanned) == 26
    looked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: looked.append(str(path)) or stat(path, *a, **k))
    again = Files.from_folder(str(root))
    assert len(scanned) == 26
    assert len([path for path in looked if path.startswith(str(root))]) == 26
    same(first, again)
    assert isinstance(again.paths, Paths)
    assert list(again.paths) == sorted(f"f{n % 25}/{n:05}.jpg" for n in range(5000))
    assert [again.classes[label] for label in again.labels.tolist()] == [p.split("/")[0] for p in again.paths]
    assert again.identity() == first.identity()


def added(root):
    (root / "f1" / "new.jpg").touch()


def removed(root):
    (root / "f0" / "00000.jpg").unlink()


def renamed(root):
    (root / "f2" / "00002.jpg").rename(root / "f2" / "other.jpg")


def moved(root):
    (root / "f2" / "00002.jpg").rename(root / "f3" / "00002.jpg")


def a_new_class(root):
    (root / "f9").mkdir()
    (root / "f9" / "new.jpg").touch()


def a_class_less(root):
    shutil.rmtree(root / "f3")


def a_deep_file(root):
    (root / "f1" / "below" / "deeper").mkdir(parents=True)
    (root / "f1" / "below" / "deeper" / "new.jpg").touch()


@pytest.mark.parametrize("change", [added, removed, renamed, moved, a_new_class, a_class_less, a_deep_file])
def test_what_comes_goes_or_is_renamed_is_noticed(tmp_path, cache, change):
    root = write(tmp_path / "photos", 40)
    before = Files.from_folder(str(root))
    assert before.watch.holds()
    change(root)
    assert not before.watch.holds()
    got = Files.from_folder(str(root))
    shutil.rmtree(cache_folder())
    same(got, Files.from_folder(str(root)))
    assert got.paths != before.paths


def test_a_folder_that_has_just_changed_is_listed_again(tmp_path, cache, scanned):
    """Within one tick of the file system's clock a second change leaves the same time."""
    root = write(tmp_path / "photos", 8)
    scanned.clear()
    before = root.stat()
    os.utime(root / "f1")
    fresh = (root / "f1").stat().st_mtime_ns
    assert len(Files.from_folder(str(root)).paths) == 8
    added(root)
    os.utime(root / "f1", ns=(fresh, fresh))
    assert root.stat().st_mtime_ns == before.st_mtime_ns
    assert len(Files.from_folder(str(root)).paths) == 9
    assert len(scanned) == 10


def test_a_link_that_led_nowhere_and_now_leads_to_a_folder(tmp_path, cache, scanned):
    root = write(tmp_path / "photos", 8)
    (root / "elsewhere").symlink_to(tmp_path / "outside")
    (root / "self").symlink_to(root / "self")
    (root / "f1" / "up").symlink_to(root)
    age(root)
    assert len(Files.from_folder(str(root))) == 8
    count = len(scanned)
    assert len(Files.from_folder(str(root))) == 8
    assert len(scanned) == count
    write(tmp_path / "outside", 3, folders=1)
    assert len(Files.from_folder(str(root))) == 11


def test_another_folder_under_the_same_name(tmp_path, cache):
    write(tmp_path / "photos", 8)
    write(tmp_path / "others", 12)
    os.utime(tmp_path / "others", (LONG_AGO + 9, LONG_AGO + 9))
    assert len(Files.from_folder(str(tmp_path / "photos"))) == 8
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "others").rename(tmp_path / "photos")
    assert len(Files.from_folder(str(tmp_path / "photos"))) == 12
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(SourceError, match="No such file"):
        Files.from_folder(str(tmp_path / "photos"))


def test_a_folder_that_was_left_out_is_named_each_time(tmp_path, cache, monkeypatch):
    root, scandir = write(tmp_path / "photos", 8), os.scandir

    def closed(path):
        if str(path).rstrip("/").endswith("f2"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"f2/ is left out: Permission denied"):
            assert len(Files.from_folder(str(root))) == 6
    monkeypatch.undo()
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    assert len(Files.from_folder(str(root))) == 8


def test_a_text_file_is_watched(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    text = tmp_path / "list.txt"
    text.write_text("a/1.png\nb/2.png\n")
    images = Files.from_text(str(text))
    assert isinstance(images.paths, Paths)
    assert images.watch.holds()
    os.utime(text, (LONG_AGO, LONG_AGO))
    assert not images.watch.holds()


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["/x/a/1", "/x/b/c/2"], ["a/1", "b/c/2"]),
        (["./a/1", "a/b/2"], ["1", "b/2"]),
        (["/x/a", "b/a"], ["/x/a", "b/a"]),
        (["1", "2"], ["1", "2"]),
    ],
)
def test_below_the_shared_folder(paths, want):
    assert list(below(paths)) == want
