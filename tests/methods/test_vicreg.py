"""VICReg against its equations in NumPy, and against lightly's loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, normal, numpy, through

from crosslevel.methods import VICReg

seeds = st.integers(0, 2**31 - 1)


def variance(z):
    """Eq. 1: each dimension's deviation is to be 1."""
    total = 0.0
    for column in z.T:
        deviation = np.sqrt(((column - column.mean()) ** 2).sum() / (len(z) - 1) + 1e-4)
        total += 1 - deviation if deviation.real < 1 else 0
    return total / z.shape[1]


def covariance(z):
    """Eq. 3 and 4, over all pairs of different dimensions."""
    centre, total = z.mean(0), 0.0
    for i in range(z.shape[1]):
        for j in range(z.shape[1]):
            if i != j:
                total += (((z[:, i] - centre[i]) * (z[:, j] - centre[j])).sum() / (len(z) - 1)) ** 2
    return total / z.shape[1]


def equation(a, b, weights=(25.0, 25.0, 1.0)):
    """Eq. 6, with the mean of the squared differences and half of each variance term, as the authors' code."""
    invariance = ((a - b) ** 2).sum() / a.size
    return (
        weights[0] * invariance
        + weights[1] * (variance(a) + variance(b)) / 2
        + weights[2] * (covariance(a) + covariance(b))
    )


@given(seed=seeds, batch=st.integers(2, 6), scale=st.floats(0.1, 2))
def test_loss_and_gradient_are_the_equations(seed, batch, scale):
    method = VICReg(TinyEncoder(), invariance=3, variance=2, covariance=0.5, head="linear", out_features=4).double()
    h = [(normal(seed + i, batch, 5) * scale).requires_grad_() for i in range(2)]
    loss, _ = method([], h, torch.arange(batch))
    loss.backward()

    def expected(x, y):
        return equation(through(x, method.branch), through(y, method.branch), (3, 2, 0.5))

    a, b = (numpy(v) for v in h)
    assert loss.item() == pytest.approx(expected(a, b), rel=1e-6)
    slopes = [gradient(lambda v: expected(v, b), a), gradient(lambda v: expected(a, v), b)]
    for view, slope in zip(h, slopes, strict=True):
        np.testing.assert_allclose(numpy(view.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


def test_the_expander_has_two_normalized_hidden_layers():
    method = VICReg(TinyEncoder(), out_features=6, hidden=7).double()
    h = [normal(i, 8, 5) for i in range(2)]
    kinds = [type(layer).__name__ for layer in method.branch]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    expected = equation(*(through(numpy(v), method.branch) for v in h))
    assert method([], h, torch.arange(8))[0].item() == pytest.approx(expected, rel=1e-6)
    assert (method.views, method.online) == (2, 2)


def test_it_is_lightlys_loss():
    lightly = pytest.importorskip("lightly.loss.vicreg_loss")
    method = VICReg(TinyEncoder(), out_features=9).double()
    h = [normal(i, 12, 5) for i in range(2)]
    expected = lightly.VICRegLoss()(*(method.branch(v) for v in h)).item()
    assert method([], h, torch.arange(12))[0].item() == pytest.approx(expected, rel=1e-9)


def test_equal_images_cost_their_missing_variance():
    method = VICReg(TinyEncoder(), head="linear", out_features=4).double()
    h = torch.ones(6, 5, dtype=torch.float64)
    assert method([], [h, h], torch.arange(6))[0].item() == pytest.approx(25 * (1 - 0.01))
