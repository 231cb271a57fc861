"""Options of small runs, and what they left."""

import torch

from crosslevel import load_encoder

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false"]


class Killed(BaseException):
    """Stands for a kill: nothing of the run's own code gets to act on it."""


class At:
    """Does something when a run has logged a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_log(self, step, figures, module):
        if step == self.step:
            self.act()


def killed_after(step):
    """Of a run that saves every step: what comes after this one is logged, and its checkpoint is not written."""

    def kill():
        raise Killed

    return At(step + 1, kill)


def weights(folder):
    return load_encoder(folder).state_dict()


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
