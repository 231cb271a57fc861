"""The page: what it shows is what was passed, nothing of it is active, and tables mark their best."""

import math
import os
import re
from html import unescape
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_samples import HOSTILE, blocks

from crosslevel import report


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
        assert target.startswith(("data:image/", "#", "file:///photos/")), target[:80]  # links, which nothing follows
    assert not re.search(r'src="(?!data:image/)', html)
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

    monkeypatch.setattr(os, "replace", full)
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
