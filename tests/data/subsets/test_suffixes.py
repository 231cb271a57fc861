"""Parts of a source by suffixes of its name."""

import os

import pytest
import torch
from PIL import Image

from crosslevel.data.images import InMemoryImages
from crosslevel.data.open import open_images
from crosslevel.data.subsets.lists import write_list
from crosslevel.data.uri import parse
from crosslevel.evaluation.session import labelled_pair
from crosslevel.utils.errors import SourceError

SMALL = "turntable:train,classes=3,objects=12,frames=4,size=16,imbalance=4"


def write(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (i, 8, 7)).save(root / name, "PNG")


def parts(source):
    parsed = parse(source)
    return parsed.base_text, [str(suffix) for suffix in parsed.subset]


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("cifar10", ("cifar10", [])),
        ("cifar10@imbalance=100,seed=3", ("cifar10", ["@imbalance=100,seed=3"])),
        ("cifar10:test@imbalance=100@repeat=4,shift=2", ("cifar10:test", ["@imbalance=100", "@repeat=4,shift=2"])),
        ("hf://org/name@rev/file", ("hf://org/name@rev/file", [])),
        ("hf://org/name@rev/file@frames=3", ("hf://org/name@rev/file", ["@frames=3"])),
        ("https://user@host/a.tar?x@y=3", ("https://user@host/a.tar?x@y=3", [])),
        ("some@where/photos", ("some@where/photos", [])),
        ("a@list=/data/b@c/my list, 2.txt@tracks=9", ("a", ["@list=/data/b@c/my list, 2.txt", "@tracks=9"])),
        ("turntable:train,imbalance=20@frames=3", ("turntable:train,imbalance=20", ["@frames=3"])),
    ],
)
def test_only_known_keys_are_suffixes(source, want):
    assert parts(source) == want


def test_what_exists_is_no_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path, "a@frames=2/x.png", "a@frames=2/y.png", "b@c/x.png", "b@c/y.png", "b@typo=3/x.png", "b@typo=3/y.png"
    )
    assert parts("a@frames=2") == ("a@frames=2", [])
    assert parts("a@frames=2@repeat=2") == ("a@frames=2", ["@repeat=2"])
    for source in ("a@frames=2", "b@c", "b@typo=3"):
        assert len(open_images(source)) == 2
        assert len(open_images(f"{source}@repeat=3")) == 6
        assert open_images(f"{source}@repeat=3").name == f"{source}@repeat=3"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("@imbalence=10", "no part of a source is called @imbalence: did you mean imbalance?"),
        ("@imbalance=2@repeet=4", "no part of a source is called @repeet: did you mean repeat?"),
        ("@colour=4", "there are imbalance, pareto, list, classes, repeat, frames, tracks"),
        ("@imbalance=steep", "imbalance=steep: needs a number"),
        ("@imbalance=", "imbalance=: needs a number"),
        ("@imbalance=0.5", "imbalance=0.5 must be at least 1"),
        ("@imbalance=nan", "imbalance=nan must be at least 1"),
        ("@imbalance=1000", "leaves nothing of class"),
        ("@imbalance=2,sed=1", "@imbalance has no key 'sed': did you mean seed?"),
        ("@imbalance=2,seed=x", "seed=x: needs a whole number"),
        ("@frames=2,seed=1", "@frames has no key 'seed': it takes no other"),
        ("@pareto=6,most=2,least=3", "needs most >= least >= 1"),
        ("@repeat=1.5", "repeat=1.5: needs a whole number"),
        ("@tracks=13", "tracks=13: choose 1 to 12"),
        ("@tracks=1@frames=1", "@frames=1 leaves 1 images: needs at least 2"),
        ("@list=nowhere.txt", "nowhere.txt: No such file"),
        ("@list=", "@list= names no file"),
        ("@imbalance=2,seed=1,seed=2", "@imbalance has seed twice"),
    ],
)
def test_wrong_suffixes_say_what_to_do_in_one_line(source, says):
    with pytest.raises(SourceError) as caught:
        open_images(SMALL + source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_needs_labels_or_tracks_says_so(tmp_path):
    write(tmp_path, "a.png", "b.png")
    for suffix, says in (("imbalance=2", "no labels"), ("pareto=6", "no labels"), ("frames=2", "no tracks")):
        with pytest.raises(SourceError, match=says):
            open_images(f"{tmp_path}@{suffix}")


def test_each_takes_what_the_one_before_left():
    whole = open_images(SMALL)
    part = open_images(f"{SMALL}@tracks=8,seed=2@frames=3@repeat=2,shift=1")
    assert isinstance(part, InMemoryImages)
    assert part.name.endswith("@repeat=2,shift=1")
    assert whole.name == SMALL
    assert len(part) == 8 * 3 * 2
    assert part.tracks.unique(return_counts=True)[1].tolist() == [6] * 8
    assert part.classes == whole.classes
    owner = {path: int(label) for path, label in zip(whole.paths, whole.labels, strict=True)}
    assert [owner[path.split("#")[0]] for path in part.paths] == part.labels.tolist()
    assert part.identity() == open_images(f"{SMALL}@tracks=8,seed=2@frames=3@repeat=2,shift=1").identity()
    assert part.identity() != open_images(f"{SMALL}@tracks=8,seed=3@frames=3@repeat=2,shift=1").identity()


def test_an_imbalance_of_1_is_the_whole(tmp_path):
    write(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    assert list(open_images(f"{tmp_path}@imbalance=1").paths) == list(open_images(tmp_path).paths)
    tail = open_images(f"{tmp_path}@imbalance=4")
    assert tail.labels.bincount().tolist() == [4, 1]
    assert [tail[i][1] for i in range(5)] == tail.labels.tolist()
    pareto = open_images(f"{tmp_path}@pareto=6,most=3,least=2,seed=1")
    assert pareto.labels.bincount().tolist() == [3, 2]


@pytest.mark.parametrize(
    "suffixes",
    [
        "@imbalance=2",
        "@imbalance=2@repeat=3,shift=1",
        "@repeat=2,shift=1,seed=4@frames=3@tracks=5",
        "@classes={c}@pareto=2,most=8,least=2",
        "@repeat=2@classes={c}@repeat=2@imbalance=2",
    ],
)
def test_a_written_part_is_read_back_with_labels_classes_and_pixels(tmp_path, suffixes):
    (tmp_path / "c").write_text("\n".join(reversed(open_images(SMALL).classes[:2])))
    source = SMALL + suffixes.format(c=tmp_path / "c")
    part, file = open_images(source), tmp_path / "subset.txt"
    write_list(part, file)
    again = open_images(parse(source).with_list(str(file)))
    assert list(again.paths) == list(part.paths)
    assert torch.equal(again.data, part.data)
    assert torch.equal(again.labels, part.labels)
    assert again.classes == part.classes


def test_a_list_of_a_list(tmp_path):
    write(tmp_path, *(f"photos/{c}/{i}.png" for c in "ab" for i in range(4)))
    (tmp_path / "one.txt").write_text("".join(f"{c}/{i}.png {5 * (c == 'b')}\n" for c in "ba" for i in range(3)))
    source = f"{tmp_path / 'photos'}@list={tmp_path / 'one.txt'}@imbalance=3"
    assert open_images(source).labels.bincount().tolist() == [3, 0, 0, 0, 0, 1]  # no image has the labels 1 to 4
    (tmp_path / "one.txt").write_text("".join(f"{c}/{i}.png {1 * (c == 'a')}\n" for c in "ba" for i in range(3)))
    part = open_images(source)
    assert part.labels.bincount().tolist() == [3, 1]
    write_list(part, tmp_path / "two.txt")
    again = open_images(parse(source).with_list(str(tmp_path / "two.txt")))
    assert (list(again.paths), again.labels.tolist(), again.classes) == (
        list(part.paths),
        part.labels.tolist(),
        ["0", "1"],
    )


def test_imagenet_100_by_folder_and_class_list(tmp_path):
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"]
    for name in ("train", "val"):
        write(tmp_path / name, *(f"{wnid}/{wnid}_{i}.JPEG" for wnid in wnids for i in range(3)))
    (tmp_path / "imagenet100.txt").write_text("n01491361 tiger shark\nn01443537 goldfish\n")
    sources = [f"{tmp_path / name}@classes={tmp_path / 'imagenet100.txt'}" for name in ("train", "val")]
    bank, queries = labelled_pair(*sources)
    for part in (bank, queries):
        assert part.classes == ["n01491361", "n01443537"]
        assert len(part) == 6
        assert all(
            part.classes[label] == path.split("/")[0] for path, label in zip(part.paths, part.labels, strict=True)
        )
        assert [part[i][1] for i in range(6)] == part.labels.tolist()
    with pytest.raises(SourceError, match=r"has classes that .* lacks: n01440764"):
        labelled_pair(sources[0], str(tmp_path / "val"))


def test_paths_in_a_source_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "photos/x.png", "photos/y.png")
    assert parse("photos@list=l.txt@frames=2").absolute().text == f"{tmp_path}/photos@list={tmp_path}/l.txt@frames=2"
    assert parse("photos").absolute().text == f"{tmp_path}/photos"
    assert parse("cifar10@imbalance=100").absolute().text == "cifar10@imbalance=100"
    assert parse("cifar10").absolute().text == "cifar10"
    assert os.path.exists(parse("photos").absolute().text)


@pytest.mark.skipif("CROSSLEVEL_DATA" not in os.environ, reason="CROSSLEVEL_DATA names no folder with cifar10-jpeg")
def test_the_long_tailed_cifar10_of_files():
    part = open_images(f"{os.environ['CROSSLEVEL_DATA']}/cifar10-jpeg/train@imbalance=100")
    assert part.labels.bincount().tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert all(path.startswith(part.classes[label]) for path, label in zip(part.paths, part.labels, strict=True))


@pytest.mark.parametrize(
    "suffix", ["@pareto=6,most=99999999999999999999999", "@repeat=2,shift=99999999999999999999", "@repeat=1000000000"]
)
def test_numbers_beyond_sense_are_refused(suffix):
    with pytest.raises(SourceError, match=r"2\^31"):
        open_images(f"turntable,objects=12,classes=4,frames=2,size=8,imbalance=1{suffix}")
