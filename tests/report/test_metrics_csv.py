"""The series that are read from a run's metrics.csv."""

import math

import pytest

from crosslevel import report


def test_columns_become_series(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,loss,knn\n4,0.5,2.5,\n8,1,nan,\n8,1,,31.0\n16,2,1.25,40.5\n")
    series = report.read_metrics(path)
    assert series["knn"] == [(1.0, 31.0), (2.0, 40.5)]
    assert [x for x, _ in series["loss"]] == [0.5, 1.0, 2.0]
    assert math.isnan(series["loss"][1][1])
    assert report.read_metrics(path, x="step")["knn"] == [(8.0, 31.0), (16.0, 40.5)]
    path.write_text("epoch,step,loss\n0.25,3,1.5\n0.5,6,what\n")
    with pytest.raises(ValueError, match=r"line 3: loss is 'what', not a number"):
        report.read_metrics(path)
    path.write_text("step,loss\n3,1.5\n")
    with pytest.raises(ValueError, match="a row has no epoch"):
        report.read_metrics(path)
