"""`open_images`: what each kind of source becomes, and what a wrong one says."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosslevel.data.open import open_class, open_images
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError

SMALL = "classes=3,objects=30,frames=2,size=16,test_objects=3,test_frames=2"


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (9, 8, 7)).save(root / name, "PNG")


def test_a_folder_a_list_and_a_text_file(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    names = ["a/1.png", "b/2.png"]
    for source in (str(tmp_path), tmp_path):
        folder = open_images(source)
        assert list(folder.paths) == names
        assert folder.labels.tolist() == [0, 1]
    assert list(open_images([tmp_path / name for name in names]).paths) == [str(tmp_path / name) for name in names]
    (tmp_path / "list.TXT").write_text("\n".join(names))
    assert list(open_images(tmp_path / "list.TXT").paths) == names


def test_turntable_takes_its_parameters_by_name():
    got = open_images(f"turntable:test,{SMALL},seed=5")
    arguments = {key: int(value) for key, value in (pair.split("=") for pair in SMALL.split(","))}
    want = Turntable("test", **arguments, seed=5)
    np.testing.assert_array_equal(got.data.numpy(), want.data.numpy())
    assert got.name == f"turntable:test,{SMALL},seed=5"
    assert len(open_images(f"turntable,{SMALL}")) != len(got)


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "turntable/a.png", "turntable/b.png")
    assert list(open_images("turntable").paths) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "no such folder, file or data set: give a path, or one of cifar10, cifar100, turntable"),
        ("turntabel", "did you mean turntable?"),
        ("cifra10:test", "did you mean cifar10?"),
        ("", "no such folder, file or data set"),
        ("turntable:test,clases=3", "did you mean classes=3?"),
        ("turntable,whatever=3", "keys: split, classes"),
        ("turntable,classes", "turntable has no"),
        ("turntable:middle", "'middle'"),
        ("turntable:test,classes=many", "classes=many: needs a whole number"),
        ("turntable,imbalance=steep", "imbalance=steep: needs a number"),
        ("turntable,classes=-4", "classes=-4"),
        ("cifar10", "--data-root is missing"),
        ("cifar10:valid", "split=valid: use train or test"),
        ("cifar100:test,labels=super", "labels=super: use fine or coarse"),
    ],
)
def test_wrong_sources_say_what_to_do_in_one_line(source, says):
    with pytest.raises(SourceError) as caught:
        open_images(source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert source.partition(":")[0].partition(",")[0] in str(caught.value)


def test_wrong_paths(tmp_path):
    write(tmp_path, "one/a.png")
    (tmp_path / "empty").mkdir()
    for source, says in {
        "one": "needs at least 2 images",
        "empty": "no image found",
        "one/a.png": "a single file: give a folder, or a .txt file",
    }.items():
        with pytest.raises(SourceError, match=says):
            open_images(tmp_path / source)


def test_values_are_converted_by_annotation(monkeypatch):
    from crosslevel.data.images import InMemoryImages

    seen = {}

    class Probe(InMemoryImages):
        def __init__(
            self,
            whole: int = 1,
            real: float = 1.0,
            truth: bool = False,
            word: str = "",
            maybe: int | None = 3,
            parts: list[int] | None = None,
        ) -> None:
            seen.update(whole=whole, real=real, truth=truth, word=word, maybe=maybe)

    def probed(text):
        open_class(Probe, parse(text))

    probed("probe,whole=4,real=5,truth=yes,word=a=b,maybe=7")
    assert seen == {"whole": 4, "real": 5.0, "truth": True, "word": "a=b", "maybe": 7}
    assert [type(value) for value in seen.values()] == [int, float, bool, str, int]
    probed("probe,maybe=none,truth=0")
    assert seen["maybe"] is None
    assert seen["truth"] is False
    with pytest.raises(SourceError, match="truth=perhaps: needs true or false"):
        probed("probe,truth=perhaps")
    with pytest.raises(SourceError, match="parts=1: cannot be set"):
        probed("probe,parts=1")


@pytest.mark.skipif("CROSSLEVEL_DATA" not in os.environ, reason="CROSSLEVEL_DATA names no folder with cifar10-jpeg")
def test_cifar_as_jpeg_files():
    folder = Path(os.environ["CROSSLEVEL_DATA"]) / "cifar10-jpeg" / "test"
    got = open_images(folder)
    assert len(got) == 10_000
    assert got.labels.bincount().tolist() == [1000] * 10
    for i in range(0, 10_000, 997):
        with Image.open(folder / got.paths[i]) as image:
            want = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(got[i][0].permute(1, 2, 0).numpy() - want).max() <= 1
