"""Charts of a report: every point is drawn, gaps stay gaps, long curves are thinned."""

import math
import re

import numpy as np

from crosslevel import report
from crosslevel.report import charts


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
    thin = charts.thinned(list(zip(x, x**2, strict=True)))
    assert np.allclose(thin, np.stack([x, x**2], 1).reshape(600, 10, 2).mean(1))
    assert np.isnan(charts.thinned([(i, math.nan) for i in range(2000)])[:, 1]).all()


def test_an_axis_of_epochs_has_whole_ones_alone():
    """Three epochs would have ticks at every half."""
    svg = report.curves("c", {"a": [(1, 2.0), (2, 1.0), (3, 1.5)]}, "epoch", "loss").content["svg"]
    ticks = re.findall(r">(\d+\.?\d*)</text>", svg.partition('id="matplotlib.axis_2"')[0].partition("epoch</text>")[0])
    assert "1.5" not in ticks[:3]
    assert ticks[:3] == ["1", "2", "3"]
