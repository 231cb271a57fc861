"""A source as it is written, parsed: which part of the text means what."""

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.subsets.suffixes import SUFFIXES
from crosslevel.data.uri import KEYS, Option, Part, Suffix, parse
from crosslevel.utils.errors import SourceError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with some of everything."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "a,fps=2", "VOC2007/ImageSets/Main", "VOC2012/ImageSets/Main", "val"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("x:y@z,k={1..2}+.tar", "instances.json", "b.mp4", "rows.parquet", "names.txt"):
        (tmp_path / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind", "path", "options"),
    [
        ("photos", "path", "photos", []),
        ("photos,fps=2", "path", "photos", [("fps", "2")]),
        ("photos, stride=10,fps=2", "path", "photos", [("stride", "10"), ("fps", "2")]),
        ("a,fps=2", "path", "a,fps=2", []),
        ("a,fps=2,fps=3", "path", "a,fps=2", [("fps", "3")]),
        ("x:y@z,k={1..2}+.tar", "path", "x:y@z,k={1..2}+.tar", []),
        ("rows.parquet,column=a/b,label=c", "path", "rows.parquet", [("column", "a/b"), ("label", "c")]),
        ("x-{000..009}.tar", "pattern", "x-{000..009}.tar", []),
        ("r/*.parquet,column=a/b", "pattern", "r/*.parquet", [("column", "a/b")]),
        ("d,e=1/*.mp4,fps=2", "pattern", "d,e=1/*.mp4", [("fps", "2")]),
        ("no.mp4", "pattern", "no.mp4", []),
        ("cifar10", "name", "cifar10", []),
        ("turntable,classes,word=a=b", "name", "turntable", [("classes", None), ("word", "a=b")]),
        ("https://host/s-{0..2}.tar?key=a", "stream", "https://host/s-{0..2}.tar?key=a", []),
        ("stream:s-*.tar", "stream", "s-*.tar", []),
        ("VOC2007", "path", "VOC2007", []),
        ("nowhere", "name", "nowhere", []),
    ],
)
def test_kind_path_and_options(here, text, kind, path, options):
    source = parse(text)
    assert (source.kind, source.path) == (kind, path)
    assert list(source.options) == options
    assert source.text == source.base_text == text
    assert not source.has_subset


def test_split_and_revision():
    source = parse("hf://owner/name/small@refs/convert:train[:9],column=img,label=fine")
    assert (source.kind, source.path, source.revision) == ("hub", "owner/name/small", "refs/convert")
    assert source.split == "train[:9]"
    assert source.options == (Option("column", "img"), Option("label", "fine"))
    source = parse("stl10:train+unlabeled")
    assert (source.kind, source.path, source.split) == ("name", "stl10", "train+unlabeled")
    assert parse("stl10:").split == ""
    assert parse("stl10").split is None
    with pytest.raises(SourceError, match="hf://a/b/c/d: write it as hf://owner/name"):
        parse("hf://a/b/c/d")


def test_a_local_data_set_of_the_hub_may_lie_in_any_folder(tmp_path):
    (tmp_path / "a:b@c").mkdir()
    source = parse(f"hf://{tmp_path}/a:b@c:test")
    assert (source.path, source.revision, source.split) == (f"{tmp_path}/a:b@c", None, "test")


def test_parts_of_annotated_images(here):
    source = parse("VOC2007:trainval+VOC2012:trainval")
    assert source.kind == "annotated"
    assert source.parts == (Part("VOC2007", "trainval"), Part("VOC2012", "trainval"))
    assert source.is_annotated
    made = source.absolute()
    assert made.text == f"{here}/VOC2007:trainval+{here}/VOC2012:trainval"
    assert made.parts == (Part(f"{here}/VOC2007", "trainval"), Part(f"{here}/VOC2012", "trainval"))
    # Beside a JSON file stands a folder of images, beside a VOC folder the name of a list.
    assert parse("instances.json:val").absolute().text == f"{here}/instances.json:{here}/val"
    assert parse("VOC2007:val").absolute().text == f"{here}/VOC2007:val"
    assert not parse("photos:trainval").is_annotated
    assert parse("instances.json").is_annotated


def test_subsets_in_the_order_in_which_they_hold(here):
    source = parse("photos,fps=2@tracks=9,seed=1@list=my list, 2.txt")
    assert source.subset == (Suffix("tracks", "9,seed=1"), Suffix("list", "my list, 2.txt"))
    assert source.subset[0].parts() == ("9", (Option("seed", "1"),))
    assert source.base == parse("photos,fps=2")
    assert source.text == "photos,fps=2@tracks=9,seed=1@list=my list, 2.txt"
    assert source.absolute().text == f"{here}/photos,fps=2@tracks=9,seed=1@list={here}/my list, 2.txt"
    assert source.with_list("part.txt").text == "photos,fps=2@list=my list, 2.txt@list=part.txt"


def test_the_keys_are_those_that_can_be_applied():
    assert set(KEYS) == set(SUFFIXES)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("photos", "photos"),
        ("photos/", "photos"),
        ("photos@frames=5@list=photos/l.txt", "photos-frames5-list"),
        ("b.mp4,fps=2", "b"),
        ("names.txt", "names"),
        ("cifar10:test@imbalance=100,seed=3", "cifar10-test-imbalance100-seed-3"),
        ("turntable:train,classes=8", "turntable-train"),
        ("hf://owner/name:test,column=x", "name-test"),
        ("a/s-{0..2}.tar", "s"),
        ("https://h/photos/{00..01}.tar?key=a", "photos"),
        ("stream:data/s-*.tar", "s"),
        ("🙂", "images"),
    ],
)
def test_a_word_for_the_name_of_a_run(here, text, word):
    assert parse(text).short == word


@pytest.mark.parametrize(
    "text",
    [
        "photos",
        "photos,fps=2@frames=5",
        "a,fps=2,fps=3",
        "x-{0..3}.tar",
        "VOC2007:trainval+VOC2012:trainval",
        "instances.json:val@list=names.txt",
        "cifar10:test,a=b@classes=names.txt",
        "hf://owner/name@v1:test,column=x",
        "stream:s-*.tar",
        "https://h/x.tar",
    ],
)
def test_what_is_absolute_means_the_same_from_anywhere(here, text, monkeypatch):
    made = parse(text).absolute()
    monkeypatch.chdir("/")
    assert parse(made.text) == made
    assert made.absolute() == made
    assert (made.kind, made.options) == (parse(made.text).kind, made.options)


@given(st.text(alphabet="ab.,:@+={}/*1", max_size=20))
def test_nothing_is_lost(text):
    try:
        source = parse(text)
    except SourceError:  # a misspelled suffix
        return
    assert source.text == text
    assert parse(source) is source
    assert dataclasses.replace(source, subset=()) == source.base
    hash(source)


def test_paths_are_taken_as_well(here):
    assert parse(here / "photos") == parse(str(here / "photos"))
    assert os.path.isdir(parse(here / "photos").path)
