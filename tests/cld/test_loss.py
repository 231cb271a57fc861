"""The add-on against its equation, and as a user meets it: two lines in a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cld as equation
from reference import gradient, lloyd, normal, numpy, unit
from torch import nn

import crosslevel
from crosslevel.cld.loss import CrossLevel

seeds = st.integers(0, 2**31 - 1)


@st.composite
def views(draw, largest=7):
    """Two views' features (B, 4), a number of groups, and a seed."""
    batch, seed = draw(st.integers(3, largest)), draw(seeds)
    return normal(seed, batch, 4), normal(seed + 1, batch, 4), draw(st.integers(2, batch)), seed


def branch(k, seed=0, **options):
    """A `CrossLevel` in float64 with weights of their own seed."""
    cld = CrossLevel(4, k, out_features=3, **options).double()
    with torch.no_grad():
        for i, weight in enumerate(cld.parameters()):
            weight.copy_(normal(seed + 7 + i, *weight.shape))
    return cld


def head(x, weights):
    """Unit group features of a linear (two weights) or normalized linear head (one)."""
    if len(weights) == 2:
        return unit(x @ weights[0].T + weights[1])
    return unit(unit(x) @ unit(weights[0]).T)


@pytest.mark.parametrize("kind", ["linear", "norm-linear"])
@pytest.mark.parametrize("grouping", ["kmeans", "normalized-cut"])
@pytest.mark.parametrize("normalize", [True, False])
@settings(max_examples=8)
@given(problem=views(), temperature=st.floats(0.1, 1))
def test_loss_and_gradients_are_the_equation(kind, grouping, normalize, problem, temperature):
    h_a, h_b, k, seed = problem
    cld = branch(
        k, seed, head=kind, grouping=grouping, temperature=temperature, normalize_centroids=normalize, weight=0.7
    )
    tensors = [h_a.requires_grad_(), h_b.requires_grad_(), *cld.parameters()]
    loss = cld(h_a, h_b)
    loss.backward()
    loss = float(loss.detach())
    values = [numpy(t) for t in tensors]
    found = cld.last.a.assignment.tolist(), cld.last.b.assignment.tolist()
    if grouping == "kmeans":
        assert found == tuple(lloyd(head(h, values[2:]), range(k), 5).tolist() for h in values[:2])

    def expected(a, b, *weights):
        return equation(head(a, weights), head(b, weights), *found, k, temperature, normalize)

    assert loss == pytest.approx(expected(*values), rel=1e-6)
    for i, tensor in enumerate(tensors):
        slope = gradient(lambda x, i=i: expected(*values[:i], x, *values[i + 1 :]), values[i])
        np.testing.assert_allclose(numpy(tensor.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


@given(problem=views())
def test_swapping_the_views_changes_nothing(problem):
    h_a, h_b, k, seed = problem
    cld = branch(k, seed)
    torch.testing.assert_close(cld(h_a, h_b), cld(h_b, h_a), rtol=1e-12, atol=0)


@given(seed=seeds, batch=st.integers(3, 12))
def test_an_empty_group_is_no_negative(seed, batch):
    """The first two images are one: their second seed stays empty, and might as well not have been asked for."""
    h_a, h_b = normal(seed, batch, 4), normal(seed + 1, batch, 4)
    h_a[1], h_b[1] = h_a[0], h_b[0]
    with_empty, without = branch(3, seed), branch(2, seed)
    order = torch.tensor([0, 2, 1, *range(3, batch)])
    loss = with_empty(h_a, h_b)
    assert 0 in with_empty.last.a.sizes
    assert 0 in with_empty.last.b.sizes
    torch.testing.assert_close(loss, without(h_a[order], h_b[order]), rtol=1e-10, atol=0)


@given(seed=seeds, batch=st.integers(2, 20), temperature=st.floats(0.1, 1))
def test_as_many_groups_as_images_is_instance_discrimination(seed, batch, temperature):
    cld = branch(batch, seed, temperature=temperature)
    h_a, h_b = normal(seed, batch, 4), normal(seed + 1, batch, 4)
    z_a, z_b = cld.project(h_a), cld.project(h_b)
    own = torch.arange(batch)
    both = [nn.functional.cross_entropy(x @ y.T / temperature, own) for x, y in ((z_a, z_b), (z_b, z_a))]
    torch.testing.assert_close(cld(h_a, h_b), sum(both) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grouping", ["kmeans", "normalized-cut"])
def test_autocast_does_not_reach_the_group_branch(grouping):
    """On the same float32 features loss and gradients are the same bit for bit."""
    cld = CrossLevel(32, 8, grouping=grouping, head="norm-mlp")
    results = []
    for enabled in (False, True):
        h_a, h_b = normal(0, 24, 32, dtype=torch.float32), normal(1, 24, 32, dtype=torch.float32)
        h_a.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = cld(h_a, h_b)
        loss.backward()
        results.append((loss.detach(), h_a.grad, cld.branch[0].weight.grad.clone()))
        cld.zero_grad()
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(plain, mixed) for plain, mixed in zip(*results, strict=True))


def test_bfloat16_features_are_computed_in_float32():
    cld = CrossLevel(32, 8)
    h_a, h_b = normal(0, 24, 32, dtype=torch.bfloat16), normal(1, 24, 32, dtype=torch.bfloat16)
    loss = cld(h_a, h_b)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cld(h_a.float(), h_b.float()))


@given(problem=views(), weight=st.floats(0, 4))
def test_the_weight_is_the_loops_and_changes_no_loss(problem, weight):
    """L = L_I + weight * L_G is added in one place, so that nobody multiplies twice."""
    h_a, h_b, k, seed = problem
    torch.testing.assert_close(branch(k, seed, weight=weight)(h_a, h_b), branch(k, seed)(h_a, h_b), rtol=0, atol=0)


@given(problem=views(largest=30))
def test_last_tells_what_was_seen(problem):
    h_a, h_b, k, seed = problem
    cld = branch(k, seed)
    assert cld.last is None
    cld(h_a.requires_grad_(), h_b)
    a, b, agreement = cld.last
    z_a, z_b = numpy(cld.project(h_a)), numpy(cld.project(h_b))
    hits = 0
    for z, other in ((z_a, b), (z_b, a)):
        assert int(other.sizes.sum()) == len(h_a)
        assert not other.centroids.requires_grad
        nonempty = [j for j in range(k) if other.sizes[j] > 0]
        for x, group in zip(z, other.assignment.tolist(), strict=True):
            hits += group == max(nonempty, key=lambda j: x @ numpy(other.centroids[j]))
    assert float(agreement) == pytest.approx(hits / (2 * len(h_a)))
    assert not agreement.requires_grad


def test_equal_views_agree_fully_once_the_groups_have_settled():
    h = normal(0, 40, 4)
    cld = branch(8, iterations=60)
    cld(h, h)
    assert float(cld.last.agreement) == 1
    assert torch.equal(cld.last.a.assignment, cld.last.b.assignment)


@pytest.mark.parametrize(("batch", "groups"), [(2, 2), (3, 2), (64, 48), (10, 8)])
def test_groups_are_three_quarters_of_the_batch_unless_given(batch, groups):
    cld = branch(None)
    cld(normal(0, batch, 4), normal(1, batch, 4))
    assert len(cld.last.a.sizes) == groups


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_random_seeds_come_from_the_generator(init):
    cld, h_a, h_b = branch(5, init=init, iterations=1), normal(0, 30, 4), normal(1, 30, 4)

    def loss(seed):
        cld.generator = torch.Generator().manual_seed(seed)
        return cld(h_a, h_b).item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(5)}) == 5


def test_two_lines_in_a_plain_loop():
    """The group branch alone teaches the backbone to keep an image's views together."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16))
        cld = crosslevel.CrossLevel(in_features=16, groups=12, temperature=0.2)
    optimizer = torch.optim.SGD([*backbone.parameters(), *cld.parameters()], lr=0.5)
    images, losses, agreements = normal(0, 48, 20, dtype=torch.float32), [], []
    for step in range(60):
        view_a, view_b = (images + 0.7 * normal(2 * step + i, 48, 20, dtype=torch.float32) for i in range(2))
        optimizer.zero_grad()
        loss = 0.25 * cld(backbone(view_a), backbone(view_b))
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in backbone.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
        agreements.append(float(cld.last.agreement))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert np.mean(agreements[-5:]) > np.mean(agreements[:5]) + 0.1


def test_state_is_the_head_alone():
    cld = CrossLevel(4, 3, out_features=3, head="norm-linear")
    cld(normal(0, 8, 4, dtype=torch.float32), normal(1, 8, 4, dtype=torch.float32))
    assert {name: tuple(t.shape) for name, t in cld.state_dict().items()} == {"branch.0.weight": (3, 4)}


def test_a_nan_makes_the_loss_nan():
    h_a, h_b = normal(0, 8, 4), normal(1, 8, 4)
    h_b[3, 2] = float("nan")
    for grouping in ("kmeans", "normalized-cut"):
        assert branch(3, grouping=grouping)(h_a, h_b).isnan()


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"groups=1 leaves nothing to tell apart: give at least 2"):
        CrossLevel(4, 1)
    with pytest.raises(ValueError, match=r"temperature=0 must be positive"):
        CrossLevel(4, temperature=0)
    with pytest.raises(ValueError, match=r"grouping='dbscan' is not one of kmeans, normalized-cut"):
        CrossLevel(4, grouping="dbscan")
    with pytest.raises(ValueError, match=r"head='cosine' is not one of"):
        CrossLevel(4, head="cosine")
    with pytest.raises(ValueError, match=r"the views' features differ: \(4, 4\) and \(5, 4\)"):
        branch(2)(normal(0, 4, 4), normal(1, 5, 4))
    with pytest.raises(ValueError, match=r"groups=5 exceeds the batch of 4 images: lower groups or raise batch_size"):
        branch(5)(normal(0, 4, 4), normal(1, 4, 4))
