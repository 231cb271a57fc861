"""DINO against its equations in NumPy, and against lightly's loss."""

import math

import numpy as np
import pytest
import torch
from reference import TinyEncoder, gradient, linear, log_softmax, normal, numpy, unit

from crosslevel.methods import DINO


def method_of(**changes):
    torch.manual_seed(0)
    settings = {"outputs": 7, "head": "linear", "out_features": 4, "small_views": 2}
    return DINO(TinyEncoder(), **{**settings, **changes}).double()


def inputs(method, batch=6, seed=0):
    views = [normal(seed + i, batch, 3, 2, 2) for i in range(method.views)]
    return views, [method.encoder.double()(view).detach().requires_grad_() for view in views]


def equation(student, teacher, centre, temperature, sharpness):
    """Eq. 3: the mean over all pairs of a teacher's view and another of the student's."""
    total, terms = 0.0, 0
    for i, taught in enumerate(teacher):
        goal = np.exp(log_softmax((taught - centre) / sharpness))
        for v, rows in enumerate(student):
            if v != i:
                total -= (goal * log_softmax(rows / temperature)).sum(1).mean()
                terms += 1
    return total / terms


@pytest.mark.parametrize("small", [0, 3])
def test_loss_and_gradient_are_the_equations(small):
    method = method_of(small_views=small, teacher_temperature=0.06)
    with torch.no_grad():
        method.centre.copy_(normal(9, 7) / 10)
    views, h = inputs(method)
    loss, _ = method(views, h[:2], torch.arange(6))
    loss.backward()
    weight, centre = numpy(method.last.weight), numpy(method.centre)
    outputs = [linear(numpy(v), method.branch) @ unit(weight).T for v in h]
    assert loss.item() == pytest.approx(equation(outputs, outputs[:2], centre, 0.1, 0.06), rel=1e-6)

    def moved(x, i):
        student = [linear(x, method.branch) @ unit(weight).T if v == i else o for v, o in enumerate(outputs)]
        return equation(student, outputs[:2], centre, 0.1, 0.06)

    for i in range(2):
        slope = gradient(lambda x, i=i: moved(x, i), numpy(h[i]))
        np.testing.assert_allclose(numpy(h[i].grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_it_is_lightlys_loss_and_centre():
    lightly = pytest.importorskip("lightly.loss.dino_loss")
    method = method_of(momentum=0.5)
    criterion = lightly.DINOLoss(output_dim=7, teacher_temp=0.07, warmup_teacher_temp=0.04).double()
    for step in range(4):
        views, h = inputs(method, seed=10 * step)
        with torch.no_grad():
            weight = torch.nn.functional.normalize(method.last.weight, dim=1)
            student = [method.project(v) @ weight.T for v in h]
            teacher = [method.encode_teacher(view) for view in views[:2]]
        expected = criterion(teacher, student, teacher_temp=0.07)
        loss, kept = method(views, h[:2], torch.arange(6))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        method.after_step(step / 4, kept)
        torch.testing.assert_close(method.centre, criterion.center.view(-1).to(method.centre), rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            method.encoder.linear.weight.mul_(0.9)


def test_the_teacher_follows_its_definition():
    method = method_of(momentum=0.9)
    trained = [*method.encoder.double().parameters(), *method.branch.parameters(), *method.last.parameters()]
    expected = [numpy(p).copy() for p in trained]
    for step in range(1, 21):
        with torch.no_grad():
            for i, p in enumerate(trained):
                p.add_(normal(step * 100 + i, *p.shape))
        method.after_step(step / 20)
        m = 1 - (1 - 0.9) * (math.cos(math.pi * step / 20) + 1) / 2
        expected = [m * e + (1 - m) * numpy(p) for e, p in zip(expected, trained, strict=True)]
    for twin, e in zip(method.teacher.ema.parameters(), expected, strict=True):
        np.testing.assert_allclose(numpy(twin), e, rtol=1e-12, atol=1e-12)


def test_the_teachers_temperature_rises_and_the_last_layer_waits():
    method = method_of(teacher_warmup=4.0, freeze=2.0)
    for epoch, sharpness, moving in ((0, 0.04, 0), (1, 0.0475, 0), (2, 0.055, 1), (4, 0.07, 1), (9, 0.07, 1)):
        for given in (float(epoch), torch.tensor(float(epoch))):
            method.begin_step(given)
            assert float(method.sharpness) == pytest.approx(sharpness, rel=1e-6)
            assert float(method.moving) == moving
        views, h = inputs(method)
        method.last.weight.grad = None
        method(views, h[:2], torch.arange(6))[0].backward()
        assert bool(method.last.weight.grad.abs().max() > 0) == bool(moving)


def test_the_head_has_two_hidden_layers_and_no_batch_statistics():
    method = DINO(TinyEncoder(), out_features=6, outputs=8)
    assert [type(layer).__name__ for layer in method.branch] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert (method.views, method.online, method.small_views) == (10, 2, 8)
    torch.testing.assert_close(method.encode_teacher(torch.ones(1, 3, 2, 2)).abs().le(1).all(), torch.tensor(True))


@pytest.mark.parametrize("changes", [{"outputs": 1}, {"small_views": -1}, {"center_momentum": 1}, {"temperature": 0},
                                     {"teacher_temperature": 0}])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        method_of(**changes)
