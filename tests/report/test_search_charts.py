"""Charts of a search: what is drawn where."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslevel import report
from crosslevel.report import Axis


def polylines(svg):
    """The points of every path of more than one point, and whether it is dashed."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="([^"]*)"', str(svg))
    points = [([tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", d)], style) for d, style in paths]
    return [(found, "dasharray" in style) for found, style in points if len(found) > 1]


@given(st.floats(1e-6, 1e6), st.floats(1.1, 1e3), st.booleans())
def test_an_axis_runs_from_its_low_to_its_high_end(low, factor, log):
    axis = Axis(low, low * factor, log)
    assert axis.position(low) == pytest.approx(0)
    assert axis.position(low * factor) == pytest.approx(1)
    middle = low * factor**0.5 if log else low * (1 + factor) / 2
    assert axis.position(middle) == pytest.approx(0.5)


def test_choices_are_one_above_the_other():
    axis = Axis(choices=("a", "b", "c"))
    assert [axis.position(choice) for choice in axis.choices] == [0, 0.5, 1]


def test_a_line_a_trial_crosses_all_scales_dashed_where_it_was_stopped():
    axes = {"lr": Axis(0.01, 1.0, log=True), "<preset>": Axis(choices=("x", "y"))}
    lines = [({"lr": 0.1, "<preset>": "y"}, 0.25, True), ({"lr": 1.0, "<preset>": "x"}, 0.75, False)]
    block = report.parallel("Parallel", axes, lines, "score")
    found = {tuple(place) for place, _ in polylines(block.content["svg"])}
    three = [(place, dashed) for place, dashed in polylines(block.content["svg"]) if len(place) == 3]
    assert sorted(dashed for _, dashed in three) == [False, True]
    assert len(found) >= 5  # three scales and two trials
    whole, stopped = (next(place for place, dashed in three if dashed == kind) for kind in (False, True))
    assert whole[0][1] == pytest.approx((stopped[0][1] + stopped[1][1]) / 2, abs=0.5)  # 0.1 is half way, by logarithm
    assert whole[1][1] == pytest.approx(stopped[0][1], abs=0.5)  # the upper choice is as high as the highest rate
    assert whole[2][1] == pytest.approx(stopped[1][1], abs=0.5)  # the lowest score is as low as the lower choice
    assert "&lt;preset&gt;" in str(block.content["svg"])


def test_the_best_so_far_counts_only_what_came_to_its_end():
    points = [(0, 0.5, True), (1, 0.9, False), (2, 0.6, True), (3, 0.4, True)]
    block = report.history("History", points, "trial", "score")
    assert [entry["value"] for entry in block.content["legend"]] == ["4", "0.6"]
    none = report.history("History", [(0, 0.5, False)], "trial", "score")
    assert none.content["legend"][1]["value"] == "none"
