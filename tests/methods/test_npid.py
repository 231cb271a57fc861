"""NPID against its equation, and its bank over many steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, instance_softmax, linear, normal, numpy, unit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crosslevel.methods import NPID

seeds = st.integers(0, 2**31 - 1)
IMAGES = 12


def build(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NPID(TinyEncoder(), IMAGES, out_features=4, **options).double()


@st.composite
def batches(draw):
    """Indices that do not repeat, and a seed."""
    index = draw(st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=6, unique=True))
    return torch.tensor(index), draw(seeds)


@pytest.mark.parametrize("online", [1, 2])
@given(problem=batches(), temperature=st.floats(0.1, 1))
def test_full_softmax_and_its_gradient_are_the_equation(online, problem, temperature):
    index, seed = problem
    method = build(seed, online=online, temperature=temperature)
    h = [normal(seed + i, len(index), 5).requires_grad_() for i in range(online)]
    loss, _ = method([], h, index)
    loss.backward()

    def expected(x):
        z = linear(x, method.branch)
        return instance_softmax(z, index.tolist(), numpy(method.bank.rows), temperature)

    assert loss.item() == pytest.approx(np.mean([expected(numpy(v)) for v in h]), rel=1e-6)
    for view in h:
        slope = gradient(expected, numpy(view)) / online
        np.testing.assert_allclose(numpy(view.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)
    assert not method.bank.rows.requires_grad
    assert method.views == online


@given(problem=batches(), drawn=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=15))
def test_sampled_negatives_are_the_equation(problem, drawn):
    """Given the draws, repetitions and images drawn as their own negatives among them."""
    index, seed = problem
    method = build(seed)
    x = normal(seed, len(index), 4).requires_grad_()
    loss = method.discriminate(torch.nn.functional.normalize(x, dim=1), index, torch.tensor(drawn))
    loss.backward()

    def expected(v):
        return instance_softmax(unit(v), index.tolist(), numpy(method.bank.rows), 0.1, drawn)

    assert loss.item() == pytest.approx(expected(numpy(x)), rel=1e-6, abs=1e-12)
    slope = gradient(expected, numpy(x))
    np.testing.assert_allclose(numpy(x.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


def test_an_image_drawn_as_its_own_negative_is_left_out():
    method, z = build(), torch.nn.functional.normalize(normal(0, 1, 4), dim=1)
    index = torch.tensor([5])
    without = method.discriminate(z, index, torch.tensor([2, 3]))
    assert torch.equal(method.discriminate(z, index, torch.tensor([2, 5, 3])), without)
    assert method.discriminate(z, index, torch.tensor([5, 5])).item() == 0


def test_drawing_is_uniform_and_new_for_each_step():
    method = build(negatives=3)
    drawn = []
    method.discriminate = lambda z, index, rows: drawn.append(rows) or z.sum()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(1000):
            method([], [normal(0, 1, 5)], torch.tensor([0]))
    counts = torch.stack(drawn).flatten().bincount(minlength=IMAGES).double()
    assert len(torch.stack(drawn).unique(dim=0)) > 500
    # Eleven degrees of freedom: beyond 40 with a chance below 1e-4.
    assert ((counts - 250) ** 2 / 250).sum() < 40


@pytest.mark.parametrize("online", [1, 2])
def test_bank_follows_its_recurrence_over_fifty_steps(online):
    """Rows move only after the step, towards the direction of the views' mean feature."""
    method = build(online=online, momentum=0.7)
    bank = numpy(method.bank.rows).copy()
    for step in range(50):
        index = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step))[: 1 + step % 5]
        h = [normal(10 * step + i, len(index), 5) for i in range(online)]
        before = method.bank.rows.clone()
        _, kept = method([], h, index)
        assert torch.equal(method.bank.rows, before)
        method.after_step(0.0, kept)
        z = unit(np.mean([linear(numpy(v), method.branch) for v in h], axis=0))
        for i, row in zip(index.tolist(), z, strict=True):
            bank[i] = unit(0.7 * bank[i] + 0.3 * row)
        np.testing.assert_allclose(numpy(method.bank.rows), bank, atol=1e-5)
    after = method.bank.rows.clone()
    method.after_step()
    assert torch.equal(method.bank.rows, after)


def test_the_bank_may_move_once_for_each_view():
    """As in the backward pass of CLD's authors: to the first view, then on to the second."""
    method = build(online=2, momentum=0.5, per_view=True)
    index = torch.tensor([3, 7])
    row = numpy(method.bank.rows)[index.numpy()]
    h = [normal(i, 2, 5) for i in range(2)]
    _, kept = method([], h, index)
    method.after_step(0.0, kept)
    for v in h:
        row = unit(0.5 * row + 0.5 * unit(linear(numpy(v), method.branch)))
    np.testing.assert_allclose(numpy(method.bank.rows)[index.numpy()], row, atol=1e-6)


def test_it_needs_the_number_of_images():
    with pytest.raises(ValueError, match="it needs a source of known length; use MoCo instead"):
        NPID(TinyEncoder())


@pytest.mark.parametrize("negatives", [0, IMAGES])
def test_negatives_must_be_fewer_than_the_images(negatives):
    with pytest.raises(ValueError, match=f"negatives={negatives} must be between 1 and the 12 images less one"):
        build(negatives=negatives)


class Newest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made, other than the bank itself."""

    def __init__(self, bank):
        super().__init__()
        self.place, self.elements = bank.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.data_ptr() != self.place:
                self.elements = max(self.elements, leaf.numel())
        return out


def test_a_step_with_drawn_negatives_makes_nothing_that_grows_with_the_images():
    made = []
    for images in (300, 300_000):
        method = NPID(TinyEncoder(), images, out_features=4, negatives=64, float16=True)
        index = torch.arange(5) * (images // 5)
        h = normal(0, 5, 5, dtype=torch.float32).requires_grad_()
        with Newest(method.bank.rows) as newest:
            loss, kept = method([], [h], index)
            loss.backward()
            method.after_step(0.0, kept)
        made.append(newest.elements)
    assert made[0] == made[1] == 5 * (1 + 64)
