"""Projection heads against the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import gradient, normal, numpy, unit
from torch import nn

from crosslevel.models.heads import NormLinear, projection_head

KINDS = ["linear", "mlp", "norm-linear", "norm-mlp"]


def expected(kind, x, weights):
    """The head's output from its weights in order."""
    if kind.endswith("mlp"):
        x = x @ weights[0].T + weights[1]
        x = np.where(x.real > 0, x, 0)
        weights = weights[2:]
    if kind.startswith("norm"):
        return unit(x) @ unit(weights[0]).T
    return x @ weights[0].T + weights[1]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31 - 1), batch=st.integers(1, 6), out=st.integers(1, 5), hidden=st.none() | st.just(9))
def test_output_and_gradients_are_the_formulas(kind, seed, batch, out, hidden):
    head = projection_head(kind, 7, out, hidden).double()
    weights = list(head.parameters())
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.copy_(normal(seed + i, *weight.shape))
    x, probe = normal(seed + 9, batch, 7).requires_grad_(), normal(seed + 8, batch, out)
    y = head(x)
    plain = [numpy(w) for w in weights]
    if kind == "norm-mlp":  # the direction of a zero vector, which the formula has not
        assume((numpy(x) @ plain[0].T + plain[1] > 0).any(axis=1).all())
    np.testing.assert_allclose(numpy(y), expected(kind, numpy(x), plain), rtol=1e-9, atol=1e-12)
    (y * probe).sum().backward()
    tensors = [x, *weights]
    for i, tensor in enumerate(tensors):

        def probed(value, i=i):
            values = [numpy(x), *plain]
            values[i] = value
            return (numpy(probe) * expected(kind, values[0], values[1:])).sum()

        slope = gradient(probed, numpy(tensor))
        np.testing.assert_allclose(numpy(tensor.grad), slope, rtol=1e-6, atol=1e-6 * max(np.abs(slope).max(), 1e-6))


@pytest.mark.parametrize(("kind", "sizes"), [("linear", [(7, 3)]), ("mlp", [(7, 9), (9, 3)])])
@pytest.mark.parametrize("prefix", ["", "norm-"])
def test_layers(kind, sizes, prefix):
    head = projection_head(prefix + kind, 7, 3, hidden=9)
    layers = [layer for layer in head if not isinstance(layer, nn.ReLU)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == sizes
    assert isinstance(layers[-1], NormLinear) == (prefix == "norm-")
    assert len(head) == 2 * len(sizes) - 1


def test_hidden_is_the_input_size_unless_given():
    assert projection_head("mlp", 7, 3)[0].out_features == 7


@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-3, 1e3))
def test_norm_linear_is_a_cosine(seed, scale):
    layer = NormLinear(6, 4)
    x = normal(seed, 5, 6, dtype=torch.float32)
    cosines = layer(x)
    assert cosines.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(layer(scale * x), cosines)
    with torch.no_grad():
        layer.weight.mul_(scale)
    torch.testing.assert_close(layer(x), cosines)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert repr(layer) == "NormLinear(in_features=6, out_features=4)"


def test_norm_linear_of_a_zero_row_is_zero_with_finite_gradients():
    layer, x = NormLinear(6, 4), torch.zeros(2, 6, requires_grad=True)
    layer(x).sum().backward()
    assert (layer(x) == 0).all()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"head='cosine' is not one of linear, mlp, norm-linear, norm-mlp"):
        projection_head("cosine", 7)
