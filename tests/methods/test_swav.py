"""SwAV against its equations in NumPy, and against lightly's loss."""

import numpy as np
import pytest
import torch
from reference import TinyEncoder, gradient, linear, log_softmax, normal, numpy, sinkhorn, unit

from crosslevel.methods import SwAV

POWER = {"uniform": 0.0, "long-tailed": 0.25}


def method_of(**changes):
    torch.manual_seed(0)
    settings = {"prototypes": 7, "head": "linear", "out_features": 4, "queue": 0, "small_views": 0}
    return SwAV(TinyEncoder(), **{**settings, **changes}).double()


def inputs(method, batch=6, seed=0):
    views = [normal(seed + i, batch, 3, 2, 2) for i in range(method.views)]
    return views, [method.encoder.double()(view).detach().requires_grad_() for view in views]


def equation(z, codes, centres, temperature=0.1):
    """Eq. 1 and 2: every view predicts the assignments of the other large ones."""
    total, terms = 0.0, 0
    for i, code in enumerate(codes):
        for v, rows in enumerate(z):
            if v != i:
                total -= (code * log_softmax(rows @ centres.T / temperature)).sum(1).mean()
                terms += 1
    return total / terms


def shares(count, power):
    share = np.arange(1, count + 1) ** -power
    return share / share.sum()


@pytest.mark.parametrize("power", POWER.values(), ids=POWER)
@pytest.mark.parametrize("small", [0, 3])
def test_loss_and_gradient_are_the_equations(power, small):
    method = method_of(prior=power, small_views=small)
    views, h = inputs(method)
    loss, _ = method(views, h[:2], torch.arange(6))
    loss.backward()
    centres = unit(numpy(method.centres.weight))
    z = [linear(numpy(v), method.branch) for v in h]
    codes = [sinkhorn(rows @ centres.T, 0.05, 3, shares(7, power)) for rows in z[:2]]
    assert loss.item() == pytest.approx(equation(z, codes, centres), rel=1e-6)
    for i in range(2):
        slope = gradient(
            lambda x, i=i: equation([linear(x, method.branch) if v == i else z[v] for v in range(len(z))], codes,
                                    centres), numpy(h[i])
        )  # fmt: skip
        np.testing.assert_allclose(numpy(h[i].grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max())
    slope = gradient(lambda w: equation(z, codes, unit(w)), numpy(method.centres.weight))
    np.testing.assert_allclose(numpy(method.centres.weight.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("small", [0, 2])
def test_it_is_lightlys_loss_with_and_without_a_queue(small):
    lightly = pytest.importorskip("lightly.loss.swav_loss")
    criterion = lightly.SwaVLoss()
    method = method_of(small_views=small, queue=8)
    centres = torch.nn.functional.normalize(method.centres.weight.detach(), dim=1)
    for step in range(4):
        views, h = inputs(method, seed=10 * step)
        outputs = [method.project(v) @ centres.T for v in h]
        held = [queue.keys[: min(8, 6 * step)].double() @ centres.T for queue in method.earlier]
        expected = criterion(outputs[:2], outputs[2:], held if step else None)
        loss, kept = method(views, h[:2], torch.arange(6))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        method.after_step(0.0, kept)


def test_the_queue_counts_from_its_epoch_on():
    losses = {}
    for epoch in (0.5, 1.5):
        for queue in (0, 12):
            method = method_of(queue=queue, queue_start=1.0, freeze=0.0)
            for step in range(3):
                method.begin_step(epoch)
                views, h = inputs(method, seed=10 * step)
                loss, kept = method(views, h[:2], torch.arange(6))
                losses[epoch, queue] = loss.item()
                method.after_step(0.0, kept)
    assert losses[0.5, 0] == pytest.approx(losses[0.5, 12], rel=1e-12)
    assert abs(losses[1.5, 0] - losses[1.5, 12]) > 1e-4


def test_prototypes_stay_until_their_epoch():
    for epoch, moves in ((0.0, False), (0.99, False), (1.0, True)):
        method = method_of()
        method.begin_step(epoch)
        views, h = inputs(method)
        method(views, h[:2], torch.arange(6))[0].backward()
        assert bool(method.centres.weight.grad.abs().max() > 0) == moves
        assert h[0].grad.abs().max() > 0


@pytest.mark.parametrize("changes", [{"prototypes": 1}, {"epsilon": 0}, {"prior": -1}, {"small_views": -1}])
def test_what_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        method_of(**changes)
