"""When checkpoints are written: after each epoch, unless that would cost more than the training itself."""

import io
import os
import time

import pytest
import torch
from rich.console import Console
from test_graph import batches
from test_static_step import training

from crosslevel.runs import Run
from crosslevel.training.loop import checkpoints
from crosslevel.training.loop.fit import fit
from crosslevel.utils.device import choose

COSTLY = 0.6  # seconds; an epoch of one step is far shorter than 20 times that


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("seconds", "size", "skips"), [
    (1.0, checkpoints.LARGE, True),
    (1.0, checkpoints.LARGE - 1, False),  # a small one that took long: the disk was busy
    (0.1, checkpoints.LARGE, False),
])  # fmt: skip
def test_a_costly_checkpoint_is_written_again_after_twenty_times_its_seconds(tmp_path, seconds, size, skips):
    clock, file = Clock(), tmp_path / "last.ckpt"
    pace = checkpoints.Pace(minutes=10, clock=clock)
    assert pace.due(ended=True)
    with pace.writing(file):
        clock.now += seconds
        file.touch()
        os.truncate(file, size)
    for passed, ended, due in ((1, True, not skips), (19, True, not skips), (21, True, True), (21, False, False)):
        clock.now = 100 + seconds + passed
        assert pace.due(ended) == due
    clock.now = 100 + seconds + 601
    assert pace.due(ended=False)


def test_the_best_epoch_is_one_that_was_saved():
    best = checkpoints.BestEpoch()
    found = []
    for loss, saved in ((3.0, True), (1.0, False), (2.0, True), (2.5, True)):
        best.add(torch.tensor(loss))
        found.append(best.end(saved))
    assert found == [True, False, True, False]
    assert best.state()["best"] == 2.0


def large(epochs=4):
    torch.manual_seed(3)
    module = training("simclr", True, 8)
    module.register_buffer("ballast", torch.zeros(checkpoints.LARGE // 4))
    module.steps = epochs
    return module


class Ended(Exception):
    """As of a training that was killed."""


def test_a_run_that_skipped_checkpoints_goes_on_from_the_last_one(tmp_path):
    """Epochs of one short step, and a checkpoint that takes longer: the first and the last are written."""
    how = {"hardware": choose("cpu", "fp32"), "console": Console(file=io.StringIO()), "log_every": 1}
    written, epochs = [], []

    def saved():
        written.append(checkpoints.read(Run(tmp_path / place))["global_step"])
        time.sleep(COSTLY if len(written) == 1 else 0)

    def killed():
        epochs.append(1)
        if len(epochs) == 3:
            raise Ended
        return {}

    place, whole = "whole", large()
    fit(whole, batches(), tmp_path / place, saved=saved, **how)
    assert written == [1, 4]
    place, written = "cut", []
    with pytest.raises(Ended):
        fit(large(), batches(), tmp_path / place, saved=saved, monitor=killed, **how)
    assert written == [1]
    again = large()
    fit(again, batches(), tmp_path / place, saved=saved, resume=True, **how)
    assert written[-1] == 4
    assert again.step == 4
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
