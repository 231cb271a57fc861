"""The report: what it shows is what was passed, nothing of it is active, and a browser draws it."""

import io
import json
import math
import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from crosslevel import report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$x_1$ \udcff 猫"


def random_images(n, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=g)


def clusters(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    return torch.eye(16)[labels] * 5 + torch.randn(n, 16, generator=g), labels


def blocks(name):
    """Every kind of block, with ``name`` wherever a user can put one."""
    images, (features, labels) = random_images(40), clusters(40)
    rows = report.neighbour_rows(images, features, [0, 1], k=4, labels=labels, classes=[name] * 4)
    return [
        report.text(name, [name]),
        report.table(name, [name, "kNN"], [[name, 61.25], ["other", 70.04]], note=name),
        report.curves(name, {name: [(1, 2.0), (2, math.nan), (3, 1.5)]}, name, name, note=name),
        report.settings(name, f"name: {name}"),
        report.commands(name, [f"crosslevel train {name}"]),
        report.image_rows(name, [*rows, report.ImageRow(name, list(images[:2]), [name, name])], note=name),
        report.map2d(name, features[:, :2], images, labels, [name] * 4, note=name),
        report.bars(name, [name, "b"], [3, 4.5], note=name),
        report.bars(name, [name] * 30, list(range(30)), note=name),
    ]


class Parsed(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.text += data


def written(tmp_path, *content, title="T"):
    return report.page(tmp_path / "report.html", title, content).read_text(encoding="utf-8")


def test_hostile_names_stay_text(tmp_path):
    html = written(tmp_path, *blocks(HOSTILE), title=HOSTILE)
    harmless = written(tmp_path, *blocks("name"), title="name")
    tags = [tag for tag, _ in Parsed(html).tags]
    assert tags.count("script") == 1
    assert tags.count("img") == [tag for tag, _ in Parsed(harmless).tags].count("img")
    assert not any(key.startswith("on") for _, attrs in Parsed(html).tags for key in attrs)
    assert HOSTILE.replace("\udcff", "?") in Parsed(html).text


def test_page_needs_nothing_from_outside(tmp_path):
    html = written(tmp_path, *blocks("name"))
    assert not re.search(r"https?://|@import", html)
    for target in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert target.startswith(("data:image/", "#")), target[:80]
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_links_lead_somewhere(tmp_path):
    html = written(tmp_path, *blocks("name"))
    ids = Parsed(html).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', html)) <= {
        pair for i in ids for pair in [(i, ""), ("", i)]
    }


def test_contents_from_six_sections_on(tmp_path):
    section = report.text("Heading", "text")
    assert "<nav" not in written(tmp_path, *[section] * 5)
    assert written(tmp_path, *[section] * 6).count('href="#section-') == 6


def test_failed_page_leaves_the_old_one_and_no_part(tmp_path, monkeypatch):
    path = report.page(tmp_path / "new" / "report.html", "old", [])
    with pytest.raises(jinja2.UndefinedError):
        report.page(path, "new", [report.Block("no such kind", "h", {})])

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.page(path, "new", [])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert "<title>old</title>" in path.read_text(encoding="utf-8")


def cells(html):
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)[1:]
    parts = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    shown = [[unescape(re.sub(r"<span.*?</span>|<[^>]*>", "", cell)) for cell in row] for row in parts]
    return shown, [[("<strong" in cell, "(best)" in cell) for cell in row] for row in parts]


def test_table_shows_its_numbers_and_marks_the_best(tmp_path):
    rows = [
        ["a", 41.26, 3, 0.5, math.nan, 12345],
        ["b", 41.34, 1, math.nan, None, -0.01],
        ["c", 41.32, 1, math.inf, 7.0, np.float32(1.5)],
    ]
    best = [None, "max", "min", "max", "max", None]
    shown, marked = cells(written(tmp_path, report.table("t", list("abcdef"), rows, best)))
    assert shown == [
        ["a", "41.3", "3", "0.5", "–", "12,345"],
        ["b", "41.3", "1", "–", "–", "0.0"],
        ["c", "41.3", "1", "inf", "7.0", "1.5"],
    ]
    # All of column b look alike; of d and e one finite number is left, which is best of nothing.
    assert [[bold for bold, _ in row] for row in marked] == [
        [False, True, False, False, False, False],
        [False, True, True, False, False, False],
        [False, True, True, False, False, False],
    ]
    assert all(bold == words for row in marked for bold, words in row)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.none(), min_size=1, max_size=8), st.booleans())
def test_best_marking_equals_sorting(values, highest):
    table = report.table("t", ["x"], [[v] for v in values], "max" if highest else "min", digits=3)
    seen = [round(v, 3) for v in values if v is not None and not math.isnan(v)]
    want = set()
    if len(seen) > 1:
        top = max(seen) if highest else min(seen)
        want = {i for i, v in enumerate(values) if v is not None and not math.isnan(v) and round(v, 3) == top}
    assert table.content["best"][0] == want


def test_table_names_the_row_that_does_not_fit():
    with pytest.raises(ValueError, match="row 1 of table 'accuracy' has 1 entries, need 2"):
        report.table("accuracy", ["a", "b"], [[1, 2], [1]])


def paths(block):
    """The numbers of dots and of lines' points that a chart draws in the colours of its series."""
    svg = str(block.content["svg"])
    lines = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c\d\)', svg)
    dots = re.findall(r'<use [^>]*style="fill: var\(--c\d\)', svg)
    return [len(re.findall("[ML]", line)) for line in lines], len(dots)


def test_curves_draw_one_point_and_leave_gaps():
    assert paths(report.curves("c", {"a": [(1, 2.0)]}, "x", "y"))[1] == 1
    many = [(i, math.nan if i in (20, 22) else math.sin(i)) for i in range(60)]
    drawn = report.curves("c", {"a": many}, "x", "y")
    assert paths(drawn)[1] == 1, "only the point between two gaps needs a dot"
    stroke = r'<path d="(M[^"]*)"[^>]*style="fill: none; stroke: var\(--c0\)'
    (line,) = re.findall(stroke, str(drawn.content["svg"]))
    assert len(re.findall("M[^ML]*L", line)) == 2, "two stretches of line, and a gap between them"
    for empty in ({}, {"a": []}, {"a": [(1, math.nan), (2, math.inf)]}):
        block = report.curves("c", empty, "x", "y")
        assert paths(block)[1] == 0
        assert [entry["value"] for entry in block.content["legend"]] == ["no value"] * len(empty)


def test_curves_name_the_last_finite_value():
    block = report.curves("c", {"a": [(0, 3.0), (1, 61.254), (2, math.nan)], "b": [(0, 1e-5)]}, "x", "y")
    assert [entry["value"] for entry in block.content["legend"]] == ["61.25", "1e-05"]


def test_long_curves_are_means_of_neighbours():
    x = np.arange(6000.0)
    thin = report._thin(list(zip(x, x**2, strict=True)))
    assert np.allclose(thin, np.stack([x, x**2], 1).reshape(600, 10, 2).mean(1))
    assert np.isnan(report._thin([(i, math.nan) for i in range(2000)])[:, 1]).all()


def decoded(uri):
    return np.array(Image.open(io.BytesIO(b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize(
    ("size", "shown", "tolerance"),
    [(8, 64, 0), (28, 56, 0), (32, 64, 0), (40, 40, 0), (64, 64, 0), (128, 64, 1), (256, 64, 1)],
)
def test_pictures_are_the_images_enlarged_by_whole_factors(size, shown, tolerance):
    image = random_images(1, size)[0]
    picture = report.image_rows("i", [report.ImageRow("c", [image])]).content["rows"][0]["pictures"][0]
    assert (picture["width"], picture["height"], picture["pixelated"]) == (shown, shown, size < 64)
    want = Image.fromarray(image.permute(1, 2, 0).numpy())
    got = decoded(picture["src"]).astype(int)
    assert np.abs(got - np.array(want.resize(got.shape[:2], Image.Resampling.BOX))).max() <= tolerance


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_pictures_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"need torch\.uint8"):
        report.image_rows("i", [report.ImageRow("c", [bad])])
    with pytest.raises(ValueError, match="1 images, 2 marks"):
        report.image_rows("i", [report.ImageRow("c", [random_images(1)[0]], ["a", "b"])])


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 9, 60])
@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_project_is_finite_and_repeats_itself(n, method):
    features = clusters(n)[0]
    first, second = (report.project(features, method, seed=3) for _ in range(2))
    assert first.shape == (n, 2)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("features", [torch.ones(30, 4), torch.zeros(30, 1), torch.eye(3).repeat(20, 1)])
def test_project_of_repeated_rows_keeps_them_together(features):
    points = report.project(features)
    assert torch.isfinite(points).all()
    for row in features.unique(dim=0):
        assert points[(features == row).all(1)].std(0).max() < 1e-5


def test_project_pca_agrees_with_scikit_learn():
    features = clusters(50)[0]
    want = PCA(2, svd_solver="full").fit_transform(features.double().numpy())
    assert np.allclose(np.abs(report.project(features, "pca").numpy()), np.abs(want), atol=1e-4)


def test_project_tsne_keeps_clusters_apart():
    features, labels = clusters(120)
    points = report.project(features)
    distance = torch.cdist(points, points).fill_diagonal_(math.inf)
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.95


def test_project_names_what_is_wrong():
    with pytest.raises(ValueError, match="1 of 3 rows are not finite, row 1 first"):
        report.project(torch.tensor([[1.0], [math.nan], [2.0]]))
    with pytest.raises(ValueError, match="method='umap'"):
        report.project(torch.ones(3, 2), "umap")


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_neighbours_equal_a_numpy_search(n, k, seed, tracks):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=g)
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    labels, track = torch.randint(3, (n,), generator=g), torch.arange(n) // 3
    queries = [0, n - 1]
    exclude = track if tracks else None
    rows = report.neighbour_rows(images, features, queries, k, labels=labels, exclude=exclude)
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for query, row in zip(queries, rows, strict=True):
        allowed = [i for i in range(n) if (track[i] != track[query] if tracks else i != query)]
        want = sorted(allowed, key=lambda i: -(x[query] @ x[i]))[:k]
        got = [int(image[0, 0, 0]) for image in row.images]
        assert got == [query, *want]
        assert [float(m) for m in row.marks[1:]] == pytest.approx([x[query] @ x[i] for i in want], abs=0.0051)
        assert row.outlines[1:] == ["same" if labels[i] == labels[query] else "other" for i in want]


def test_groups_shown_are_the_largest_and_some_of_middle_size():
    sizes = list(range(40, 0, -1))
    assignment = torch.arange(40).repeat_interleave(torch.tensor(sizes))
    similarity = torch.rand(len(assignment), generator=torch.Generator().manual_seed(0))
    images = random_images(len(assignment), 4)
    rows = report.group_rows(images, assignment, similarity, most=12, per_row=5)
    groups = [int(re.match(r"Group (\d+): (\d+) image", row.caption)[1]) for row in rows]
    assert groups[:8] == list(range(8))
    assert len(set(groups)) == 12
    assert groups == sorted(groups)
    assert 8 <= groups[8] < groups[11] < 39
    for group, row in zip(groups, rows, strict=True):
        members = [i for i in range(len(assignment)) if assignment[i] == group]
        best = sorted(members, key=lambda i: -similarity[i])[:5]
        assert torch.equal(torch.stack(list(row.images)), images[best])
        assert f"{sizes[group]:,} image" in row.caption
        assert f"{similarity[members].mean():.2f}" in row.caption
    assert len(report.group_rows(images, assignment % 3)) == 3


def test_map_hover_and_atlas_belong_to_the_points():
    images, (features, labels) = random_images(1, 32).repeat(10, 1, 1, 1), clusters(10)
    images = images // 255 + torch.arange(10, dtype=torch.uint8)[:, None, None, None] * 20
    block = report.map2d("m", features[:, :2], images, labels, list("abcd"))
    hover, atlas = json.loads(block.content["hover"]), decoded(block.content["atlas"])
    assert hover["kind"] == labels.tolist()
    for i in range(10):
        top, left = i // hover["columns"] * 32, i % hover["columns"] * 32
        assert abs(atlas[top : top + 32, left : left + 32].mean() - images[i].float().mean()) < 2
    got, want = torch.tensor(hover["points"]).double(), features[:, :2].double()
    scale = (want[:, 0].max() - want[:, 0].min()) / (got[:, 0].max() - got[:, 0].min())
    assert torch.allclose((got - got[0]) * scale, want - want[0], atol=2 * float(scale))
    entries = [(entry["name"], entry["value"]) for entry in block.content["legend"]]
    assert entries == [("a", "3"), ("b", "3"), ("c", "2"), ("d", "2")]


def test_map_pictures_do_not_overlap():
    g = torch.Generator().manual_seed(0)
    place, tiles = torch.rand(300, 2, generator=g) * 0.9 + 0.05, random_images(300, 32)
    montage = report._montage(place, tiles)
    whole = 0
    for (x, y), tile in zip((place * 640 - 16).round().long().tolist(), tiles, strict=True):
        whole += torch.equal(montage[:3, y : y + 32, x : x + 32], tile)
    assert whole > 60
    assert int((montage[3] == 255).sum()) == whole * 32 * 32


def test_map_takes_few_points_many_points_and_many_classes():
    for n in (0, 1, 3):
        report.map2d("m", torch.ones(n, 2), random_images(n) if n else None)
    block = report.map2d("m", torch.rand(6000, 2), note="Note.")
    assert block.content["note"] == "Note. Drawn: 2,000 of 6,000 images."
    labels = torch.arange(60) - 1
    legend = report.map2d("m", torch.rand(60, 2), labels=labels).content["legend"]
    assert [e["name"] for e in legend] == ["unknown", *(f"label {c}" for c in range(48)), "further classes"]
    assert legend[-1]["value"] == "11"
    assert len({(e["symbol"], e["colour"]) for e in legend[1:]}) == 49
    with pytest.raises(ValueError, match="3 points, 2 labels"):
        report.map2d("m", torch.ones(3, 2), labels=torch.zeros(2, dtype=torch.int64))


def test_metrics_of_lightning(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,knn,loss,step\n0,,2.5,4\n0,31.0,,9\n1,,nan,14\n1,40.5,,19\n2,,1.25")
    series = report.read_metrics(path)
    assert series["knn"] == [(1.0, 31.0), (2.0, 40.5)]
    assert [x for x, _ in series["loss"]] == [0.5, 1.5, 2.0]
    assert math.isnan(series["loss"][1][1])
    assert report.read_metrics(path, x="step")["knn"] == [(9.0, 31.0), (19.0, 40.5)]
    path.write_text("step,loss\n3,1.5\n")
    assert report.read_metrics(path) == {"loss": [(3.0, 1.5)]}
    path.write_text("epoch,step,loss\n0.25,3,1.5\n")
    assert report.read_metrics(path) == {"loss": [(0.25, 1.5)]}
    path.write_text("step,loss\n3,1.5\n4,what\n")
    with pytest.raises(ValueError, match=r"line 3: loss is 'what', not a number"):
        report.read_metrics(path)


def opened(browser, path, width=1200):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@pytest.mark.browser
@pytest.mark.parametrize("name", ["name", HOSTILE, "a" * 300])
@pytest.mark.parametrize("width", [390, 1200])
def test_browser_draws_all_and_nothing_overflows(browser, tmp_path, name, width):
    opened(browser, report.page(tmp_path / "r.html", name, blocks(name), subtitle=name), width)
    assert browser.get_log("browser") == []
    script = "return [...document.images].map(i => i.complete ? i.naturalWidth : 0)"
    widths = browser.execute_script(script)
    assert len(widths) == 2 * 5 + 2 + 2
    assert min(widths) > 0
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')]"
        ".map(s => [s.clientWidth, s.clientHeight, s.getBBox().width, s.getBBox().height])"
    )
    assert len(boxes) == 4
    assert min(side for box in boxes for side in box) > 50
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_browser_opens_the_settings_and_hover_shows_the_nearest_picture(browser, tmp_path):
    opened(browser, report.page(tmp_path / "r.html", "T", blocks("name")))
    text = browser.find_element("css selector", "details pre")
    assert not text.is_displayed()
    browser.find_element("css selector", "summary").click()
    assert text.is_displayed()

    tip = browser.find_element("css selector", ".tip")
    hover = json.loads(browser.find_element("css selector", ".map").get_attribute("data-hover"))
    chains = pytest.importorskip("selenium.webdriver.common.action_chains")
    for panel in browser.find_elements("css selector", ".panel"):
        for point in (7, 30):
            x, y = (round((at / 1000 - 0.5) * panel.rect["width"]) for at in hover["points"][point])
            move = chains.ActionChains(browser)
            move.move_to_element_with_offset(panel, x, y)
            move.perform()
            assert tip.is_displayed()
            assert int(tip.get_attribute("data-point")) == point
            assert tip.text == "name"
            script = "return [...arguments[0].querySelectorAll('.window, img')].map(e => e.getBoundingClientRect())"
            window, atlas = browser.execute_script(script, tip)
            row, column = divmod(point, hover["columns"])
            assert (window["width"], atlas["width"]) == (96, 96 * hover["columns"])
            assert (window["x"] - atlas["x"], window["y"] - atlas["y"]) == pytest.approx((column * 96, row * 96))
        chains.ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
        assert not tip.is_displayed()


@pytest.mark.browser
def test_browser_follows_dark_mode(browser, tmp_path):
    path = report.page(tmp_path / "r.html", "T", blocks("name"))
    shades = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        opened(browser, path)
        script = """const shade = (e, p) => getComputedStyle(e)[p].match(/\\d+/g).slice(0, 3).map(Number);
                    return [shade(document.body, 'backgroundColor'),
                            shade(document.querySelector('.chart svg text'), 'fill')]"""
        shades.append([sum(shade) / 3 for shade in browser.execute_script(script)])
    (light, dark_ink), (dark, light_ink) = shades
    assert light - dark_ink > 100
    assert light_ink - dark > 100
