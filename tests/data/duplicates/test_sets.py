"""Sets of duplicates with one image to keep, written, read back, and left out of a source."""

import csv

import numpy as np
import pytest
import torch
from duplicates_samples import EDITS, scene
from PIL import Image, ImageOps

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.across import matches
from crosslevel.data.duplicates.detect import Kind, duplicate_pairs
from crosslevel.data.duplicates.scan import scan
from crosslevel.data.duplicates.sets import duplicate_sets, with_exact, write_csv
from crosslevel.data.images import InMemoryImages
from crosslevel.data.open import open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError

ODD = 'new\nline, "and" comma.png'


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 scenes; copies of the first three, one of them under an odd name, and a scene in a folder."""
    home, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    scenes = [scene(generator) for _ in range(12)]
    for i, image in enumerate(scenes):
        image.save(home / f"{i:02}.png")
    (home / "more").mkdir()
    scenes[0].save(home / "more" / "same.bmp")
    EDITS["half"](scenes[0]).save(home / "a-thumbnail.png")
    scenes[1].save(home / "01-jpeg.jpg", quality=50)
    ImageOps.grayscale(scenes[2]).save(home / ODD)
    return home


def sets_of(folder):
    images = open_images(str(folder))
    scanned = scan(images, BadFiles(), 0)
    pairs = with_exact(scanned, duplicate_pairs(scanned.pictures))
    return images, scanned, duplicate_sets(scanned, pairs, images.paths)


def test_of_each_set_the_best_is_kept_and_the_others_say_how_they_differ(photos):
    images, scanned, members = sets_of(photos)
    told = {
        images.paths[int(scanned.numbers[m.number])]: (m.set, None if m.kind is None else m.kind, m.keep)
        for m in members
    }
    number = {name: told[name][0] for name in ("00.png", "01.png", "02.png")}
    assert told == {
        "00.png": (number["00.png"], None, True),
        "more/same.bmp": (number["00.png"], Kind.EXACT, False),
        "a-thumbnail.png": (number["00.png"], Kind.COPY, False),
        "01.png": (number["01.png"], None, True),
        "01-jpeg.jpg": (number["01.png"], Kind.COPY, False),
        "02.png": (number["02.png"], None, True),
        ODD: (number["02.png"], Kind.EDITED, False),
    }
    assert sorted(number.values()) == [1, 2, 3]
    why = {images.paths[int(scanned.numbers[m.number])]: m.reason for m in members}
    assert why["00.png"] == "most pixels: 320 x 240"
    assert why["01.png"] == "a format without loss"
    assert why["02.png"] == "has colours"
    assert why["01-jpeg.jpg"] == "a copy of 01.png"


def test_the_table_is_read_back_and_what_it_does_not_keep_is_left_out(photos, tmp_path):
    images, scanned, members = sets_of(photos)
    file = tmp_path / "my duplicates@1,2.csv"
    write_csv(file, members, scanned, images.paths)
    with open(file, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["set", "path", "kind", "distance", "keep", "why"]
    assert len(rows) == 7
    assert {row["kind"] for row in rows} == {"kept", "exact", "recompressed or resized", "edited"}
    left = open_images(f"{photos}@unique={file}")
    assert sorted(left.paths) == [f"{i:02}.png" for i in range(12)]
    rows[0]["keep"], kept = "no", rows[0]["path"]
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert kept not in open_images(f"{photos}@unique={file}").paths


def test_unique_leaves_one_image_of_each_set(photos):
    assert sorted(open_images(f"{photos}/@unique").paths) == [f"{i:02}.png" for i in range(12)]
    assert len(open_images(f"{photos}@unique@repeat=2")) == 24


def test_near_duplicates_stay(tmp_path):
    made = Turntable(classes=3, objects=12, frames=3, imbalance=1, size=32, seed=6)
    for i, picture in enumerate(made.data):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
    members = sets_of(tmp_path)[2]
    near = [m for m in members if m.kind == Kind.NEAR]
    assert len(near) >= 5
    assert all(m.keep for m in near)
    assert len(open_images(f"{tmp_path}@unique")) == 36 - sum(not m.keep for m in members)


def test_the_suffix_is_parsed_with_and_without_a_file(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for text in ("more@unique", "more@unique=a@b.csv", "more/@unique@repeat=2", "cifar10@unique"):
        assert parse(text).text == text
        assert parse(text).subset[0].key == "unique"
    assert [s.value for s in parse("more@unique=a@b.csv").subset] == ["a@b.csv"]
    assert str(parse("more@unique").absolute().subset[0]) == "@unique"
    assert str(parse("more@unique=a.csv").absolute().subset[0]) == f"@unique={photos}/a.csv"
    assert not parse("a@uniquely").subset


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no duplicates.csv"),
        ("path,keep\n00.png,maybe\n", "yes or no"),
        ("path,keep\nnowhere.png,no\n", "1 of its 1 copies name no image"),
        (None, "No such file"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(photos, tmp_path, text, says):
    file = tmp_path / "a.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SourceError, match=says) as error:
        open_images(f"{photos}@unique={file}")
    assert "\n" not in str(error.value)


def test_copies_in_another_collection_are_matched_with_the_closest(photos, tmp_path):
    images, own, _ = sets_of(photos)
    scenes = [Image.open(photos / f"{i:02}.png") for i in range(12)]
    scenes[0].save(tmp_path / "zero.png")
    EDITS["contrast"](scenes[5]).save(tmp_path / "five.png")
    EDITS["flip"](scenes[6]).save(tmp_path / "six.png")
    for i in range(3):
        scene(np.random.default_rng(90 + i)).save(tmp_path / f"new-{i}.png")
    other, scanned, _ = sets_of(tmp_path)
    found = {
        other.paths[int(scanned.numbers[m.second])]: (images.paths[int(own.numbers[m.first])], m.kind)
        for m in matches(own, scanned)
    }
    assert found.pop("zero.png") in {("00.png", Kind.EXACT), ("more/same.bmp", Kind.EXACT)}
    assert found == {"five.png": ("05.png", Kind.EDITED), "six.png": ("06.png", Kind.EDITED)}


def test_equal_bytes_in_another_shape_are_not_equal():
    data = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    a, b = InMemoryImages(data, ["a", "b"]), InMemoryImages(data.view(2, 3, 4, 16), ["a", "b"])
    assert not set(scan(a, BadFiles(), 0).content.tolist()) & set(scan(b, BadFiles(), 0).content.tolist())
