"""Object crops: each annotated object as an image, from VOC and COCO files that the tests write."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslevel import cli
from crosslevel.data import pack
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.uri import parse
from crosslevel.settings.parser import run
from crosslevel.utils.errors import BadImage, SourceError

PLAIN = Crops(margin=0, min_size=1, square=False)


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_voc(root, entries):
    """``entries``: (width, height), [(class, (x1, y1, x2, y2) from 0 and exclusive, difficult), ...] by name."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for seed, (key, ((width, height), objects)) in enumerate(entries.items()):
        Image.fromarray(picture(height, width, seed)).save(root / "JPEGImages" / f"{key}.png")
        items = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for name, (x1, y1, x2, y2), difficult in objects
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation><filename>{key}.png</filename>{size}{items}</annotation>"
        (root / "Annotations" / f"{key}.xml").write_text(text)
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{key}\n" for key in entries))
    return f"{root}:trainval"


ENTRIES = {
    "one": ((60, 40), [("dog", (5, 4, 45, 24), 0), ("ant", (0, 0, 50, 40), 1), ("cat", (50, 30, 60, 40), 0)]),
    "none": ((30, 50), []),
    "two": ((30, 50), [("cat", (10, 0, 20, 50), 0), ("dog", (1, 1, 4, 30), 0)]),
}


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOC", ENTRIES)


def test_one_image_for_each_object_that_counts(voc):
    source = open_images(voc, crops=replace(PLAIN, min_size=10))
    assert list(source.paths) == ["one.png#1", "one.png#3", "two.png#1"]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0, 0]
    assert source.name == voc
    assert source.tracks is None
    wanted = [picture(40, 60, 0)[4:24, 5:45], picture(40, 60, 0)[30:40, 50:60], picture(50, 30, 2)[:, 10:20]]
    for i, want in enumerate(wanted):
        got, label = source[i]
        np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), want)
        assert label == source.labels[i]
        assert got.untyped_storage().nbytes() == want.size  # and not the whole image's


def test_a_margin_is_a_share_of_the_longer_side_and_ends_with_the_image(voc):
    got = open_images(voc, crops=Crops(margin=0.1, min_size=10, square=False)).windows
    assert got.tolist() == [[1, 0, 49, 28], [49, 29, 60, 40], [5, 0, 25, 50]]


def test_a_square_is_moved_into_the_image(voc):
    got = open_images(voc, crops=Crops(margin=0, min_size=1)).windows
    assert got.tolist() == [[5, 0, 45, 40], [50, 30, 60, 40], [0, 0, 30, 50], [0, 1, 29, 30]]


CORNERS = st.tuples(st.integers(1, 300), st.integers(1, 300), *[st.floats(0, 1) for _ in range(4)])


@given(sizes=st.lists(CORNERS, min_size=1, max_size=8), margin=st.floats(0, 3), square=st.booleans())
def test_windows_lie_in_the_image_and_hold_the_box(sizes, margin, square):
    limit = torch.tensor([[height, width] for height, width, *_ in sizes])
    low = torch.tensor([[x * 0.9 * w, y * 0.9 * h] for h, w, x, y, _, _ in sizes])
    room = limit.flip(1) - low
    boxes = torch.cat([low, low + room * torch.tensor([[0.05 + 0.95 * a, 0.05 + 0.95 * b] for *_, a, b in sizes])], 1)
    found = Crops(margin=margin, square=square).windows(boxes, limit)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= limit.flip(1)).all()
    assert (found[:, :2] <= boxes[:, :2]).all()
    assert (found[:, 2:] >= boxes[:, 2:] - 1e-3).all()
    sides = found[:, 2:] - found[:, :2]
    if square:
        longer = sides.amax(1, keepdim=True)
        assert (sides == torch.minimum(longer, limit.flip(1))).all()


def test_in_order_each_image_is_decoded_once(voc):
    """Once its first object was read, nobody asks for the file again."""
    source = open_images(voc, crops=PLAIN)
    for i, image in enumerate(source.image.tolist()):
        source[i]
        Path(source.images.files[image]).unlink(missing_ok=True)
    assert len(source.image.unique()) == 2 < len(source)
    assert source.__getstate__()["_last"] is None


def test_coco_and_several_parts(tmp_path):
    for part, seed in (("a", 0), ("b", 1)):
        (tmp_path / part).mkdir()
        Image.fromarray(picture(40, 60, seed)).save(tmp_path / part / "x.png")
        content = {
            "images": [{"id": 1, "file_name": "x.png", "width": 60, "height": 40}],
            "categories": [{"id": 1, "name": "unused"}, {"id": 7, "name": f"cup {part}"}, {"id": 9, "name": "bowl"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2.5, 3, 20, 30], "iscrowd": 0},
                {"id": 2, "image_id": 1, "category_id": 9, "bbox": [0, 0, 60, 40], "iscrowd": 1},
                {"id": 3, "image_id": 1, "category_id": 9, "bbox": [10, 10, 20, 20]},
            ],
        }
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
    one = f"{tmp_path}/a.json:{tmp_path}/a"
    source = open_images(one, crops=PLAIN)
    assert (list(source.paths), source.classes) == (["x.png#1", "x.png#3"], ["cup a", "bowl"])
    np.testing.assert_array_equal(source[0][0].permute(1, 2, 0).numpy(), picture(40, 60, 0)[3:33, 2:23])
    both = open_images(f"{one}+{tmp_path}/b.json:{tmp_path}/b", crops=PLAIN)
    assert list(both.paths) == ["a/x.png#1", "a/x.png#3", "b/x.png#1", "b/x.png#3"]
    assert [both.classes[c] for c in both.labels.tolist()] == ["cup a", "bowl", "cup b", "bowl"]


def test_sources_are_made_absolute(tmp_path, monkeypatch, voc):
    monkeypatch.chdir(tmp_path)
    assert parse("VOC:trainval").absolute().text == voc
    (tmp_path / "a.json").touch()
    (tmp_path / "pictures").mkdir()
    assert parse("a.json:pictures").absolute().text == f"{tmp_path}/a.json:{tmp_path}/pictures"
    assert parse("VOC:train+VOC:val").absolute().text == f"{tmp_path}/VOC:train+{tmp_path}/VOC:val"
    assert parse("cifar10:test").absolute().text == "cifar10:test"
    assert parse("nothing:here").absolute().text == "nothing:here"


def test_identity_changes_with_the_windows_and_the_files(voc, tmp_path):
    first = open_images(voc, crops=PLAIN).identity()
    assert open_images(voc, crops=PLAIN).identity() == first
    assert open_images(voc, crops=replace(PLAIN, margin=0.3)).identity() != first
    Image.fromarray(picture(40, 60, 5)).save(tmp_path / "VOC" / "JPEGImages" / "one.png", compress_level=0)
    assert open_images(voc, crops=PLAIN).identity() != first


def test_an_unreadable_image_makes_its_objects_bad(voc, tmp_path):
    (tmp_path / "VOC" / "JPEGImages" / "one.png").write_bytes(b"damaged")
    source = open_images(voc, crops=PLAIN)
    for i in (0, 1):
        with pytest.raises(BadImage, match=f"one.png#{(1, 3)[i]}: not an image"):
            source[i]
    assert source[2][0].shape == (3, 50, 10)


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ("photos", {}, "photos: there are no annotated objects to crop: give a VOC folder"),
        ("turntable:test", {}, "turntable:test: there are no annotated objects to crop"),
        ("VOC", {}, "the name of a list is missing"),
        ("VOC:val", {}, "there are: trainval"),
        ("VOC:trainval", {"min_size": 200}, "of its 4 objects none have a shorter side of at least 200 pixels"),
        ("VOC:trainval", {"min_size": 200}, "(the largest: 20): lower --crops.min_size"),
        ("VOC:trainval", {"min_size": 12}, "of its 4 objects 1 has a shorter side of at least 12 pixels"),
        ("few:trainval", {}, "needs at least 2 objects, it has 1, 2 more are ignored (difficult)"),
    ],
)
def test_wrong_sources_say_what_to_do_in_one_line(tmp_path, monkeypatch, voc, source, settings, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    box = (0, 0, 50, 40)
    write_voc(tmp_path / "few", {"a": ((60, 40), [("x", box, 0), ("x", box, 1), ("x", box, 1)])})
    with pytest.raises(SourceError) as caught:
        open_images(source, crops=Crops(**settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"crops.margin=-1: give a share"):
        Crops(margin=-1)
    with pytest.raises(ValueError, match=r"crops.min_size=0: give a number of pixels"):
        Crops(min_size=0)
    with pytest.raises(SourceError, match="a list of 2 files has no annotated objects"):
        open_images(["a.png", "b.png"], crops=Crops())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([], None),
        (["--crops"], Crops()),
        (["--crops", "--epochs=3"], Crops()),
        (["--crops=true"], Crops()),
        (["--crops", "false"], None),
        (["--crops=null"], None),
        (["--crops.margin", "0.2", "--crops.min_size=20"], Crops(0.2, 20)),
        (["--crops", "--crops.square=false"], Crops(square=False)),
        (["--config={c}"], Crops(0.5)),
        (["--config={c}", "--crops"], Crops(0.5)),
        (["--config={c}", "--crops.min_size=5"], Crops(0.5, 5)),
        (["--config={c}", "--crops=false"], None),
        (["--crops", '{"margin": 0.4}'], Crops(0.4)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_option(tmp_path, given, want, first):
    def echo(images: str, crops: Crops | None = None, epochs: int = 1, resume: str | None = None):
        """Show what arrives."""
        return images, crops

    (tmp_path / "c.yaml").write_text("crops: {margin: 0.5}\n")
    given = [argument.format(c=tmp_path / "c.yaml") if "{c}" in argument else argument for argument in given]
    assert run(echo, ["photos", *given] if first else [*given, "photos"]) == ("photos", want)


@pytest.mark.parametrize("value", [Crops(), Crops(0.2), Crops(square=False, min_size=3)])
def test_settings_are_written_as_they_are_read(value):
    def echo(crops: Crops | None = None):
        """Show what arrives."""
        return crops

    assert run(echo, value.options().split()) == value


def test_a_run_repeats_its_crops(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "VOC", {**ENTRIES, "three": ((60, 40), ENTRIES["one"][1])})
    tiny = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=4", "--device=cpu", "--report_html=false"]
    options = ["--crops.min_size=3", "--crops.margin=0.2", "--epochs=1", "--cld.groups=2", "--workers=0"]
    cli.main(["train", "VOC:trainval", *tiny, *options, "--run=a"])
    said = capfd.readouterr().out
    assert "6 images" in said
    assert "embed a VOC:trainval -o features.parquet --crops.margin=0.2 --crops.min_size=3" in said
    told = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert told["crops"] == {"margin": 0.2, "min_size": 3, "square": True}
    assert told["images"] == f"{tmp_path}/VOC:trainval"
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    cli.main(["train", "--resume", str(tmp_path / "a"), "--epochs=2"])
    cli.main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--run=b"])
    assert capfd.readouterr().out.count("\n6 images, ") == 2
    monkeypatch.chdir(tmp_path)
    cli.main(["evaluate", "a", "VOC:trainval", "--crops.min_size=3", "--test=VOC:trainval", "--workers=0", "--k=2"])
    result = json.loads((tmp_path / "a" / "evaluation.json").read_text())["results"][0]
    assert result["crops"]["min_size"] == 3
    cli.main(["embed", "a", "VOC:trainval", "--crops.min_size=3", "-o", "f.npy", "--workers=0"])
    assert np.load("f.npy").shape[0] == 6


def test_objects_are_packed_as_they_were_cut_out(tmp_path, monkeypatch, voc, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["pack", "VOC:trainval", "-o", "p", "--workers=0"]
    cli.main([*options, "--crops.min_size=10", "--crops.margin=0.3"])
    packed = open_images("p")
    source = open_images(voc, crops=Crops(margin=0.3, min_size=10))
    assert list(packed.paths) == list(source.paths)
    assert all(torch.equal(packed[i][0], source[i][0]) for i in range(3))
    assert json.loads((tmp_path / "p" / "pack.json").read_text())["crops"] == {
        "margin": 0.3,
        "min_size": 10,
        "square": True,
    }
    capsys.readouterr()
    cli.main([*options, "--crops.min_size=10", "--crops.margin=0.3"])
    assert "nothing has changed" in capsys.readouterr().out
    cli.main([*options, "--crops.min_size=10"])
    assert "it was packed with --crops.margin=0.3 --crops.min_size=10: packed anew" in capsys.readouterr().out
    assert open_images("p").identity() != packed.identity()


def later(file):
    """Let ``file`` look as if it had been written again, in the same length."""
    os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1))


def write_coco(root):
    """Two images in a folder each, with an object each."""
    for i, name in enumerate(("a/1.png", "b/2.png")):
        (root / name).parent.mkdir(parents=True)
        Image.fromarray(picture(40, 60, i)).save(root / name)
    entries = [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in enumerate(("a/1.png", "b/2.png"))]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 30, 20]} for i in range(2)]
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (root / "instances.json").write_text(json.dumps(content))
    return f"{root}/instances.json:{root}"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("voc", lambda root: later(root / "Annotations" / "two.xml")),
        ("voc", lambda root: (root / "ImageSets" / "Main" / "trainval.txt").write_text("one\n")),
        ("voc", lambda root: (root / "JPEGImages" / "two.png").unlink()),
        ("coco", lambda root: later(root / "instances.json")),
        ("coco", lambda root: (root / "b" / "2.png").rename(root / "b" / "3.png")),
    ],
)
def test_a_change_of_what_objects_were_cut_out_of_is_told_when_their_pack_is_opened(tmp_path, kind, change):
    source = write_voc(tmp_path / "data", ENTRIES) if kind == "voc" else write_coco(tmp_path / "data")
    packed = str(pack.pack(f"{source}@repeat=2", str(tmp_path / "p"), 20, workers=0, crops=replace(PLAIN, min_size=3)))
    (tmp_path / "data" / "other").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(packed)
    change(tmp_path / "data")
    with pytest.warns(UserWarning, match=r"p: .*data.* has changed since it was packed: crosslevel pack again") as told:
        open_images(packed)
    assert len(told) == 1


def test_objects_are_not_packed_into_a_folder_of_their_images(tmp_path, voc):
    inside = str(tmp_path / "VOC" / "JPEGImages" / "deep" / "p")
    with pytest.raises(ValueError, match=r"lies inside .*JPEGImages: give a folder outside of it"):
        pack.pack(voc, inside, 20, workers=0, crops=Crops(min_size=3))


def test_objects_are_inspected_and_listed(tmp_path, monkeypatch, voc, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["inspect", "VOC:trainval", "--crops.min_size=3", "-o", "seen.json", "--device=cpu", "--workers=0"])
    told = json.loads((tmp_path / "seen.json").read_text())
    assert (told["count"], told["readable"]) == (4, 4)
    capsys.readouterr()
    cli.main(["subset", "VOC:trainval@imbalance=2", "--crops.min_size=3", "-o", "part.txt"])
    said = capsys.readouterr().out
    assert "3 images of VOC:trainval@imbalance=2" in said
    assert "next: crosslevel train VOC:trainval@list=part.txt --crops.min_size=3\n" in said
    again = open_images("VOC:trainval@list=part.txt", crops=Crops(min_size=3))
    assert list(again.paths) == list(open_images("VOC:trainval@imbalance=2", crops=Crops(min_size=3)).paths)


@pytest.mark.parametrize("source", ["VOC:trainval", "VOC:trainval+VOC:trainval", "some.json", "some.json:VOC"])
def test_without_the_option_the_message_names_it(tmp_path, monkeypatch, voc, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(SourceError, match="--crops takes the objects of annotated images"):
        open_images(source)
