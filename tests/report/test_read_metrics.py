"""The series that are read from Lightning's metrics.csv."""

import math

import pytest

from crosslevel import report


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
