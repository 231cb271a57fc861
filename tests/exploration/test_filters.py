"""Filters of a collection's page by what was found in it, and the list that the page without a server keeps."""

from pathlib import Path

import pytest
import torch
from browsing import colour_by, count, downloads, element, elements, loaded, move, opened, until, where
from table_samples import crowds, noise_pictures, write_table

from crosslevel.data.bad_files import escaped
from crosslevel.exploration.explore import explore, gather
from crosslevel.exploration.export import export_page
from crosslevel.utils.console import printer

COPIES, ALONE = [3, 7, 40], [239]
HOSTILE = ["tab\there.png", "line\nbreak.png", "back\\slash.png", "\\t.png", "return\r.png", "plain.png"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """240 images in four crowds: 3 and 40 are copies of 7, and 239 is like none."""
    features, _ = crowds([60] * 4, width=32, noise=0.12)
    pictures = noise_pictures(240)
    for copy in (3, 40):
        features[copy] = features[7] + 0.002 * torch.randn(32, generator=torch.Generator().manual_seed(copy))
        pictures[copy] = pictures[7]
    features[239] = -features[:239].mean(0) + torch.eye(32)[31] * 3
    file = write_table(tmp_path_factory.mktemp("filters") / "f.parquet", features, pictures=pictures)
    return gather(str(file), None, 1000, 0, printer(quiet=True))


@pytest.fixture(scope="module")
def exported(collection, tmp_path_factory):
    return export_page(collection, str(tmp_path_factory.mktemp("page")))


@pytest.fixture
def page(browser, exported):
    opened(browser, exported.as_uri())
    return browser


def shown(page):
    return page.execute_script("return [...state.shown.keys()].filter((i) => state.shown[i])")


def listed(page):
    """Each name of the column that colours, and how many images it says that it has."""
    rows = [item.text.rsplit("\n", 1) for item in elements(page, "#names li")]
    return {name: int(number) for name, number in rows}


@pytest.mark.browser
def test_browser_filters_by_near_duplicate_and_outlier(page):
    for column, points in (("near-duplicate", COPIES), ("outlier", ALONE)):
        colour_by(page, column)
        assert listed(page) == {"no": 240 - len(points), "yes": len(points)}
        element(page, "input[data-name=no]").click()
        assert shown(page) == points
        assert element(page, "#count").text == f"{len(points)} of 240 images"
        element(page, "input[data-name=yes]").click()
        assert count(page) == 0
        element(page, "#all").click()
        element(page, "input[data-name=yes]").click()
        assert shown(page) == [point for point in range(240) if point not in points]
        element(page, "#all").click()
        assert count(page) == 240


@pytest.mark.browser
def test_browser_keeps_a_filter_while_another_column_colours(page, collection):
    colour_by(page, "near-duplicate")
    element(page, "input[data-name=no]").click()
    colour_by(page, "outlier")
    assert shown(page) == COPIES
    element(page, "input[data-name=no]").click()
    assert shown(page) == []  # no copy is an outlier
    colour_by(page, "near-duplicate")
    assert not element(page, "input[data-name=no]").is_selected()
    element(page, "#all").click()
    assert shown(page) == ALONE
    copy, alone = where(page, COPIES[0]), where(page, ALONE[0])
    move(page, [copy])
    assert not element(page, "#tip").is_displayed()  # what is filtered out is not pointed at
    move(page, [alone], press=True)
    assert element(page, "#path").text == collection.paths[ALONE[0]]
    assert {"near-duplicate: no", "outlier: yes"} <= set(element(page, "#about").text.split(" · "))
    loaded(page, "#chosen img")
    assert page.get_log("browser") == []


@pytest.mark.browser
def test_browser_filters_by_group(page, collection):
    colour_by(page, "group")
    column = collection.columns["group"]
    groups = {name: (column.values == i).nonzero()[0].tolist() for i, name in enumerate(column.names)}
    assert listed(page) == {name: len(points) for name, points in groups.items()}
    assert sum(len(points) for points in groups.values()) == 240
    element(page, "#none").click()
    assert shown(page) == []
    first, *_, last = groups
    for name, points in ((first, groups[first]), (last, sorted(groups[first] + groups[last]))):
        element(page, f"input[data-name='{name}']").click()
        assert shown(page) == points
        assert count(page) == len(points)


@pytest.mark.browser
def test_browser_downloads_the_list_as_crosslevel_writes_it(browser, tmp_path):
    file = write_table(tmp_path / "f.parquet", torch.eye(6), HOSTILE, noise_pictures(6))
    opened(browser, Path(explore(str(file), export=str(tmp_path / "out"), quiet=True)).as_uri())
    downloads(browser, tmp_path)
    element(browser, "#lasso").click()
    move(browser, [(2, 2), (2, 897), (929, 897), (929, 2), (2, 2)], press=True)
    assert element(browser, "#circled").text == "6 images"
    element(browser, "#save").click()
    until((tmp_path / "circled.txt").is_file, "the list")
    assert (tmp_path / "circled.txt").read_text() == "".join(f"{escaped(path)}\t-1\n" for path in HOSTILE)
    assert "IMAGES@list=circled.txt" in element(browser, "#saved").text
