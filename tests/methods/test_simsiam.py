"""SimSiam against its equations in NumPy, and against lightly's loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, normal, numpy, through, unit

from crosslevel.methods import SimSiam
from crosslevel.methods.simsiam import distance

seeds = st.integers(0, 2**31 - 1)


def equation(predicted, target):
    """Eq. 1: the mean of minus the cosine."""
    return -sum((p * t).sum() for p, t in zip(unit(predicted), unit(target), strict=True)) / len(target)


@given(seed=seeds, batch=st.integers(1, 6))
def test_loss_and_gradient_are_the_equation(seed, batch):
    predicted, target = normal(seed, batch, 4).requires_grad_(), normal(seed + 1, batch, 4).requires_grad_()
    loss = distance(predicted, target)
    loss.backward()
    p, t = numpy(predicted), numpy(target)
    assert loss.item() == pytest.approx(equation(p, t), rel=1e-6, abs=1e-12)
    slope = gradient(lambda x: equation(x, t), p)
    np.testing.assert_allclose(numpy(predicted.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)
    assert target.grad is None


@given(seed=seeds, batch=st.integers(4, 8))
def test_each_view_predicts_the_other(seed, batch):
    """Forward through both heads, backward through the predicting side alone."""
    method = SimSiam(TinyEncoder(), out_features=6, hidden=7).double()
    h = [normal(seed, batch, 5).requires_grad_(), normal(seed + 1, batch, 5).requires_grad_()]
    loss, _ = method([], h, torch.arange(batch))
    loss.backward()
    z = [through(numpy(v), method.branch) for v in h]
    p = [through(v, method.predictor) for v in z]
    assert loss.item() == pytest.approx(equation(p[0], z[1]) / 2 + equation(p[1], z[0]) / 2, rel=1e-6)
    for one, goal in zip(h, reversed(z), strict=True):
        slope = gradient(
            lambda x, goal=goal: equation(through(through(x, method.branch), method.predictor), goal) / 2, numpy(one)
        )
        np.testing.assert_allclose(numpy(one.grad), slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max() + 1e-9)


def test_it_is_lightlys_loss():
    lightly = pytest.importorskip("lightly.loss.negative_cosine_similarity")
    method, criterion = SimSiam(TinyEncoder(), out_features=6).double(), lightly.NegativeCosineSimilarity()
    h = [normal(i, 8, 5) for i in range(2)]
    z = [method.branch(v) for v in h]
    expected = (criterion(method.predictor(z[0]), z[1].detach()) + criterion(method.predictor(z[1]), z[0].detach())) / 2
    assert method([], h, torch.arange(8))[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_heads_are_the_papers():
    method = SimSiam(TinyEncoder(), out_features=8)
    kinds = [type(layer).__name__ for layer in method.branch]
    assert kinds == [*["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear", "BatchNorm1d"]
    assert method.branch[-1].affine is False
    assert [tuple(layer.weight.shape) for layer in method.predictor if hasattr(layer, "in_features")] == [
        (2, 8),
        (8, 2),
    ]
    assert (method.views, method.online) == (2, 2)
