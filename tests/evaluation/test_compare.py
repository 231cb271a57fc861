"""Runs side by side: only what is comparable, the best marked, in the terminal, Markdown and HTML."""

import json
from pathlib import Path

import pytest
import yaml

from crosslevel.evaluation.compare import compare, comparisons
from crosslevel.evaluation.results import keep
from crosslevel.evaluation.scores import Scores
from crosslevel.settings.parser import run

ABOUT = {"protocol": "kNN", "images": "train", "test": "test", "settings": {"k": 5}}


def judged(top1, half=1.0, **more):
    return Scores({"top1": top1, **more}, {"top1": (top1 - half, top1 + half)})


def write(home, name, top1, about=ABOUT, **more):
    folder = home / name
    folder.mkdir(exist_ok=True)
    row = {"raw pixels": judged(20.0), "untrained encoder": judged(30.0), "trained encoder": judged(top1, **more)}
    keep(folder / "evaluation.json", about, row)
    return str(folder)


def test_the_best_of_each_column_is_marked_everywhere(tmp_path, capsys):
    first = write(tmp_path, "first", 61.23, balanced=50.0)
    second = write(tmp_path, "second", 64.56, balanced=48.0)
    run(compare, [first, second, "--output", str(tmp_path / "out" / "both")])
    said = capsys.readouterr().out
    assert "* 64.6 ±1.0" in said
    assert "61.2 ±1.0" in said
    text = (tmp_path / "out" / "both.md").read_text().splitlines()
    assert "| run | top-1 | balanced |" in text
    assert "| first | 61.2 ±1.0 | **50.0** |" in text
    assert "| second | **64.6 ±1.0** | 48.0 |" in text
    assert "| raw pixels | 20.0 ±1.0 | – |" in text
    page = (tmp_path / "out" / "both.html").read_text()
    assert '<strong class="best">64.6 ±1.0</strong>' in page
    assert '<strong class="best">61.2' not in page


def test_figures_that_look_equal_share_the_mark(tmp_path):
    names = [write(tmp_path, "a", 50.04), write(tmp_path, "b", 50.01)]
    compare(names, str(tmp_path / "out"))
    assert (tmp_path / "out.md").read_text().count("**50.0 ±1.0**") == 2


def test_other_images_or_settings_stand_in_other_tables(tmp_path):
    results = {}
    for name, value in (("a", 50.0), ("b", 60.0)):
        write(tmp_path, name, value)
        write(tmp_path, name, value + 5, {**ABOUT, "settings": {"k": 20}})
        folder = write(tmp_path, name, value - 5, {**ABOUT, "test": f"another of {name}"})
        results[name] = json.loads((tmp_path / name / "evaluation.json").read_text())["results"]
        assert folder.endswith(name)
    tables = comparisons(results)
    assert [[row[0].value for _, row in table.rows] for table in tables] == [[50, 60, 30, 20], [55, 65, 30, 20]]


def test_ties_within_the_interval_are_marked_and_the_verdict_names_them(tmp_path, capsys):
    """Of 60 ±2 and 58 ±2 the difference of 2 is within the root of 8; 55 ±2 is clearly behind."""
    runs = [write(tmp_path, name, value, half=2.0) for name, value in (("a", 60.0), ("b", 58.0), ("c", 55.0))]
    (table,) = compare(runs, str(tmp_path / "out"), quiet=True)
    assert (table.best(0), table.ties(0)) == ({0}, {1})
    assert table.verdict() == "kNN: no difference beyond chance between a, b; the highest top-1 is 60.0 ±2.0 %."
    text, page = (tmp_path / "out.md").read_text(), (tmp_path / "out.html").read_text()
    assert "| b | ≈ 58.0 ±2.0 |" in text
    assert "| c | 55.0 ±2.0 |" in text
    assert '<span class="tied">58.0 ±2.0</span>' in page
    assert '<p class="verdict">kNN: no difference beyond chance' in page
    assert capsys.readouterr() == ("", "")


def test_the_best_alone_is_named(tmp_path):
    runs = [write(tmp_path, name, value) for name, value in (("a", 60.0), ("b", 50.0))]
    assert compare(runs, str(tmp_path / "out"), quiet=True)[0].verdict() == "kNN: best is a, with top-1 60.0 ±1.0 %."


def test_untrained_networks_have_a_row_each_where_they_differ(tmp_path):
    folders = [Path(write(tmp_path, name, 50.0)) for name in "ab"]
    assert [name for name, _ in compare([*map(str, folders)], str(tmp_path / "o"), quiet=True)[0].rows] == [
        "a", "b", "untrained encoder", "raw pixels",
    ]  # fmt: skip
    row = {"raw pixels": judged(20.0), "untrained encoder": judged(33.0), "trained encoder": judged(50.0)}
    keep(folders[1] / "evaluation.json", ABOUT, row)
    rows = dict(compare([*map(str, folders)], str(tmp_path / "o"), quiet=True)[0].rows)
    assert (rows["untrained encoder, a"][0].value, rows["untrained encoder, b"][0].value) == (30.0, 33.0)


def test_settings_in_which_runs_differ_are_shown_and_no_others(tmp_path, capsys):
    for name, weight in (("a", 0.0), ("b", 0.25)):
        write(tmp_path, name, 50.0)
        tree = {"images": "x", "cld": {"weight": weight, "groups": 8}, "method": {"init_args": {"temperature": 0.2}}}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(tree))
    compare([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert "cld.weight: a: 0.0, b: 0.25" in capsys.readouterr().out
    text = (tmp_path / "out.md").read_text().partition("## Settings in which they differ")[2]
    assert "| cld.weight | 0.0 | 0.25 |" in text
    assert not any(name in text for name in ("groups", "images", "temperature"))
    assert "<td>cld.weight</td>" in (tmp_path / "out.html").read_text().replace(" ", "").replace("\n", "")


def test_a_later_evaluation_takes_the_place_of_the_same_earlier_one(tmp_path):
    write(tmp_path, "a", 10.0)
    write(tmp_path, "a", 90.0)
    (result,) = json.loads((tmp_path / "a" / "evaluation.json").read_text())["results"]
    assert result["accuracy_percent"]["trained encoder"]["top1"] == 90.0


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path, capsys):
    for home in ("x", "y"):
        (tmp_path / home).mkdir()
        write(tmp_path / home, "run", 50.0)
    compare([str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")], str(tmp_path / "out"))
    assert f"| {tmp_path}/x/run |" in (tmp_path / "out.md").read_text()


def test_wrong_use_ends_in_one_line(tmp_path, capsys):
    first, other = write(tmp_path, "a", 1.0), write(tmp_path, "b", 1.0, {**ABOUT, "test": "else"})
    (tmp_path / "empty").mkdir()
    wrong = [
        ([first], "at least two"),
        ([first, other], "no evaluation in common"),
        ([first, str(tmp_path / "empty")], "has no evaluation.json"),
    ]
    for runs, named in wrong:
        with pytest.raises(SystemExit) as stop:
            run(compare, runs)
        said = capsys.readouterr().err
        assert (stop.value.code, said.count("\n")) == (2, 1)
        assert named in said
