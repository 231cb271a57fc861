"""Methods whose loss rises at first by construction say so, and those whose loss does not say nothing."""

import math

import pytest
from run_samples import metrics, write_images

from crosslevel.settings.parser import run
from crosslevel.training.train import train

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
QUIET = ["--cld.weight=0", "--report_html=false", "--monitor_every=0", "--lr=0.0001"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize(
    "method", [["--method=moco", "--method.queue=16"], ["--method=infomin", "--method.queue=16"], ["--method=npid"]]
)
def test_a_rise_is_announced_and_comes(tmp_path, photos, capsys, method):
    run(train, [str(photos), *TINY, *QUIET, *method, "--epochs=6", f"--run={tmp_path / 'r'}"])
    assert capsys.readouterr().out.count("the loss rises") == 1
    loss = [float(row["instance_loss"]) for row in metrics(tmp_path / "r")]
    assert max(loss[1:6]) > loss[0] + 1


def test_a_loss_that_only_falls_is_not_announced(tmp_path, photos, capsys):
    run(train, [str(photos), *TINY, *QUIET, "--epochs=1", f"--run={tmp_path / 'r'}"])
    assert "the loss rises" not in capsys.readouterr().out
    assert all(math.isfinite(float(row["instance_loss"])) for row in metrics(tmp_path / "r"))
