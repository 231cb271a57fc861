"""From a collection to one that is searched, looked at, cleaned and labelled, as the six commands of docs/use.md.

What they leave is read, and its pages are used in a browser.
"""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from browsing import count, element, elements, in_view, loaded, move, opened, where
from PIL import Image
from sklearn.datasets import load_sample_image
from table_samples import write_encoder

from crosslevel.cli import main
from crosslevel.data.open import open_images
from crosslevel.features.table import open_table

CLOTHING = Path(os.environ.get("CROSSLEVEL_DATA", os.devnull), "clothing").resolve()
GARMENTS = ("dress", "hat", "pants", "shoes")
EACH, NEW = 60, 16  # photographs of a garment to learn from, and to classify
COPIES, BLACK = ("dress/copy.jpg", "hat/copy.jpg", "shoes/copy.jpg"), "pants/black.jpg"

TURNTABLE = "classes=3,objects=12,imbalance=1,size=16,test_objects=4"
ON_CPU = ("--device=cpu", "--workers=0")
SMALL = ("--encoder.width=0.0625", "--epochs=2", "--report_html=false", "--monitor_every=0")
TINY = (*SMALL, "--batch_size=12", "--views.size=16", "--cld.groups=4")
DESK, TELEPHONE = (1280, 900), (480, 900)


class Journey(NamedTuple):
    """Where the six commands were given, and of what."""

    folder: Path
    run: str
    images: str
    others: str
    query: str
    opened: Any


def photographs(folder, count, seed):
    """Pieces of two photographs, each in a folder of its name."""
    draws = np.random.default_rng(seed)
    for name in ("china", "flower"):
        photo = load_sample_image(f"{name}.jpg")
        (folder / name).mkdir(parents=True)
        for i in range(count):
            top, left = draws.integers(0, photo.shape[0] - 64), draws.integers(0, photo.shape[1] - 96)
            Image.fromarray(photo[top : top + 64, left : left + 96]).save(folder / name / f"{i:02}.jpg", quality=95)
    return folder


def clothing(folder, part, each):
    """The first photographs of some garments."""
    for name in GARMENTS:
        (folder / name).mkdir(parents=True)
        for i, file in enumerate(sorted((CLOTHING / part / name).iterdir())[:each]):
            shutil.copy(file, folder / name / f"{i:03}.jpg")
    return folder


def start_turntable(folder):
    images = f"turntable,frames=4,{TURNTABLE}"
    main(["train", images, "--run", "run", *TINY, *ON_CPU])
    return "run", images, f"turntable:test,frames=4,{TURNTABLE}", open_images(images).paths[5]


def start_photographs(folder):
    """The run is ready: its random features tell the two photographs apart."""
    write_encoder(folder / "run")
    photographs(folder / "photos", 20, seed=0)
    photographs(folder / "new", 8, seed=1)
    return "run", "photos", "new", "photos/china/05.jpg"


def start_clothing(folder):
    """Photographs, of three a copy, and a black picture; a small network is trained on them."""
    photos = clothing(folder / "photos", "train", EACH)
    clothing(folder / "new", "test", NEW)
    for copy in COPIES:
        Image.open(photos / copy.replace("copy", "005")).save(photos / copy, quality=80)
    Image.new("RGB", (128, 171)).save(photos / BLACK)
    main(["train", "photos", "--run", "run", *SMALL, "--batch_size=32", "--views.size=32", *ON_CPU])
    return "run", "photos", "new", "photos/hat/005.jpg"


SOURCES = {"turntable": start_turntable, "photographs": start_photographs, "clothing": start_clothing}
NEEDS_CLOTHING = pytest.mark.skipif(not CLOTHING.is_dir(), reason="CROSSLEVEL_DATA names no folder with clothing")


@pytest.fixture(scope="module", params=["turntable", "photographs", pytest.param("clothing", marks=NEEDS_CLOTHING)])
def journey(request, tmp_path_factory):
    """The six commands, given once in a folder of their own."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run, images, others, query = SOURCES[request.param](folder)
        main(["embed", run, images, "-o", "features.parquet", "--thumbnails", "32", *ON_CPU])
        main(["search", "features.parquet", query, "-k", "5", "-o", "found", *ON_CPU])
        main(["explore", "features.parquet", "--export", "page", "--device=cpu"])
        main(["curate", "features.parquet", "-n", "6", "--outliers=keep", "-o", "few.txt", "--device=cpu"])
        main(["classify", run, images, others, "-o", "predictions.parquet", *ON_CPU])
        yield Journey(folder, run, images, others, query, open_images(images))


def found(journey):
    """The query's matches."""
    (result,) = json.loads((journey.folder / "found" / "search.json").read_text())["results"]
    return [match["path"] for match in result["matches"]]


def fates(journey):
    """Why each image that is not among the chosen was left out, by its path."""
    with (journey.folder / "few.csv").open() as file:
        return {row["path"]: row["why"] for row in csv.DictReader(file) if row["kept"] == "no"}


def test_six_commands_lead_from_images_to_their_use(journey):
    folder, opened = journey.folder, journey.opened
    table = open_table(folder / "features.parquet")
    assert table.paths == list(opened.paths)
    assert {"feature", "image"} <= set(table.names)

    paths = found(journey)
    assert len(set(paths) & set(opened.paths)) == 5
    assert not any(journey.query.endswith(path) for path in paths)
    page = (folder / "found" / "search.html").read_text()
    assert page.count("data:image/png") == 6
    assert all(path in page for path in paths)

    written = {file.relative_to(folder / "page").as_posix() for file in (folder / "page").rglob("*")}
    assert {"index.html", "explore.js", "explore.css", "data.js"} <= written

    part = open_images(f"{journey.images}@list={folder / 'few.txt'}")
    assert len(part) == len(set(part.paths) & set(opened.paths)) == 6
    assert {(folder / f"few.{kind}").is_file() for kind in ("csv", "html")} == {True}

    predictions = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert predictions["path"] == list(open_images(journey.others).paths)
    assert set(predictions["label"]) <= set(opened.classes)
    assert all(0 < probability <= 1 for probability in predictions["probability"])
    right = [name in path for name, path in zip(predictions["label"], predictions["path"], strict=True)]
    if journey.images == "photos":  # of the turntable, two epochs tell nothing
        assert np.mean(right) > (0.8 if len(opened.classes) == 2 else 0.35)


def tidy(browser, file, size):
    """Open a page in a window of this size: nothing overflows, and nothing is complained of."""
    opened(browser, file.as_uri(), *size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert browser.get_log("browser") == []


def click_to_open(browser, picture, file):
    """A click on a picture opens its file."""
    picture.click()
    assert browser.current_url == file.as_uri()
    loaded(browser)
    browser.back()


@pytest.mark.browser
def test_browser_shows_what_a_search_found(browser, journey):
    for size in (TELEPHONE, DESK):
        tidy(browser, journey.folder / "found" / "search.html", size)
    assert loaded(browser, ".pictures img") == [journey.query, *found(journey)]
    assert found(journey)[0] in element(browser, ".verdict").text
    assert [cell.text for cell in elements(browser, "tbody td:first-child")] == found(journey)
    if journey.images == "photos":  # a turntable has no files
        assert found(journey)[0] == COPIES[1] or len(journey.opened.classes) == 2
        for i, path in enumerate(found(journey)[:2]):
            click_to_open(browser, elements(browser, ".pictures a")[i], journey.folder / "photos" / path)


@pytest.mark.browser
@pytest.mark.parametrize("size", [TELEPHONE, DESK])
def test_browser_explores_by_clicks_and_filters(browser, journey, size):
    tidy(browser, journey.folder / "page" / "index.html", size)
    paths, labels = list(journey.opened.paths), journey.opened.labels
    features = open_table(journey.folder / "features.parquet").features
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    place = where(browser, 5)
    move(browser, [place])
    point = int(element(browser, "#tip").get_attribute("data-point"))
    loaded(browser, "#tip img")
    move(browser, [place], press=True)
    for _ in range(2):  # a point of the map, then an image that is like it
        assert element(browser, "#path").text == paths[point]
        loaded(browser, "#chosen img")
        assert in_view(browser, "#chosen > img")
        assert in_view(browser, "#similar button")
        near = [int(button.get_attribute("data-point")) for button in elements(browser, "#similar button")]
        cosines = unit @ unit[point]
        assert point not in near
        assert np.allclose(cosines[near], np.sort(np.delete(cosines, point))[::-1][: len(near)], atol=1e-4)
        point = near[0]
        element(browser, "#similar button").click()

    assert count(browser) == len(paths)
    name, hidden = journey.opened.classes[0], sum(label == 0 for label in labels)
    element(browser, f"input[data-name='{name}']").click()
    assert count(browser) == len(paths) - hidden < len(paths)
    element(browser, "#find").send_keys(paths[-1])
    assert count(browser) == 1
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_browser_shows_what_stays_and_what_went(browser, journey):
    for size in (TELEPHONE, DESK):
        tidy(browser, journey.folder / "few.html", size)
    headings = [section.text for section in elements(browser, "section h2")]
    shown = {
        heading.partition(":")[0].partition(",")[0]: loaded(browser, f"#section-{i + 1} .pictures img")
        for i, heading in enumerate(headings)
        if elements(browser, f"#section-{i + 1} .pictures")
    }
    kept = [line.split("\t")[0] for line in (journey.folder / "few.txt").read_text().splitlines()]
    assert shown["Chosen"] == kept
    why = fates(journey)
    for heading in ("Near-duplicates", "Broken"):
        left_out = {path for path, reason in why.items() if reason.startswith(heading.lower().rstrip("s"))}
        assert left_out <= set(shown.get(heading, []))
        assert bool(left_out) == (heading in shown)
    if BLACK not in journey.opened.paths:
        return
    assert shown["Broken"] == [BLACK]
    for copy in COPIES:
        pair = {copy, copy.replace("copy", "005")}
        assert pair <= set(shown["Near-duplicates"])
        assert any(why.get(path, "").removeprefix("near-duplicate of ") in pair for path in pair)
    pictures = elements(browser, f"#section-{headings.index('Broken') + 1} .pictures a")
    click_to_open(browser, pictures[0], journey.folder / "photos" / BLACK)
