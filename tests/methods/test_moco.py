"""MoCo against its equation, its queue and its moving average over many steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import TinyEncoder, gradient, info_nce, linear, normal, numpy, unit

from crosslevel.methods import MoCo

seeds = st.integers(0, 2**31 - 1)


def build(seed=0, **options):
    encoder = TinyEncoder(seed).double()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MoCo(encoder, head="linear", out_features=4, **options).double()


def moved(method, seed):
    """The trained network after a step that the test made up."""
    with torch.no_grad():
        for i, p in enumerate([*method.encoder.parameters(), *method.branch.parameters()]):
            p.add_(0.1 * normal(seed + i, *p.shape))


@pytest.mark.parametrize("online", [1, 2])
@given(seed=seeds, batch=st.integers(1, 6), temperature=st.floats(0.1, 1))
def test_loss_and_gradient_are_the_equation(online, seed, batch, temperature):
    """Both queries have the same key: the momentum network's feature of the last view."""
    method = build(seed, queue=7, online=online, temperature=temperature)
    moved(method, seed)
    views = [normal(seed + i, batch, 3, 2, 2) for i in range(online + 1)]
    h = [normal(seed + 5 + i, batch, 5).requires_grad_() for i in range(online)]
    loss, _ = method(views, h, torch.arange(batch))
    loss.backward()
    encoder, branch = method.key.ema
    last = numpy(views[-1]).reshape(batch, -1)
    key = linear(np.tanh(last @ numpy(encoder.linear.weight).T + numpy(encoder.linear.bias)), branch)
    queue = numpy(method.negatives.keys)

    def expected(x):
        return info_nce(linear(x, method.branch), key, queue, temperature)

    assert loss.item() == pytest.approx(np.mean([expected(numpy(q)) for q in h]), rel=1e-6)
    for query in h:
        slope = gradient(expected, numpy(query)) / online
        np.testing.assert_allclose(numpy(query.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)
    assert (method.views, method.online) == (online + 1, online)


def test_no_gradient_reaches_the_momentum_network_or_the_queue():
    method = build(queue=7)
    views = [normal(i, 3, 3, 2, 2).requires_grad_() for i in range(2)]
    method(views, [method.encoder(views[0])], torch.arange(3))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key.parameters())
    assert not method.negatives.keys.requires_grad
    assert views[0].grad.abs().max() > 0
    assert views[1].grad is None
    assert all(p.grad.abs().max() > 0 for p in [*method.encoder.parameters(), *method.branch.parameters()])


def test_queue_and_momentum_network_over_fifty_steps():
    """Keys enter the queue only after the step; the twin follows the trained network's new weights."""
    method = build(queue=16, momentum=0.9)
    history = numpy(method.negatives.keys)
    twin = [numpy(p).copy() for p in method.key.parameters()]
    for step in range(50):
        batch = 1 + (7 * step) % 23  # batches larger than the queue among them
        views = [normal(100 * step + i, batch, 3, 2, 2) for i in range(2)]
        before = method.negatives.keys.clone()
        _, kept = method(views, [method.encoder(views[0])], torch.arange(batch))
        assert torch.equal(method.negatives.keys, before)
        x = numpy(views[1]).reshape(batch, -1)
        keys = unit(np.tanh(x @ twin[0].T + twin[1]) @ twin[2].T + twin[3])
        moved(method, step)
        method.after_step(0.0, kept)
        history = np.concatenate([history, keys])[-16:]
        trained = [*method.encoder.parameters(), *method.branch.parameters()]
        twin = [0.9 * old + 0.1 * numpy(p) for old, p in zip(twin, trained, strict=True)]
        oldest_first = method.negatives.keys.roll(-int(method.negatives.position), 0)
        np.testing.assert_allclose(numpy(oldest_first), history, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(method.key.parameters(), twin, strict=True):
            np.testing.assert_allclose(numpy(mine), theirs, rtol=1e-10, atol=1e-12)


def test_accumulated_batches_are_all_enqueued():
    method = build(queue=16)
    views = [normal(i, 4, 3, 2, 2) for i in range(4)]
    keys = torch.cat([method.encode_key(views[1]), method.encode_key(views[3])])
    _, first = method(views[:2], [method.encoder(views[0])], torch.arange(4))
    _, second = method(views[2:], [method.encoder(views[2])], torch.arange(4))
    method.after_step(0.0, first, second)
    assert torch.equal(method.negatives.keys[:8], keys)
    method.after_step()
    assert int(method.negatives.position) == 8


def test_momentum_may_change_between_steps():
    method = build(queue=4, momentum=1.0)
    before = [p.clone() for p in method.key.parameters()]
    moved(method, 1)
    method.after_step()
    assert all(torch.equal(p, old) for p, old in zip(method.key.parameters(), before, strict=True))
    method.momentum = 0.0
    method.after_step()
    trained = [*method.encoder.parameters(), *method.branch.parameters()]
    for mine, theirs in zip(method.key.parameters(), trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_state_continues_the_queue_and_the_twin():
    method, copy = build(queue=5), build(1, queue=5)
    views = [normal(i, 3, 3, 2, 2) for i in range(2)]
    _, kept = method(views, [method.encoder(views[0])], torch.arange(3))
    method.after_step(0.0, kept)
    copy.load_state_dict(method.state_dict())
    h = [normal(3, 3, 5)]
    assert torch.equal(method(views, h, torch.arange(3))[0], copy(views, h, torch.arange(3))[0])


def test_queue_must_hold_a_key():
    with pytest.raises(ValueError, match="queue=0 must hold at least one key"):
        build(queue=0)


def test_split_statistics_leave_each_key_with_its_image():
    """Without batch statistics, splits change nothing but the order of work."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        methods = [MoCo(TinyEncoder(), out_features=4, splits=splits) for splits in (1, 3)]
        methods[1].load_state_dict(methods[0].state_dict())
        view = normal(0, 10, 3, 2, 2, dtype=torch.float32)
        keys = [method.encode_key(view) for method in methods]
    torch.testing.assert_close(*keys)


@pytest.mark.parametrize(("batch", "splits"), [(9, 4), (10, 8), (8, 8)])
def test_keys_are_normalized_in_as_many_parts_as_asked(batch, splits):
    """Also where the batch does not divide: 9 images in 4 parts are 3, 2, 2, 2."""
    method, seen = MoCo(TinyEncoder(), out_features=4, splits=splits), []
    encode = method.key.ema[0].forward
    method.key.ema[0].forward = lambda x: (seen.append(len(x)), encode(x))[1]
    method.encode_key(normal(0, batch, 3, 2, 2, dtype=torch.float32))
    assert (len(seen), sum(seen)) == (splits, batch)
    assert max(seen) - min(seen) <= 1


def test_splits_must_be_positive():
    with pytest.raises(ValueError, match="splits=0"):
        MoCo(TinyEncoder(), splits=0)
