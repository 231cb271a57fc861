"""Geometric harmonization against its equations in NumPy, and its counting against counting."""

import numpy as np
import pytest
import torch
from reference import gradient, log_softmax, normal, numpy, sinkhorn, unit

from crosslevel.cld.harmonization import Harmonization, simplex


@pytest.mark.parametrize(("categories", "features"), [(2, 1), (5, 4), (5, 16), (100, 128), (129, 128)])
def test_the_directions_are_as_far_apart_as_they_can_be(categories, features):
    """Unit vectors, the same cosine -1 / (K - 1) between all of them, their sum zero."""
    m = simplex(categories, features).double()
    assert m.shape == (categories, features)
    expected = torch.full((categories, categories), -1 / (categories - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(m @ m.T, expected, rtol=0, atol=1e-5)
    assert m.sum(0).abs().max() < 1e-4


def equation(z_a, z_b, gh, shares):
    """Each view predicts the other's surrogate label: -1/B sum q log softmax(t / T), both ways."""
    t = [unit(unit(z) @ numpy(gh.directions).T) for z in (z_a, z_b)]
    labels = [sinkhorn(v.real, 1 / gh.sharpness, gh.iterations, shares) for v in t]
    return sum(
        -(label * log_softmax(v / gh.temperature)).sum(1).mean() for label, v in zip(reversed(labels), t, strict=True)
    )


@pytest.mark.parametrize("uneven", [False, True])
def test_loss_and_gradient_are_the_equations(uneven):
    gh = Harmonization(6, categories=5, iterations=20).double()
    if uneven:
        gh.shares.copy_(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))
    z = [torch.nn.functional.normalize(normal(i, 8, 6), dim=1).requires_grad_() for i in range(2)]
    loss = gh(*z)
    loss.backward()
    a, b = (numpy(v) for v in z)
    shares = numpy(gh.shares) / numpy(gh.shares).sum()
    assert loss.item() == pytest.approx(equation(a, b, gh, shares), rel=1e-6)
    slope = gradient(lambda x: labelled(x, b, gh, shares, a), a)
    own = numpy(z[0].grad)
    np.testing.assert_allclose(own, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())


def labelled(x, z_b, gh, shares, at):
    """The part of the loss that moves with the first view's features: its own label is held."""
    label = sinkhorn(unit(unit(z_b) @ numpy(gh.directions).T), 1 / gh.sharpness, gh.iterations, shares)
    t = x @ numpy(gh.directions).T
    return -(label * log_softmax(unit(t) / gh.temperature)).sum(1).mean()


def test_the_shares_are_those_of_the_images_of_the_last_span():
    gh = Harmonization(6, categories=5, update_epochs=2, iterations=3)
    torch.testing.assert_close(gh.shares, torch.full((5,), 0.2))
    counts = np.zeros(5)
    for step in range(12):  # four steps an epoch
        gh.begin_step(step / 4)
        if step == 8:
            np.testing.assert_allclose(numpy(gh.shares), counts / counts.sum(), rtol=1e-6)
            assert gh.counted.sum() == 0
        elif step < 8:
            torch.testing.assert_close(gh.shares, torch.full((5,), 0.2))
        z = torch.nn.functional.normalize(normal(step, 10, 6, dtype=torch.float32) + 1, dim=1)
        gh(z, z)
        counts += np.bincount((numpy(z) @ numpy(gh.directions).T).argmax(1), minlength=5)
    assert counts.max() > 2 * counts.mean()  # the images were uneven
    assert gh.counted.sum() == 40
    before = gh.counted.clone()
    gh.eval()(z, z)
    assert torch.equal(gh.counted, before)


def test_a_step_in_tensors_is_the_usual_one():
    found = []
    for kind in (float, torch.tensor):
        gh = Harmonization(6, categories=5, update_epochs=0.5, warmup_epochs=0.5, ramp_epochs=1, iterations=3)
        losses = []
        for step in range(8):
            gh.begin_step(kind(step / 4))
            z = [torch.nn.functional.normalize(normal(step + i, 10, 6, dtype=torch.float32), dim=1) for i in range(2)]
            losses.append(float(gh(*z)))
        found.append((losses, gh.shares, gh.counted, gh.span))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    assert found[0][0][:3] == [0.0, 0.0, 0.0]  # the warm-up, and the ramp's foot
    assert found[0][0][3] > 0


def test_a_category_without_images_does_no_harm():
    gh = Harmonization(6, categories=5)
    gh.shares.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]))
    z = torch.nn.functional.normalize(normal(0, 8, 6, dtype=torch.float32), dim=1).requires_grad_()
    loss = gh(z, z.detach())
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(z.grad.isfinite().all())


def test_what_does_not_fit_is_refused():
    assert Harmonization(16).categories == 17
    assert Harmonization(128).categories == 100
    with pytest.raises(ValueError, match=r"gh\.categories=18 must be from 2 to 17"):
        Harmonization(16, categories=18)
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        Harmonization(16, temperature=0)
