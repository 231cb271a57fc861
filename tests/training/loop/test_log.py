"""The line of progress: one line at every width from 80 on, which says what its score is and where it is better."""

import io
import re
import sys

import pytest
from rich.console import Console

from crosslevel.runs import Run
from crosslevel.training.loop.log import Display, Log, read_rows

FIGURES = {"loss": 12.345, "images_per_second": 123456.0, "waiting": 1.0}


def frames(folder, width, **more):
    """What stands on a terminal of this width, one entry each time that it is drawn."""
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, force_jupyter=False)
    folder.mkdir()
    log = Log(Run(folder), 100, 0)
    log.newest = {**FIGURES, **more}
    display = Display(log, console, 0, 40_000)
    display.update(39_999)
    display.close()
    log.close()
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written.getvalue())
    return [line for frame in plain.split("\r") for line in frame.splitlines() if "epoch" in line]


@pytest.mark.parametrize("width", [80, 81, 95, 110, 140])
@pytest.mark.parametrize("more", [{}, {"knn": 98.7}, {"combined": 0.456}, {"knn": 98.7, "combined": 0.456}])
def test_progress_stays_in_its_line(tmp_path, width, more):
    for line in frames(tmp_path / "r", width, **more):
        assert len(line.rstrip()) <= width
        assert "loss 12.345" in line
        assert re.search(r"100% .*\d:\d\d:\d\d|100% .*-:--:--", line)  # the time left is last, so nothing was cut off


def test_the_score_has_a_name_and_a_direction_from_80_columns_on(tmp_path):
    assert "score 0.456 (higher is better)" in frames(tmp_path / "a", 80, combined=0.456)[-1]
    assert "waiting for data 100 %" in frames(tmp_path / "b", 140, combined=0.456)[-1]


def test_a_log_needs_no_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = Log(Run(tmp_path), 2, 0)
    log.record(1, {"loss": 0.5})
    log.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]
    assert [row["loss"] for row in read_rows(log.file, 1)] == ["0.5"]
