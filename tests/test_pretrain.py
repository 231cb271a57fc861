"""The training step's own parts: LARS and its exclusions, the schedule, the seeds."""

import math

import pytest
import torch
from reference import TinyEncoder, normal
from torch import nn

from crosslevel.images.views import Views
from crosslevel.methods import SimCLR
from crosslevel.pretrain import Pretrain
from crosslevel.pretrain.module import cosine, step_seed


def module(optimizer, lr=0.3, weight_decay=0.01):
    encoder = TinyEncoder()
    encoder.norm = nn.BatchNorm1d(5)
    return Pretrain(
        encoder, SimCLR(encoder, head="linear", out_features=4), None, Views(), steps=10, warmup_steps=0,
        optimizer=optimizer, lr=lr, weight_decay=weight_decay, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
def test_lars_adapts_and_decays_matrices_alone(steps):
    """You et al. 2017: a layer's rate is 0.001 |w| / (|g| + decay |w|); biases and normalization take plain SGD."""
    trained = module("lars")
    optimizer = trained.configure_optimizers()
    before = {name: p.detach().double().clone() for name, p in trained.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    for step in range(steps):
        for i, p in enumerate(trained.parameters()):
            p.grad = normal(10 * step + i, *p.shape, dtype=torch.float32)
        for i, name in enumerate(before):
            w, g = before[name], normal(10 * step + i, *before[name].shape)
            if w.ndim > 1:
                g = g + 0.01 * w
                g = g * 0.001 * w.norm() / (normal(10 * step + i, *w.shape).norm() + 0.01 * w.norm())
            momentum[name] = g if step == 0 else 0.9 * momentum[name] + g
            before[name] = w - 0.3 * momentum[name]
        optimizer.step()
    assert {p.ndim for p in trained.parameters()} == {1, 2}
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p.detach().double(), before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("optimizer", "decayed"), [("sgd", {1, 2}), ("adamw", {2}), ("lars", {2})])
def test_which_parameters_are_decayed(optimizer, decayed):
    groups = module(optimizer).configure_optimizers().param_groups
    assert {p.ndim for group in groups if group["weight_decay"] for p in group["params"]} == decayed
    assert sum(len(group["params"]) for group in groups) == len(list(module(optimizer).parameters()))


def test_schedule():
    """From a hundredth over the warm-up, then half a cosine to nothing."""
    assert [cosine(s, 100, 20) for s in (0, 20, 60, 100)] == pytest.approx([0.01, 1, 0.5, 0])
    assert cosine(10, 100, 20) == pytest.approx(0.505)
    assert cosine(30, 100, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)))


def test_seeds_of_steps_and_ranks_do_not_repeat():
    seeds = {step_seed(s, n, r) for s in range(3) for n in range(200) for r in (-1, 0, 1, 2)}
    assert len(seeds) == 3 * 200 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
