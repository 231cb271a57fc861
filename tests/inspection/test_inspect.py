"""What is in a collection: by the command line, on images whose truth is known."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.open import open_images
from crosslevel.inspection.inspect import inspect
from crosslevel.inspection.page import headline
from crosslevel.inspection.sketch import Sketch, Sketching, sketch
from crosslevel.inspection.summary import trust
from crosslevel.models.encoder import View
from crosslevel.settings.parser import run
from crosslevel.utils.errors import SourceError


def smooth(rng, size=48):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 different images; of the first 3 another copy each, of the next 4 a shifted one; one broken file."""
    home, rng = tmp_path_factory.mktemp("data") / "my <b>photos", np.random.default_rng(0)
    home.mkdir()
    for i in range(24):
        picture = smooth(rng)
        Image.fromarray(picture).save(home / f"{i:02}.png")
        if i < 3:
            Image.fromarray(picture).save(home / f"{i:02}-copy.bmp")
        elif i < 7:
            Image.fromarray(np.roll(picture, (2, -1), (0, 1))).save(home / f"{i:02}-moved.png")
    Image.fromarray(smooth(rng, 300)[:150]).save(home / "wide.jpg")
    (home / "x<script>.png").write_bytes(b"\x89PNG nothing")
    return home


def test_counts_sizes_damage_and_duplicates_by_the_command_line(photos, tmp_path, capsys):
    told = run(inspect, [str(photos), "-o", str(tmp_path / "out"), "--device=cpu", "--workers=0", "--batch_size=8"])
    assert (told["count"], told["readable"]) == (33, 32)
    assert list(told["broken"]) == ["x<script>.png"]
    assert told["formats"] == {"png": 28, "bmp": 3, "jpg": 1}
    assert told["width"] == [48, 48, 48, 48, 300]
    assert told["height"][4] == 150
    assert told["shorter_side"] == {"32 to 63": 31, "128 to 255": 1}
    assert told["exact_duplicates"] == {"sets": 3, "superfluous": 3}
    near = told["near_duplicates"]
    assert (near["tracks"], near["images_in_tracks_of_several"], near["largest_track"]) == (25, 14, 2)
    assert told["batch"]["duplicate_share"] == pytest.approx(14 / 32 * 7 / 31)
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == told
    said = capsys.readouterr().out
    assert "x<script>.png: " in said
    assert "3 in 3 sets" in said


@pytest.mark.parametrize(
    ("output", "says"),
    [("a.html", "ends in .json"), ("FILE/x", "Not a directory"), ("FOLDER.json", "FOLDER.json cannot be written")],
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, capsys, output, says):
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        run(inspect, [str(tmp_path / "no images"), "-o", str(tmp_path / output), "--device=cpu"])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_the_page_escapes_names_and_shows_pictures(photos, tmp_path):
    run(inspect, [str(photos), "-o", str(tmp_path / "a.json"), "--device=cpu", "--workers=0"])
    page = (tmp_path / "a.html").read_text()
    assert "x<script>.png" not in page
    assert "x&lt;script&gt;.png" in page
    assert "<b>photos" not in page
    assert page.count("data:image/png") > 14
    for heading in ("Near-duplicates", "Copies: the image to keep is framed", "Broken files", "Suggested settings"):
        assert heading in page


def test_no_group_is_drawn_that_is_not_to_be_trusted(photos, tmp_path):
    run(inspect, [str(photos), "-o", str(tmp_path / "a.json"), "--device=cpu", "--workers=0"])
    assert "Estimated groups" not in (tmp_path / "a.html").read_text()
    (tmp_path / "apart").mkdir()
    rng = np.random.default_rng(1)
    for colour, name in enumerate(("red", "green", "blue")):
        for i in range(12):
            picture = smooth(rng).astype(int) // 4
            picture[:, :, colour] += 180
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "apart" / f"{name}-{i}.png")
    told = run(inspect, [str(tmp_path / "apart"), "-o", str(tmp_path / "b.json"), "--device=cpu", "--workers=0"])
    assert told["long_tail"]["separation"] > 0.25
    page = (tmp_path / "b.html").read_text()
    assert "Estimated groups: tracks in each" in page
    assert "Estimated groups, the largest first" in page


def test_duplicates_are_named(photos, tmp_path, capsys):
    told = run(inspect, [str(photos), "-o", str(tmp_path), "--device=cpu", "--workers=0"])
    with open(tmp_path / "duplicates.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    gone = {row["path"]: row["kind"] for row in rows if row["keep"] == "no"}
    assert {f"{i:02}.png" for i in range(3)} == {path for path, kind in gone.items() if kind == "exact"}
    assert [row["path"] for part in told["duplicates"]["sets"] for row in part] == [row["path"] for row in rows]
    assert told["duplicates"]["superfluous"] == len(gone)
    assert "00-copy.bmp" in (tmp_path / "inspect.html").read_text()
    assert "duplicates.csv" in capsys.readouterr().out.replace("\n", "")


def test_what_is_in_another_source_as_well_is_named(photos, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    rng = np.random.default_rng(7)
    for i in range(6):
        Image.fromarray(smooth(rng)).save(tmp_path / "test" / f"new-{i}.png")
    Image.open(photos / "09.png").save(tmp_path / "test" / "old.png")
    told = run(inspect, [str(photos), f"--beside={tmp_path / 'test'}", "-o", str(tmp_path / "out"), "--workers=0"])
    assert told["beside"]["matches"] == [{"path": "09.png", "beside": "old.png", "kind": "exact", "distance": 0.0}]
    assert told["beside"]["count"] == 7
    assert (tmp_path / "out" / "beside.csv").read_text() == "path,beside,kind,distance\n09.png,old.png,exact,0.0\n"
    assert "has as well" in (tmp_path / "out" / "inspect.html").read_text()
    assert "exact 1" in capsys.readouterr().out


def test_where_no_figure_of_the_tail_is_given_one_line_says_so(photos, capsys):
    told = run(inspect, [str(photos), "--workers=0", "--device=cpu"])
    assert told["long_tail"]["separation"] < 0.25
    out = capsys.readouterr().out
    part = out[out.index("Long tail") : out.index("Suggested settings")]
    assert sum("│" in line for line in part.splitlines()) == 1
    assert "no figure" in part


def test_a_run_adds_its_features(photos, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(32)
    encoder.save(tmp_path / "encoder.safetensors")
    told = run(inspect, [str(photos), f"--run={tmp_path}", "--device=cpu", "--workers=0", "--precision=fp32"])
    assert str(tmp_path) in told["long_tail"]["features"]
    assert 0 < told["near_duplicates"]["cosine_threshold"] <= 1
    assert told["near_duplicates"]["pairs_by_features"] >= 3
    assert told["near_duplicates"]["tracks"] <= 25
    assert list((tmp_path / "features").glob("inspect-*/complete"))


def test_groups_that_run_into_one_another_are_not_to_be_trusted(photos, capsys):
    told = run(inspect, [str(photos), "--workers=0", "--device=cpu", "--groups=3"])["long_tail"]
    assert len(told["by_track"]["sizes"]) <= 3
    assert told["trust"] == trust(told["separation"])
    assert trust(0.249).startswith("no figure")
    assert trust(0.25).startswith("the groups lie apart")


def test_a_sample_is_said_to_be_one(photos, capsys):
    told = run(inspect, [str(photos), "--sample=10", "--workers=0", "--device=cpu"])
    assert (told["count"], told["looked_at"]) == (33, 10)
    assert "10 of them read" in capsys.readouterr().out


def test_a_full_scan_counts_all_images_and_compares_the_sample(photos, tmp_path, capsys):
    usual = [str(photos), "--workers=0", "--device=cpu", "-o", str(tmp_path)]
    everything = run(inspect, usual)
    figures = run(inspect, [*usual, "--sample=10", "--full_scan=true"])
    assert (figures["count"], figures["looked_at"], figures["compared"]) == (33, 33, 10)
    for name in ("readable", "broken", "width", "height", "shorter_side", "formats", "exact_duplicates"):
        assert figures[name] == everything[name]
    sampled = run(inspect, [*usual, "--sample=10"])
    for name in ("duplicates", "near_duplicates", "long_tail", "batch"):
        assert figures[name] == sampled[name]
    with open(tmp_path / "exact_copies.csv", newline="") as stream:
        rows = [(row["set"], row["path"]) for row in csv.DictReader(stream)]
    assert rows == [(str(i + 1), path) for i in range(3) for path in sorted((f"{i:02}.png", f"{i:02}-copy.bmp"))]
    said = capsys.readouterr().out
    assert "all read, 10 of them compared" in " ".join(said.split())
    assert "% of the compared images have" in headline(figures) or "No two compared images" in headline(figures)
    assert "exact_copies.csv" in said.replace("\n", "")


def test_sketches_merge_to_that_of_the_whole_in_any_order(photos):
    source, sampled = open_images(str(photos)), torch.arange(0, 33, 3)
    whole, parts = Sketching(source, sampled)[range(33)], Sketch()
    for key in (range(20, 33), range(7), range(7, 20)):
        parts.merge(Sketching(source, sampled)[key])
    assert parts.exact_copies() == whole.exact_copies()
    assert len(whole.exact_copies()) == 3
    for name in ("looked_at", "readable", "width", "height", "shorter_side", "formats", "broken"):
        assert getattr(parts, name) == getattr(whole, name)
    records = [torch.cat(column) for column in zip(*parts.sample, strict=True)]
    order = records[-1].argsort()
    for column, alone in zip(records, whole.sample[0], strict=True):
        assert torch.equal(column[order], alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sketch_of_many_parts_is_that_of_one(photos, tmp_path, workers):
    """Two parts have no image that can be read."""
    for file in photos.iterdir():
        shutil.copy(file, tmp_path)
    for i in range(8):
        (tmp_path / f"000{i}.png").write_bytes(b"\x89PNG nothing")
    source, sampled = open_images(str(tmp_path)), torch.arange(1, 41, 3)
    whole, records = sketch(source, sampled, BadFiles(), 0, at_once=64)
    parts, joined = sketch(source, sampled, BadFiles(), workers, at_once=4)
    assert (whole.looked_at, whole.readable) == (41, 32)
    assert parts.exact_copies() == whole.exact_copies()
    assert len(whole.exact_copies()) == 3
    for name in ("looked_at", "readable", "width", "height", "shorter_side", "formats"):
        assert getattr(parts, name) == getattr(whole, name)
    assert all(torch.equal(a, b) for a, b in zip(records, joined, strict=True))


def test_a_full_scan_whose_sample_cannot_be_read_says_so(photos):
    source = open_images(str(photos))
    broken = [i for i, path in enumerate(source.paths) if path == "x<script>.png"]
    with pytest.raises(SourceError, match="fewer than 2 of 1 sampled images can be read"):
        sketch(source, torch.tensor(broken), BadFiles(), 0)


@pytest.mark.parametrize(
    ("options", "named"), [(["nowhere"], "nowhere"), (["PHOTOS", "--batch_size=1"], "batch_size=1")]
)
def test_wrong_use_ends_in_one_line(photos, capsys, options, named):
    with pytest.raises(SystemExit) as stop:
        run(inspect, [str(photos) if o == "PHOTOS" else o for o in options])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in said
    assert said.count("\n") == 1
