"""NT-Xent against its equation in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, linear, normal, numpy, unit
from reference import nt_xent as equation

from crosslevel.methods import METHODS, SimCLR
from crosslevel.methods.simclr import nt_xent

seeds = st.integers(0, 2**31 - 1)


@given(seed=seeds, batch=st.integers(1, 6), temperature=st.floats(0.1, 1))
def test_loss_and_gradient_are_the_equation(seed, batch, temperature):
    x = [normal(seed, batch, 3).requires_grad_(), normal(seed + 1, batch, 3).requires_grad_()]
    loss = nt_xent(*(torch.nn.functional.normalize(v, dim=1) for v in x), temperature)
    loss.backward()
    a, b = (numpy(v) for v in x)
    assert loss.item() == pytest.approx(equation(unit(a), unit(b), temperature), rel=1e-6, abs=1e-12)
    slopes = [
        gradient(lambda v: equation(unit(v), unit(b), temperature), a),
        gradient(lambda v: equation(unit(a), unit(v), temperature), b),
    ]
    for view, slope in zip(x, slopes, strict=True):
        np.testing.assert_allclose(numpy(view.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


@given(seed=seeds, batch=st.integers(2, 6))
def test_method_projects_and_compares_two_views(seed, batch):
    method = SimCLR(TinyEncoder(), head="linear", out_features=4, temperature=0.3).double()
    h = [normal(seed, batch, 5), normal(seed + 1, batch, 5)]
    expected = equation(*(linear(numpy(v), method.branch) for v in h), 0.3)
    assert method([], h, torch.arange(batch))[0].item() == pytest.approx(expected, rel=1e-6)
    assert (method.views, method.online) == (2, 2)


def test_equal_features_give_the_logarithm_of_the_candidates():
    z = torch.ones(8, 1, dtype=torch.float64)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(np.log(15))


@pytest.mark.parametrize("name", ["simclr", "moco", "npid"])
def test_autocast_does_not_reach_any_instance_branch(name):
    """On the same float32 features and keys the loss is the same bit for bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = METHODS[name](TinyEncoder(), 40, out_features=16)
    features = [normal(i, 24, 5, dtype=torch.float32) for i in range(2)]
    key = torch.nn.functional.normalize(normal(2, 24, 16, dtype=torch.float32), dim=1)
    if name == "moco":
        method.encode_key = lambda view: key
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(method([key] * method.views, features, torch.arange(24))[0])
    assert losses[1].dtype == torch.float32
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["simclr", "moco", "npid", "byol"])
def test_the_loop_owns_the_encoder(name):
    """It is neither saved nor optimized twice."""
    encoder = TinyEncoder()
    method = METHODS[name](encoder, 40)
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert method.encoder is encoder
    assert not any(module is encoder for module in method.modules())
    predictor = method.predictor.parameters() if name == "byol" else ()
    assert trained == {id(p) for p in (*method.branch.parameters(), *predictor)}


@pytest.mark.parametrize("name", ["simclr", "moco", "npid"])
@pytest.mark.parametrize("temperature", [0, -0.1])
def test_temperature_must_be_positive(name, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} must be positive"):
        METHODS[name](TinyEncoder(), 40, temperature=temperature)
