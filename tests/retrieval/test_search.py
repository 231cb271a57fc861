"""The nearest images: right, told in three ways, of the right encoder; and what cannot be done in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_samples import write_images
from table_samples import crowds, write_encoder, write_table

import crosslevel
from crosslevel.cli import main
from crosslevel.features.table import open_table
from crosslevel.retrieval.search import exact, search
from crosslevel.settings.parser import run

QUIET = {"device": "cpu", "quiet": True, "workers": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a run, and a table of their features with pictures."""
    folder = tmp_path_factory.mktemp("search")
    write_images(folder / "photos", count=10)
    write_encoder(folder / "run")
    crosslevel.embed(
        folder / "run", folder / "photos", output=folder / "f.parquet", precision="fp32", thumbnails=32, **QUIET
    )
    return folder


def by_hand(queries, keys, k):
    """Cosines in float64, sorted."""
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (queries, keys))
    return (a @ b.T).sort(dim=1, descending=True, stable=True)[1][:, :k]


@pytest.mark.parametrize("count", [1, 40])
def test_exact_neighbours_are_those_of_float64(count):
    draws = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(500, 24, generator=draws), torch.randn(count, 24, generator=draws)
    found = exact(queries, 3 * keys, 7)
    assert torch.equal(found.indices, by_hand(queries, keys, 7))
    assert (found.values.diff(dim=1) <= 0).all()


def test_rows_that_lie_in_several_blocks_are_all_compared():
    draws = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(100, 8, generator=draws), torch.randn(3, 8, generator=draws)
    assert torch.equal(exact(queries, keys, 50, block=32).indices, by_hand(queries, keys, 50))


def test_a_copy_finds_the_image_and_then_its_nearest(home, tmp_path):
    file = shutil.copy(home / "photos" / "cat" / "003.png", tmp_path)
    (found,) = search(str(home / "f.parquet"), str(file), k=4, precision="fp32", **QUIET)
    table = crosslevel.embed(home / "run", home / "photos", precision="fp32", **QUIET)
    features = torch.from_numpy(table.features)
    own = table.paths.index("cat/003.png")
    assert [match["row"] for match in found["matches"]] == by_hand(features[own : own + 1], features, 4)[0].tolist()
    assert found["matches"][0] == {"path": "cat/003.png", "distance": pytest.approx(0, abs=1e-5), "row": own}


def test_a_long_path_is_printed_in_one_piece(tmp_path, capsys, monkeypatch):
    """So that it can be copied, however narrow the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    paths = [f"{'a folder [of] photographs/' * 6}{i}.png" for i in range(3)]
    write_table(tmp_path / "t.parquet", np.eye(3), paths)
    main(["search", "t.parquet", paths[0], "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"like {paths[0]}"
    assert lines[2:4] == [f"{i:>3} {1:>8.4f}  {path}" for i, path in enumerate(paths[1:], 1)]


@pytest.mark.parametrize("index", ["off", "on"])
def test_an_image_of_the_table_is_no_result_of_its_own_search(home, tmp_path, monkeypatch, index):
    """By its path, however that is written, in JSON and by the index too; a copy elsewhere is another image."""
    if index == "on":
        pytest.importorskip("usearch", reason="needs usearch: pip install 'crosslevel[search]'")
    monkeypatch.chdir(home / "photos")
    (tmp_path / "link").symlink_to(home / "photos")
    table = shutil.copy(home / "f.parquet", tmp_path / "f.parquet")
    paths = open_table(table).paths
    names = ["cat/003.png", home / "photos" / "cat" / "003.png", "../photos/cat/003.png", tmp_path / "link/cat/003.png"]
    for query in map(str, names):
        line = [str(table), query, "-k", "20", f"--index={index}", "-o", str(tmp_path / "out"), "--workers=0"]
        (found,) = run(search, [*line, "--device=cpu"])
        assert sorted(match["path"] for match in found["matches"]) == sorted({*paths} - {"cat/003.png"})
        assert json.loads((tmp_path / "out" / "search.json").read_text())["results"] == [found]
    dogs = search(str(table), str(home / "photos" / "dog"), k=19, index=index, **QUIET)
    for found in dogs:
        assert sorted(match["path"] for match in found["matches"]) == sorted({*paths} - {f"dog/{found['query']}"})
    copy = shutil.copy(home / "photos" / "cat" / "003.png", tmp_path / "003.png")
    (found,) = search(str(table), str(copy), k=20, index=index, **QUIET)
    assert found["matches"][0]["path"] == "cat/003.png"
    assert len(found["matches"]) == 20


def test_moved_images_and_a_table_of_other_programs_are_known_by_their_paths(home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "moved")
    moved = str(tmp_path / "moved" / "cat" / "003.png")
    (found,) = search(str(home / "f.parquet"), moved, k=1, images=str(tmp_path / "moved"), **QUIET)
    assert found["matches"][0]["path"] != "cat/003.png"
    table = open_table(home / "f.parquet")
    full = [str(home / "photos" / path) for path in table.paths]
    plain = write_table(tmp_path / "plain.parquet", table.features, paths=full)
    (found,) = search(str(plain), full[3], k=20, run=str(home / "run"), **QUIET)
    assert sorted(match["row"] for match in found["matches"]) == [row for row in range(20) if row != 3]


def test_a_table_of_the_query_alone_has_no_result(tmp_path):
    table = write_table(tmp_path / "one.parquet", torch.eye(8)[:1])
    (found,) = search(str(table), "000.png", output=str(tmp_path / "out"), **QUIET)
    assert found == {"query": "000.png", "matches": []}
    assert (tmp_path / "out" / "search.html").is_file()


def test_a_row_of_the_table_is_a_query_without_the_encoder_and_does_not_find_itself(home, tmp_path):
    features, _ = crowds([5, 5])
    file = write_table(tmp_path / "t.parquet", features)
    (found,) = search(str(file), "002.png", k=4, **QUIET)
    assert sorted(match["row"] for match in found["matches"]) == [0, 1, 3, 4]


def test_a_folder_asks_for_each_of_its_images_and_leaves_json_and_a_page(home, tmp_path, capsys):
    line = [
        str(home / "f.parquet"),
        shutil.copytree(home / "photos" / "dog", str(tmp_path / "dog")),
        "-k",
        "3",
        "-o",
        str(tmp_path / "out"),
        "--device=cpu",
    ]
    results = run(search, [*line, "--workers=0"])
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "search.json").read_text())
    assert told["results"] == results
    assert told["rows"] == 20
    assert [len(result["matches"]) for result in results] == [3] * 10
    assert [result["matches"][0]["path"] for result in results] == [f"dog/{i:03}.png" for i in range(10)]
    page = (tmp_path / "out" / "search.html").read_text()
    assert page.count("data:image/png") == 10 * 4
    assert "10 queries among 20 images" in said
    assert "and 5 more queries" in said


def test_a_run_is_searched_by_a_table_that_is_made_once(home, tmp_path, capsys):
    folder = write_encoder(tmp_path / "run")
    (folder / "config.yaml").write_text(f"images: {home / 'photos'}\n")
    query = str(home / "photos" / "cat" / "000.png")
    first = search(str(folder), query, k=2, device="cpu", workers=0, precision="fp32")
    assert "once" in capsys.readouterr().out
    made = (folder / "collection.parquet").stat().st_mtime_ns
    assert search(str(folder), query, k=2, precision="fp32", **QUIET) == first
    assert (folder / "collection.parquet").stat().st_mtime_ns == made
    write_encoder(tmp_path / "run", seed=1)
    search(str(folder), query, k=2, precision="fp32", **QUIET)
    assert (folder / "collection.parquet").stat().st_mtime_ns != made


def test_wrong_use_ends_in_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "other", seed=3)
    (write_encoder(tmp_path / "cropped") / "config.yaml").write_text("images: VOC\ncrops: {margin: 0.1}\n")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "nothing").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "one.png")
    write_table(tmp_path / "empty.parquet", torch.zeros(0, 8))
    write_table(tmp_path / "unknown.parquet", torch.eye(8))
    write_table(tmp_path / "gone.parquet", torch.eye(8), about={"run": "/nowhere/run"})
    table = str(home / "f.parquet")
    cases = [
        (["none.parquet", "one.png"], "there is no such table"),
        (["text.jpg", "one.png"], "no Parquet table"),
        (["empty.parquet", "one.png"], "has 0 rows"),
        ([table, "one.png", "--run=other"], "of another encoder"),
        ([table, "text.jpg"], "is no image that can be read"),
        ([table, "nothing"], "holds no image"),
        ([table, "two.png"], "there is no such file, and no row"),
        ([table, "one.png", "-k", "0"], "at least 1"),
        ([table, "one.png", "-o", "x.html"], "--output x.html"),
        (["unknown.parquet", "one.png"], "give --run"),
        (["gone.parquet", "one.png"], "which is not there"),
        (["other", "one.png"], "give --images"),
        (["cropped", "one.png"], "crosslevel embed cropped VOC --crops"),
        (["other", "one.png", "--run=other"], "is an encoder already"),
    ]
    for line, named in cases:
        with pytest.raises(SystemExit) as stop:
            main(["search", *line, "--device=cpu"])
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1), said
        assert named in said, (line, said)
