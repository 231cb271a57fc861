"""Memories against their definitions, over many steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import normal, numpy, unit
from torch import nn

from crosslevel.methods.memory import InstanceBank, KeyQueue, MomentumCopy

seeds = st.integers(0, 2**31 - 1)


@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), min_size=50, max_size=50), seed=seeds)
def test_queue_holds_the_newest_keys_in_order(size, batches, seed):
    """50 steps of any size, the empty batch and ones larger than the queue included."""
    queue = KeyQueue(size, 3)
    history = queue.keys.clone()
    for step, batch in enumerate(batches):
        keys = normal(seed + step, batch, 3, dtype=torch.float32)
        queue.enqueue(keys)
        history = torch.cat([history, keys])[-size:]
        oldest_first = queue.keys.roll(-int(queue.position), 0)
        assert torch.equal(oldest_first, history)


def test_queue_starts_with_different_unit_vectors():
    queue = KeyQueue(64, 16)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(64))
    assert (queue.keys @ queue.keys.T - torch.eye(64)).abs().max() < 0.99
    assert set(queue.state_dict()) == {"keys", "position"}
    assert not list(queue.parameters())


def test_queue_takes_keys_without_their_gradient_and_in_another_precision():
    queue, keys = KeyQueue(4, 3), normal(0, 2, 3, dtype=torch.bfloat16).requires_grad_()
    queue.enqueue(keys)
    assert not queue.keys.requires_grad
    assert torch.equal(queue.keys[:2], keys.detach().float())


def test_queue_continues_from_its_state():
    queue, copy = KeyQueue(5, 3), KeyQueue(5, 3)
    queue.enqueue(normal(0, 3, 3))
    copy.load_state_dict(queue.state_dict())
    for each in (queue, copy):
        each.enqueue(normal(1, 4, 3))
    assert torch.equal(queue.keys, copy.keys)
    assert int(queue.position) == int(copy.position) == 2


@pytest.mark.parametrize("size", [0, -1])
def test_queue_must_hold_a_key(size):
    with pytest.raises(ValueError, match=f"queue={size} must hold at least one key"):
        KeyQueue(size)


@given(seed=seeds, momentum=st.floats(0, 0.99))
def test_bank_follows_its_recurrence(seed, momentum):
    bank = InstanceBank(20, 4, momentum)
    expected = numpy(bank.rows).astype(np.float64)
    for step in range(50):
        chosen = torch.randperm(20, generator=torch.Generator().manual_seed(seed + step))[: 1 + step % 9]
        z = torch.nn.functional.normalize(normal(seed + step, len(chosen), 4), dim=1)
        bank.update(chosen, z)
        for i, row in zip(chosen.tolist(), numpy(z), strict=True):
            expected[i] = unit(momentum * expected[i] + (1 - momentum) * row)
    np.testing.assert_allclose(numpy(bank.rows), expected, atol=3e-5)
    assert torch.equal(bank(torch.tensor([3, 1])), bank.rows[[3, 1]])


def test_bank_touches_only_the_rows_it_is_told():
    bank = InstanceBank(10, 4)
    before = bank.rows.clone()
    bank.update(torch.tensor([7, 2]), torch.eye(4)[:2].requires_grad_())
    changed = (bank.rows != before).any(1)
    assert changed.nonzero()[:, 0].tolist() == [2, 7]
    assert not bank.rows.requires_grad
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(10))
    assert len(bank) == 10


def test_bank_in_half_precision_rounds_once():
    full, half = InstanceBank(6, 8), InstanceBank(6, 8, dtype=torch.float16)
    full.rows.copy_(half.rows)
    index, z = torch.tensor([4, 0]), torch.nn.functional.normalize(normal(0, 2, 8, dtype=torch.float32), dim=1)
    full.update(index, z)
    half.update(index, z)
    assert half.rows.dtype == torch.float16
    assert torch.equal(half.rows, full.rows.half())


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_bank_momentum_range(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} must be in \[0, 1\)"):
        InstanceBank(4, 4, momentum)


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


@given(seed=seeds, momentum=st.floats(0, 1))
def test_twin_follows_its_recurrence(seed, momentum):
    """Over 50 steps, with a momentum that changes half-way."""
    module = network().double()
    copy = MomentumCopy(module, momentum)
    expected = [numpy(p).copy() for p in module.parameters()]
    for step in range(50):
        if step == 25:
            copy.momentum = momentum = 0.5
        with torch.no_grad():
            for i, parameter in enumerate(module.parameters()):
                parameter.copy_(normal(seed + 10 * step + i, *parameter.shape))
        copy.update(module)
        new = [numpy(p) for p in module.parameters()]
        expected = [momentum * old + (1 - momentum) * p for old, p in zip(expected, new, strict=True)]
    for mine, theirs in zip(copy.ema.parameters(), expected, strict=True):
        np.testing.assert_allclose(numpy(mine), theirs, rtol=1e-12, atol=1e-14)


def test_twin_starts_equal_but_apart_and_takes_no_gradient():
    module = network().eval()
    copy = MomentumCopy(module).eval()
    x = normal(0, 3, 4, dtype=torch.float32).requires_grad_()
    assert torch.equal(copy(x), module(x))
    assert not copy(x).requires_grad
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        module[0].weight.zero_()
    assert not torch.equal(copy(x), module(x))


def test_twin_keeps_its_own_batch_statistics():
    module = network()
    copy = MomentumCopy(module, momentum=0.0)
    x = normal(0, 8, 4, dtype=torch.float32)
    module(x)
    copy.update(module)
    assert copy.ema[1].running_mean.abs().max() == 0
    copy(x)
    assert torch.equal(copy.ema[1].running_mean, module[1].running_mean)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a method"])
def test_a_state_of_a_former_version_is_the_averages(inside):
    """The averaged module was called ``twin``; a module of a method's own may still be."""
    ready = [MomentumCopy(network()) for _ in range(2)]
    former, present = (nn.ModuleDict({"key": copy, "twin": nn.Linear(2, 3)}) if inside else copy for copy in ready)
    state = {name.replace("ema.", "twin."): value + 1 for name, value in former.state_dict().items()}
    assert not any("ema" in name for name in state)
    present.load_state_dict(state)
    for name, value in present.state_dict().items():
        assert torch.equal(value, former.state_dict()[name] + 1), name
    assert any(name.startswith("twin.") for name in state)  # as they were handed in


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_twin_momentum_range(momentum):
    with pytest.raises(ValueError, match=rf"momentum={momentum} must be in \[0, 1\]"):
        MomentumCopy(network(), momentum)
