"""Folders, lists and CIFAR files that the tests write themselves."""

import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslevel.data.images import InMemoryImages
from crosslevel.data.sources.folder import Files
from crosslevel.utils.errors import BadImage, SourceError

COLORS = [(250, 10, 20), (10, 250, 20), (10, 20, 250), (250, 250, 20)]


def write(root, *names):
    """Small PNG files of one color each, whatever their names say."""
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), COLORS[i % len(COLORS)]).save(file, "PNG")


def test_a_folder_is_searched_recursively_and_sorted(tmp_path):
    names = ["b/z.JPG", "b/c/d/y.jpeg", "a.PNG", "w.webp", "v.bmp", "u.tif", "t.TIFF", "s.ppm", "r.pgm", "q.pbm"]
    names += ["png"]  # told by its content
    write(tmp_path, *names, ".hidden.png", ".git/x.png", "b/.cache/y.png", "notes.txt", "movie.mp4")
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
    assert [str(call[0]).rstrip("/") for call in calls if str(call[0]).startswith(str(tmp_path))] == [str(tmp_path)]


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
        InMemoryImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), ["a"] * 3)


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


def test_identity_changes_with_what_is_in_the_files_and_not_with_where_they_lie(tmp_path):
    write(tmp_path / "one", "cat/1.png", "dog/2.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = Files.from_folder(str(tmp_path / "one")).identity()
    assert Files.from_folder(str(tmp_path / "one")).identity() == first
    assert Files.from_folder(str(tmp_path / "two")).identity() == first
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "dog" / "2.png")
    changed = Files.from_folder(str(tmp_path / "one")).identity()
    assert changed != first
    write(tmp_path / "two", "emu/3.png")
    assert Files.from_folder(str(tmp_path / "two")).identity() not in (first, changed)
    missing = Files("", [str(tmp_path / "gone.png")])
    assert missing.identity() == missing.identity()


def test_an_identity_that_is_asked_for_once_is_that_of_the_first_call():
    images = InMemoryImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"])
    first = images.identity_once()
    assert first == images.identity()
    images.data[0] = 1
    assert images.identity_once() == first != images.identity()


def test_identity_of_packed_images_is_their_content():
    data = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    first = InMemoryImages(data, ["a", "b"]).identity()
    assert InMemoryImages(data.clone(), ["c", "d"]).identity() == first
    assert InMemoryImages(data.flip(0), ["a", "b"]).identity() != first
    assert InMemoryImages(data, ["a", "b"], torch.tensor([0, 1]), ["x", "y"]).identity() != first
