"""BYOL against its equation in NumPy, and its target network against the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, normal, numpy, through, unit

from crosslevel.methods import BYOL
from crosslevel.methods.byol import distance

seeds = st.integers(0, 2**31 - 1)


def equation(predicted, target):
    """Eq. 2, with its squared norm written out; the mean over the batch."""
    return sum(((p - t) ** 2).sum() for p, t in zip(unit(predicted), unit(target), strict=True)) / len(target)


@given(seed=seeds, batch=st.integers(1, 6))
def test_loss_and_gradient_are_the_equation(seed, batch):
    predicted, target = normal(seed, batch, 4).requires_grad_(), normal(seed + 1, batch, 4)
    loss = distance(predicted, target)
    loss.backward()
    p, t = numpy(predicted), numpy(target)
    assert loss.item() == pytest.approx(equation(p, t), rel=1e-6, abs=1e-12)
    slope = gradient(lambda x: equation(x, t), p)
    np.testing.assert_allclose(numpy(predicted.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@given(seed=seeds, batch=st.integers(3, 6))
def test_each_view_predicts_the_other(head, seed, batch):
    method = BYOL(TinyEncoder(), head=head, out_features=4, hidden=7).double()
    views = [normal(seed, batch, 3, 2, 2), normal(seed + 1, batch, 3, 2, 2)]
    h = [method.encoder.double()(v).detach().requires_grad_() for v in views]
    loss, kept = method(views, h, torch.arange(batch))
    assert kept is None
    loss.backward()
    online = [through(through(numpy(x), method.branch), method.predictor) for x in h]
    target = [through(numpy(x), method.branch) for x in h]  # equal at the start
    assert loss.item() == pytest.approx(equation(online[0], target[1]) + equation(online[1], target[0]), rel=1e-6)
    for one, goal in zip(h, reversed(target), strict=True):
        slope = gradient(
            lambda x, goal=goal: equation(through(through(x, method.branch), method.predictor), goal), numpy(one)
        )
        np.testing.assert_allclose(numpy(one.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-9)


def test_the_target_follows_its_definition_over_fifty_steps():
    encoder = TinyEncoder().double()
    method = BYOL(encoder, out_features=4, hidden=6, momentum=0.9).double()
    trained = [*encoder.parameters(), *method.branch.parameters()]
    expected = [numpy(p).copy() for p in trained]
    for step in range(1, 51):
        with torch.no_grad():
            for i, p in enumerate(trained):
                p.add_(normal(step * 100 + i, *p.shape))
        method.after_step(step / 50)
        m = 1 - (1 - 0.9) * (math.cos(math.pi * step / 50) + 1) / 2
        expected = [m * e + (1 - m) * numpy(p) for e, p in zip(expected, trained, strict=True)]
    for twin, e in zip(method.target.ema.parameters(), expected, strict=True):
        np.testing.assert_allclose(numpy(twin), e, rtol=1e-12, atol=1e-12)
    before = [p.clone() for p in method.target.ema.parameters()]
    with torch.no_grad():
        trained[0].add_(1)
    method.after_step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, method.target.ema.parameters(), strict=True))


def test_the_target_has_no_gradient_and_the_predictor_one():
    method = BYOL(TinyEncoder(), out_features=4, hidden=6)
    views = [normal(i, 5, 3, 2, 2, dtype=torch.float32) for i in range(2)]
    method(views, [method.encoder(v) for v in views], torch.arange(5))[0].backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None for p in [*method.predictor.parameters(), *method.branch.parameters()])
    assert (method.views, method.online) == (2, 2)
