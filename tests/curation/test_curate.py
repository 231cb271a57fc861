"""What is kept: one of near-duplicates, nothing broken, what lies alone named; a list that a source reads."""

import csv

import pytest
import torch
from run_samples import write_images
from table_samples import crowds, noise_pictures, write_encoder, write_table

import crosslevel
from crosslevel.cli import main
from crosslevel.curation.curate import curate
from crosslevel.curation.findings import broken, findings_of
from crosslevel.data.open import open_images
from crosslevel.features.columns.thumbnails import Pictures
from crosslevel.features.table import open_table
from crosslevel.settings.parser import run


@pytest.fixture
def table(tmp_path):
    """60 images in crowds: 3 and 40 are copies of 7, 11 is black, 12 white, 13 lacks its lower half, 59 is alone."""
    features, _ = crowds([25, 25, 10], width=32, noise=0.12)
    pictures = noise_pictures(60)
    for copy in (3, 40):
        features[copy] = features[7] + 0.002 * torch.randn(32, generator=torch.Generator().manual_seed(copy))
        pictures[copy] = pictures[7]
    features[59] = -features[:59].mean(0) + torch.eye(32)[31] * 3
    pictures[11], pictures[12] = (
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.full((3, 32, 32), 255, dtype=torch.uint8),
    )
    pictures[13] = pictures[13].clone()
    pictures[13][:, 16:] = 128
    return write_table(tmp_path / "f.parquet", features, pictures=pictures)


def test_copies_broken_looks_and_outliers_go_and_are_told(table, tmp_path):
    kept = curate(str(table), output=str(tmp_path / "kept.txt"), quiet=True)
    why = kept.left_out
    copies = {path: told for path, told in why.items() if told.startswith("near-duplicate")}
    assert len(copies) == 2
    (first,) = {told.removeprefix("near-duplicate of ") for told in copies.values()}
    assert {*copies, first} == {"003.png", "007.png", "040.png"}
    assert (why["011.png"], why["012.png"]) == ("broken: black", "broken: white")
    assert why["013.png"] == "broken: its lower part is missing"
    assert why["059.png"].startswith("outlier: ")
    assert len(why) == 6
    assert sorted([*kept.paths, *why]) == [f"{i:03}.png" for i in range(60)]
    with (tmp_path / "kept.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert {path for path, row in rows.items() if row["kept"] == "yes"} == set(kept.paths)
    assert all(rows[path]["why"] == told for path, told in why.items())
    page = (tmp_path / "kept.html").read_text()
    for heading in ("Near-duplicates", "Broken", "Outliers", "Some of what stays"):
        assert heading in page


def test_what_is_alike_in_features_alone_is_no_copy(table):
    opened = open_table(table)
    features, pictures = opened.features, Pictures(opened)
    assert (findings_of(features, pictures).sets >= 0).sum() == 3
    other = features.clone()
    other[20] = features[21] + 1e-4  # as near as a copy, but another picture
    assert (findings_of(other, pictures).sets >= 0).sum() == 3


def test_kept_on_request(table):
    kept = curate(str(table), outliers="keep", duplicates="keep", quiet=True)
    assert set(kept.left_out) == {"011.png", "012.png", "013.png"}


def test_a_picture_of_noise_is_not_broken():
    assert not any(map(broken, noise_pictures(20)))


def test_the_list_is_a_part_of_the_source(tmp_path, capsys):
    photos, folder = write_images(tmp_path / "photos", count=12), write_encoder(tmp_path / "run")
    table = crosslevel.embed(
        folder, photos, output=tmp_path / "f.parquet", device="cpu", quiet=True, workers=0, thumbnails=32
    )
    line = [str(table), "-n", "9", "-o", str(tmp_path / "nine.txt"), "--how=diverse"]
    chosen = run(curate, line)
    source = f"{photos}@list={tmp_path / 'nine.txt'}"
    images = open_images(source)
    assert list(images.paths) == chosen.paths
    assert images.classes == ["cat", "dog"]
    assert f"crosslevel train {source}" in capsys.readouterr().out


def test_wrong_use_ends_in_one_line(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "empty.parquet", torch.zeros(0, 8))
    cases = [
        (["none.parquet"], "there is no such table"),
        (["empty.parquet"], "has 0 rows"),
        ([str(table), "-n", "0"], "give 1 to 60"),
        ([str(table), "-n", "61"], "give 1 to 60"),
        ([str(table), "-n", "5", "-o", "x.csv"], "ends in .txt"),
        ([str(table), "--how=best"], "balanced"),
        ([str(table), "--threshold=2"], "between 0 and 1"),
    ]
    for line, named in cases:
        with pytest.raises(SystemExit) as stop:
            main(["curate", *line])
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1), said
        assert named in said, (line, said)
