"""Labels from labelled images: right, sure as often as they are right, and unknown for what is none of them."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from run_samples import write_images
from table_samples import write_encoder

from crosslevel.cli import main
from crosslevel.data.open import open_images
from crosslevel.evaluation.labelling.classify import classify
from crosslevel.evaluation.labelling.tracks import hold_out, tracks_of
from crosslevel.settings.parser import run

QUIET = {"device": "cpu", "quiet": True, "workers": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Red cats and blue dogs to learn from, others of them to label, and checkerboards that are neither."""
    folder = tmp_path_factory.mktemp("classify")
    write_images(folder / "labelled", count=40)
    write_images(folder / "asked", count=10, seed=1)
    draws = np.random.default_rng(2)
    for i in range(10):
        board = 255 * (np.indices((16, 16)).sum(0) // 4 % 2)[..., None] + draws.integers(-9, 9, (16, 16, 3))
        (folder / "strange").mkdir(exist_ok=True)
        Image.fromarray(board.clip(0, 255).astype(np.uint8)).save(folder / "strange" / f"{i}.png")
    write_encoder(folder / "run")
    return folder


@pytest.mark.parametrize("how", ["knn", "linear", "auto"])
def test_known_classes_are_labelled_and_strange_ones_unknown(home, how):
    made = classify(str(home / "run"), str(home / "labelled"), str(home / "asked"), how=how, **QUIET)
    right = [label == path.split("/")[0] for path, label in zip(made.paths, made.labels, strict=True)]
    assert np.mean(right) >= 0.95
    assert made.unknown.float().mean() <= 0.25
    assert made.about["how"] in ("knn", "linear")
    assert ((made.probability > 0.5) & (made.probability <= 1)).all()
    strange = classify(str(home / "run"), str(home / "labelled"), str(home / "strange"), how=how, **QUIET)
    assert strange.unknown.all()
    none = classify(str(home / "run"), str(home / "labelled"), str(home / "strange"), how=how, reject=0.0, **QUIET)
    assert not none.unknown.any()


@pytest.mark.parametrize("seed", [1, 2])
def test_images_of_classes_that_are_hard_to_tell_apart_are_not_all_unknown(home, tmp_path, seed):
    """Of eight classes six look the same. A linear classifier's best setting is then a matter of chance, and differs
    between a part of the labelled images and all of them."""
    for name, count, first in (("labelled", 16, 3), ("asked", 12, 4)):
        write_images(tmp_path / name, count=count, size=(8, 8), classes=[f"class-{c}" for c in range(8)], seed=first)
    line = [str(home / "run"), str(tmp_path / "labelled"), str(tmp_path / "asked")]
    made = classify(*line, how="linear", seed=seed, **QUIET)
    assert made.unknown.float().mean() < 0.3  # 0.05 are meant
    assert made.probability.mean() == pytest.approx(made.about["accuracy"], abs=0.15)


def test_the_table_has_a_row_for_each_image(home, tmp_path, capsys):
    output = tmp_path / "p.parquet"
    line = [str(home / part) for part in ("run", "labelled", "asked")]
    made = run(classify, [*line, "-o", str(output), "--device=cpu", "--workers=0"])
    table = pq.read_table(output)
    assert table.column_names == ["path", "label", "probability", "unknown", "distance"]
    assert table["path"].to_pylist() == made.paths
    assert table["label"].to_pylist() == made.labels
    assert table["unknown"].to_pylist() == made.unknown.tolist()
    said = capsys.readouterr().out
    assert f"20 images: {int(made.unknown.sum())} unknown" in said
    assert "held-out images are right" in said


def test_the_accuracy_that_is_told_is_that_of_other_objects(home):
    """Of eight frames an object; its frames are so alike that one of them held out is always recognized."""
    objects, seeds = "classes=4,objects=12,imbalance=1", range(5)
    told, right, tracks = [], [], 0
    for seed in seeds:
        line = [str(home / "run"), f"turntable,{objects},frames=8", f"turntable:test,{objects},test_objects=12"]
        made = classify(*line, how="knn", seed=seed, **QUIET)
        assert made.about["held_out"] == 8 * made.about["held_out_tracks"]
        tracks += made.about["held_out_tracks"]
        told.append(made.about["accuracy"])
        right.append(
            np.mean([label == path.split("/")[1] for path, label in zip(made.paths, made.labels, strict=True)])
        )
    true = np.mean(right)
    assert abs(np.mean(told) - true) <= 2.58 * math.sqrt(true * (1 - true) / tracks)


def write_sets(folder, classes, sets, copies=6, seed=0):
    """Pictures of coarse noise, each in several copies that differ by little; classes say nothing about looks."""
    draws = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for s in range(sets):
            picture = np.kron(draws.integers(40, 216, (8, 8, 3)), np.ones((4, 4, 1), np.int64))
            for i in range(copies):
                pixels = (picture + draws.integers(-3, 4, picture.shape)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{s}-{i}.png")
    return folder


def test_of_a_folder_whole_sets_of_near_duplicates_are_held_out(home, tmp_path, capsys):
    folder = write_sets(tmp_path / "sets", ("a", "b"), 10)
    options = {**QUIET, "quiet": False}
    made = classify(str(home / "run"), str(folder), str(folder), how="knn", k=3, **options)
    assert (made.about["held_out"], made.about["held_out_tracks"]) == (24, 4)
    assert "held out: 4 of 20 tracks of near-duplicates, whole\n" in capsys.readouterr().out
    images = open_images(str(folder))
    held = hold_out(images.labels, tracks_of(images, torch.arange(len(images)), 0), 0)
    outside, inside = ({p[:-5] for p, out in zip(images.paths, held.mask, strict=True) if out == o} for o in (1, 0))
    assert not outside & inside
    assert sorted(p[0] for p in outside) == ["a", "a", "b", "b"]


def test_a_class_of_one_track_trains_and_is_in_no_figure(home, tmp_path, capsys):
    folder = write_sets(tmp_path / "sets", ("a", "b"), 5)
    write_sets(tmp_path / "alone", ("c",), 1, seed=1)
    (tmp_path / "alone" / "c").rename(folder / "c")
    images = open_images(str(folder))
    held = hold_out(images.labels, tracks_of(images, torch.arange(len(images)), 0), 0)
    assert not held.mask[images.labels == 2].any()
    assert [int(held.mask[images.labels == c].sum()) for c in range(2)] == [6, 6]
    made = classify(str(home / "run"), str(folder), str(folder), how="auto", **{**QUIET, "quiet": False})
    assert "c" in made.labels
    assert "1 of 3 classes have one track each, and are in no figure below" in capsys.readouterr().out


def test_too_few_tracks_are_told(home, capsys):
    source = "turntable,classes=2,objects=2,imbalance=1,frames=12"
    made = classify(str(home / "run"), source, source, how="knn", **{**QUIET, "quiet": False})
    assert (made.about["held_out"], made.about["held_out_tracks"]) == (4, 0)
    assert "2 tracks of the source are too few to hold any out whole: single images are" in capsys.readouterr().out
    images = open_images(str(home / "labelled"))
    unknown = hold_out(images.labels, tracks_of(images, torch.arange(len(images)), 0, most=10), 0)
    assert (unknown.tracks, int(unknown.mask.sum())) == (0, 16)
    assert unknown.line.startswith("tracks are unknown")


def test_wrong_use_ends_in_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    for i, name in enumerate(["one/cat/0", "one/cat/1", "two/0", "two/1"]):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{name}.png")
    parts = [str(home / part) for part in ("run", "labelled", "asked")]
    cases = [
        (["nowhere", *parts[1:]], "nowhere"),
        ([parts[0], "two", parts[2]], "has no labels"),
        ([*parts[:2], "nowhere"], "nowhere"),
        ([*parts, "-o", "x.csv"], "must end in .parquet"),
        ([*parts, "--reject=1"], "reject=1"),
        (parts[:2], "IMAGES is missing"),
    ]
    for line, named in cases:
        with pytest.raises(SystemExit) as stop:
            main(["classify", *line, "--device=cpu"])
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1), said
        assert named in said, (line, said)
