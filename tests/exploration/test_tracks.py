"""Tracks, such as the objects of a turntable: `embed` writes them, `explore` filters by them, the rest ignores them."""

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import colour_by, count, element
from table_samples import write_encoder

import crosslevel
from crosslevel.curation.curate import curate
from crosslevel.data.open import open_images
from crosslevel.evaluation.labelling.classify import classify
from crosslevel.exploration.explore import explore
from crosslevel.retrieval.search import search

SOURCE = "turntable:train,classes=3,objects=6,frames=5,size=16,imbalance=1"
QUIET = {"device": "cpu", "quiet": True, "workers": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracks")
    write_encoder(folder / "run")
    crosslevel.embed(folder / "run", SOURCE, output=folder / "f.parquet", thumbnails=16, **QUIET)
    return folder


@pytest.fixture(scope="module")
def page(home):
    return Path(explore(str(home / "f.parquet"), export=str(home / "page"), quiet=True))


def test_embed_writes_the_tracks_of_a_source_that_knows_them(home):
    table, source = pq.read_table(home / "f.parquet"), open_images(SOURCE)
    assert table.column_names == ["path", "label", "class", "track", "feature", "image"]
    assert table["track"].to_pylist() == source.tracks.tolist()
    assert len(set(table["track"].to_pylist())) == 6


def test_explore_has_them_as_a_column(home, page):
    told = json.loads(page.with_name("data.js").read_text().removeprefix("const DATA = ").rstrip().removesuffix(";"))
    column = told["columns"]["track"]
    values = np.frombuffer(base64.b64decode(column["values"]), "<u2")
    assert [int(column["names"][value]) for value in values] == open_images(SOURCE).tracks.tolist()


@pytest.mark.browser
def test_browser_filters_by_track(browser, page):
    browser.get(page.as_uri())
    colour_by(browser, "track")
    element(browser, "#none").click()
    for track, frames in ((4, 5), (2, 10)):
        element(browser, f"input[data-name='{track}']").click()
        assert count(browser) == frames
    kept = browser.execute_script("return [...Array(30).keys()].filter((i) => state.shown[i])")
    tracks = open_images(SOURCE).tracks.tolist()
    assert kept == [i for i, track in enumerate(tracks) if track in (2, 4)]


def test_search_curate_classify_and_the_parquet_reader_do_not_mind_them(home):
    table = str(home / "f.parquet")
    paths = open_images(SOURCE).paths
    found = search(table, paths[0], k=3, quiet=True)[0]["matches"]
    assert len(found) == 3
    kept = curate(table, n=6, output=str(home / "kept.txt"), quiet=True)
    assert len(kept.paths) == 6
    labelled = f"{table},column=image,label=class"
    opened = open_images(labelled)
    assert (len(opened), opened.tracks, len(opened.classes)) == (30, None, 3)
    made = classify(str(home / "run"), labelled, labelled, precision="fp32", **QUIET)
    assert len(made.labels) == 30
