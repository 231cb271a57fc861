"""Tables for other programs: Lance opened again by Lance, a data set for FiftyOne by its own importer."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from container_samples import labelled, write_tar
from run_samples import write_images
from table_samples import write_encoder

import crosslevel
from crosslevel.cli import main
from crosslevel.utils.errors import UserError

QUIET = {"device": "cpu", "workers": 0, "quiet": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    write_images(folder / "photos", count=6)
    write_encoder(folder / "run")
    crosslevel.embed(folder / "run", folder / "photos", output=folder / "t.parquet", thumbnails=32, **QUIET)
    return folder


def test_a_lance_table_has_the_rows_of_the_parquet_table(home):
    lance = pytest.importorskip("lance", reason="needs pylance: pip install 'crosslevel[lance]'")
    file = crosslevel.embed(home / "run", home / "photos", output=home / "t.lance", thumbnails=32, **QUIET)
    opened, table = lance.dataset(str(file)), pq.read_table(home / "t.parquet")
    assert opened.to_table().equals(table)
    assert json.loads(opened.schema.metadata[b"crosslevel"])["view"]["size"] == 16
    query = np.array(table["feature"][7].as_py(), np.float32)
    found = opened.to_table(nearest={"column": "feature", "q": query, "k": 3, "metric": "cosine"}).to_pydict()
    assert found["path"][0] == table["path"][7].as_py()
    write_images(home / "more", count=2)
    crosslevel.embed(home / "run", home / "more", output=home / "t.lance", **QUIET)
    assert lance.dataset(str(file)).count_rows() == 4


@pytest.mark.skipif(not importlib.util.find_spec("embedding_atlas"), reason="needs it: pip install embedding-atlas")
def test_embedding_atlas_lays_out_the_parquet_table_with_its_pictures(tmp_path, home):
    write_images(tmp_path / "photos", count=20)
    file = crosslevel.embed(home / "run", tmp_path / "photos", output=tmp_path / "t.parquet", thumbnails=32, **QUIET)
    words = [str(file), "--vector", "feature", "--image", "image", "--export-application", str(tmp_path / "page")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # it would take a model of its own for a table without features
    subprocess.run([sys.executable, "-m", "embedding_atlas.cli", *words], env=environment, check=True)
    exported, table = pq.read_table(tmp_path / "page" / "data" / "dataset.parquet"), pq.read_table(file)
    shows = json.loads((tmp_path / "page" / "data" / "metadata.json").read_text())["props"]["data"]
    assert shows["image"] == "image"
    assert exported["path"].to_pylist() == table["path"].to_pylist()
    assert exported["image"].to_pylist() == table["image"].to_pylist()
    points = np.stack([exported[shows["projection"][axis]].to_numpy() for axis in "xy"])
    assert np.isfinite(points).all()
    assert (points.std(axis=1) > 0).all()


def vector(value):
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(value["$binary"]["base64"]))))


def imported(folder):
    """The samples as FiftyOne's importer makes them: no database is asked."""
    pytest.importorskip("fiftyone", reason="needs fiftyone, to import what was written: pip install fiftyone")
    from fiftyone.utils.data.importers import LegacyFiftyOneDatasetImporter

    importer = LegacyFiftyOneDatasetImporter(str(folder))
    importer.setup()
    return list(importer)


def test_a_data_set_for_fiftyone_names_the_files(home):
    folder = crosslevel.embed(home / "run", home / "photos", output=home / "t.fiftyone", **QUIET)
    samples, table = json.loads((folder / "samples.json").read_text())["samples"], pq.read_table(home / "t.parquet")
    assert [sample["filepath"] for sample in samples] == [str(home / "photos" / p) for p in table["path"].to_pylist()]
    assert [sample["ground_truth"]["label"] for sample in samples] == table["class"].to_pylist()
    np.testing.assert_array_equal([vector(s["feature"]) for s in samples], table["feature"].to_pylist())
    assert "version" not in json.loads((folder / "metadata.json").read_text())  # so FiftyOne takes it for this layout
    assert not (folder / "data").exists()


def test_images_that_are_no_files_are_small_pictures_for_fiftyone(home):
    write_tar(home / "a.tar", labelled(range(3)))
    with pytest.raises(UserError, match=r"FiftyOne shows files, and these images are none: give --thumbnails"):
        crosslevel.embed(home / "run", home / "a.tar", output=home / "s.fiftyone", **QUIET)
    folder = crosslevel.embed(home / "run", home / "a.tar", output=home / "s.fiftyone", thumbnails=32, **QUIET)
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == [f"data/{i:08}.jpg" for i in range(3)]
    assert all((folder / sample["filepath"]).read_bytes().startswith(b"\xff\xd8\xff") for sample in samples)


def test_fiftyones_own_importer_reads_it(home):
    folder = crosslevel.embed(home / "run", home / "photos", output=home / "i.fiftyone", thumbnails=32, **QUIET)
    table = pq.read_table(home / "t.parquet")
    for sample, path, feature, name in zip(
        imported(folder),
        table["path"].to_pylist(),
        table["feature"].to_pylist(),
        table["class"].to_pylist(),
        strict=True,
    ):
        assert (sample.filepath, sample.path) == (str(home / "photos" / path), path)
        assert sample.ground_truth.label == name
        np.testing.assert_array_equal(sample.feature, np.array(feature, np.float32))


def test_what_cannot_be_written_is_one_line(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for name in ("other.lance", "other.fiftyone"):
        (home / name).mkdir()
        (home / name / "mine.txt").write_text("mine")
    (home / "file.fiftyone").write_text("mine")
    cases = [
        (["embed", "run", "photos", "-o", "other.fiftyone"], "there is something else in its place"),
        (["embed", "run", "photos", "-o", "file.fiftyone"], "there is something else in its place"),
        (["embed", "run", "photos", "-o", "x.csv"], "must end in .parquet, .npy, .lance, .fiftyone, or be a folder's"),
        (["embed", "run", "photos", "-o", "x.npy", "--thumbnails=32"], "pictures need"),
        (["search", "other.fiftyone", "photos/cat/000.png"], "is a table for other programs: give a Parquet table"),
    ]
    for line, what in cases:
        with pytest.raises(SystemExit) as ended:
            main([*line, "--device=cpu"])
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1), said
        assert what in said
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(UserError, match=r"a Lance table needs pylance: pip install 'crosslevel\[lance\]'"):
        crosslevel.embed(home / "run", home / "photos", output=home / "t.lance", **QUIET)
