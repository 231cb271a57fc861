"""Options of small runs, and what they left."""

import torch

from crosslevel import load_encoder

TINY = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--log_every=1", "--device=cpu"]
FAST = [*TINY, "--report_html=false"]


def weights(folder):
    return load_encoder(folder).state_dict()


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
