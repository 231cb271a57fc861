"""Lists of images: published formats, odd names, and what cannot be read."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.images import InMemoryImages
from crosslevel.data.subsets.lists import classes_of, listed, write_list
from crosslevel.data.subsets.select import take
from crosslevel.utils.errors import SourceError


def named(paths, labels=None, classes=None):
    data = torch.arange(len(paths)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return InMemoryImages(data, paths, None if labels is None else torch.tensor(labels), classes, "here")


def same(part, want):
    assert list(part.paths) == list(want.paths)
    assert (part.labels is None) == (want.labels is None)
    assert part.labels is None or torch.equal(part.labels, want.labels)
    assert part.classes == want.classes
    assert part.identity() == want.identity()


# What a POSIX file name may hold: any bytes but "/" and NUL; those that are no UTF-8 are surrogates in a string.
NAMES = st.lists(
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]) | st.just("\udcff"), min_size=1),
    min_size=2,
    max_size=12,
    unique=True,
)


@given(NAMES, st.booleans(), st.integers(0, 99))
def test_what_was_written_is_read_back(tmp_path_factory, names, labelled, seed):
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (len(names),), generator=draws).tolist()
    source = named(names, labels if labelled else None, ["x", "y", "z"] if labelled else None)
    part = take(source, torch.randperm(len(names), generator=draws)[: max(2, len(names) // 2)])
    file = tmp_path_factory.mktemp("lists") / "subset.txt"
    write_list(part, file)
    same(listed(source, str(file)), part)


def test_names_that_look_like_lines(tmp_path):
    names = ["a 1", "a", "b\t2", "b", "c\n3", "c\\n3", " d ", "e 7 8", "🐈 9", "f\r", "\u2028 4", "g\x85 5"]
    source = named(names, list(range(12)), [f"class {i}" for i in range(12)])
    write_list(source, tmp_path / "all.txt")
    assert (tmp_path / "all.txt").read_bytes().count(b"\n") == 12
    same(listed(source, str(tmp_path / "all.txt")), source)


def test_the_format_of_the_published_long_tailed_lists(tmp_path):
    """``train/n01440764/n01440764_190.JPEG 0``: labels are the file's, whatever the source's folders say."""
    source = named(
        ["test/x y.JPEG", "train/n1/1.JPEG", "train/n1/2.JPEG", "train/n2/1.JPEG"], [0, 1, 1, 1], ["test", "train"]
    )
    file = tmp_path / "ImageNet_LT_train.txt"
    file.write_bytes(b"train/n2/1.JPEG 2\r\ntrain/n1/2.JPEG 0\r\ntest/x y.JPEG 2\r\n")
    part = listed(source, str(file))
    assert list(part.paths) == ["train/n2/1.JPEG", "train/n1/2.JPEG", "test/x y.JPEG"]
    assert part.labels.tolist() == [2, 0, 2]
    assert part.classes == ["0", "1", "2"]
    assert isinstance(part, InMemoryImages)
    assert part.data[:, 0, 0, 0].tolist() == [3, 2, 0]


def test_classes_stay_where_the_labels_are_the_sources(tmp_path):
    source = named(["a/1", "b/2", "a/3"], [0, 1, 0], ["a", "b"])
    (tmp_path / "own.txt").write_text("a/3 0\nb/2 1")
    assert listed(source, str(tmp_path / "own.txt")).classes == ["a", "b"]
    (tmp_path / "bare.txt").write_text("a/3\n\na/1\n")
    bare = listed(source, str(tmp_path / "bare.txt"))
    assert (list(bare.paths), bare.labels.tolist(), bare.classes) == (["a/3", "a/1"], [0, 0], ["a", "b"])


def test_an_image_may_be_listed_twice(tmp_path):
    source = named(["a", "b", "c"])
    (tmp_path / "l.txt").write_text("b 0\nb 0\nc 1\n")
    assert list(listed(source, str(tmp_path / "l.txt")).paths) == ["b", "b", "c"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a 0\nx y.jpg 1\nz 2\n", "2 of its 3 lines name no image of here, x y.jpg first; its own are named like a"),
        ("a 0\n", "names 1"),
        ("a 0\nb\n", "1 of its 2 lines have no label"),
        ("a 0\nb -1\n", "1 of its 2 lines have no label"),
        ("a -3\nb -7\n", "2 of its 2 lines have no label of 0 or more"),
        ("a 0\nb 99999999999\n", "label 99999999999 is no number of a class"),
    ],
)
def test_lists_that_cannot_be(tmp_path, text, says):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(SourceError, match=says) as caught:
        listed(named(["a", "b"]), str(tmp_path / "l.txt"))
    assert str(tmp_path / "l.txt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path):
    for read in (listed, classes_of):
        with pytest.raises(SourceError, match=r"none\.txt: No such file"):
            read(named(["a", "b"], [0, 1], ["x", "y"]), str(tmp_path / "none.txt"))


def test_classes_in_the_order_of_their_file(tmp_path):
    source = named(["n3/a", "n1/b", "n2/c", "n1/d"], [2, 0, 1, 0], ["n1", "n2", "n3"])
    (tmp_path / "classes.txt").write_text("n3 tench, Tinca tinca\r\nn1\n\n")
    part = classes_of(source, str(tmp_path / "classes.txt"))
    assert list(part.paths) == ["n3/a", "n1/b", "n1/d"]
    assert part.labels.tolist() == [0, 1, 1]
    assert part.classes == ["n3", "n1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n1\nn22\n", "here has no class n22: did you mean n2?"),
        ("zebra\n", "here has no class zebra: it has n1, n2"),
        ("n1\nn2\nn1\n", "names class n1 twice"),
        ("\n", "names no class"),
    ],
)
def test_classes_that_cannot_be(tmp_path, text, says):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(SourceError) as caught:
        classes_of(named(["a", "b"], [0, 1], ["n1", "n2"]), str(tmp_path / "c.txt"))
    assert says in str(caught.value)
    with pytest.raises(SourceError, match="here has no classes to choose from"):
        classes_of(named(["a", "b"]), str(tmp_path / "c.txt"))


def test_file_names_on_disk_survive(tmp_path):
    """Names as the file system gives them, among them bytes that are no UTF-8."""
    folder = tmp_path / "photos"
    for name in (b"one\ntwo.png", b"\xff\xfe.png", "🐈 3.png".encode(), b"tab\there.png", b"back\\slash.png"):
        os.makedirs(os.fsencode(folder), exist_ok=True)
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"P5 1 1 255 \x07")
    from crosslevel.data.open import open_images

    source = open_images(folder)
    part = take(source, torch.tensor([4, 0, 2, 1]))
    write_list(part, tmp_path / "subset.txt")
    again = open_images(f"{folder}@list={tmp_path / 'subset.txt'}")
    assert list(again.paths) == list(part.paths)
    assert again[0][0].shape == (3, 1, 1)
