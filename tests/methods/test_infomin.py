"""InfoMin: MoCo's equation for queries and jigsaw, the patches, and the memories over many steps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import gradient, info_nce, linear, normal, numpy, unit
from torch import nn

from crosslevel.methods import InfoMin
from crosslevel.methods.infomin import patch_size, patches
from crosslevel.transforms.views import Views

seeds = st.integers(0, 2**31 - 1)


class MeanEncoder(nn.Module):
    """Views and patches of any size -> (B, 5), without batch statistics."""

    num_features = 5

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return torch.tanh(self.linear(x.mean((2, 3))))


def build(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return InfoMin(MeanEncoder(), head="linear", out_features=4, **options).double()


def encoded(x, encoder, weight=None):
    weight = numpy(encoder.linear.weight) if weight is None else weight
    return np.tanh(x.mean((2, 3)) @ weight.T + numpy(encoder.linear.bias))


@pytest.mark.parametrize("online", [1, 2])
@given(seed=seeds, batch=st.integers(1, 5), share=st.floats(0.1, 0.9))
def test_loss_and_gradient_are_the_equation(online, seed, batch, share):
    method = build(seed, queue=7, online=online, jigsaw=share)
    assert (method.views, method.plain_views) == (online + 2, 1)
    method.encoder.double()
    views = [normal(seed + i, batch, 3, 9, 9) for i in range(online + 2)]
    h = [normal(seed + 5 + i, batch, 5).requires_grad_() for i in range(online)]
    torch.manual_seed(seed)
    cut = patches(views[-1])
    order = torch.rand(batch, 9).argsort(1)
    torch.manual_seed(seed)
    loss, _ = method(views, h, torch.arange(batch))
    loss.backward()
    key = linear(encoded(numpy(views[online]), method.key.ema[0]), method.key.ema[1])
    queue = numpy(method.negatives.keys)
    head = method.jigsaw_branch
    own = {"encoder": method.encoder.linear.weight, "patch": head.patch[0].weight, "join": head.join[0].weight}

    def jigsaw(**moved):
        weight = {name: numpy(value) for name, value in own.items()} | moved
        each = encoded(numpy(cut), method.encoder, weight["encoder"]) @ weight["patch"].T + numpy(head.patch[0].bias)
        each = each.reshape(batch, 9, 4)
        joined = np.stack([each[i, order[i].numpy()].reshape(-1) for i in range(batch)])
        return info_nce(unit(joined @ weight["join"].T + numpy(head.join[0].bias)), key, queue, 0.15)

    def expected(x):
        return info_nce(linear(x, method.branch), key, queue, 0.15)

    instance = np.mean([expected(numpy(q)) for q in h])
    assert loss.item() == pytest.approx((1 - share) * instance + share * jigsaw(), rel=1e-6)
    for query in h:
        slope = (1 - share) * gradient(expected, numpy(query)) / online
        np.testing.assert_allclose(numpy(query.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)
    for name, value in own.items():  # the encoder's through the patches alone
        slope = share * gradient(lambda x, name=name: jigsaw(**{name: x}), numpy(value))
        np.testing.assert_allclose(numpy(value.grad), slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max() + 1e-12)


def test_without_the_jigsaw_it_asks_for_no_plain_view_and_is_moco():
    method = build(jigsaw=0.0, queue=7)
    assert (method.views, method.plain_views) == (2, 0)
    assert not hasattr(method, "jigsaw_branch")
    h = normal(0, 3, 5)
    views = [normal(1, 3, 3, 6, 6), normal(2, 3, 3, 6, 6)]
    key = linear(encoded(numpy(views[1]), method.key.ema[0]), method.key.ema[1])
    expected = info_nce(linear(numpy(h), method.branch), key, numpy(method.negatives.keys), 0.15)
    method.encoder.double()
    assert method(views, [h], torch.arange(3))[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("side", "size"), [(224, 64), (96, 27), (32, 9), (9, 3), (3, 1)])
def test_a_patch_lies_inside_its_cell(side, size):
    assert patch_size(side) == size
    place = torch.arange(side * side).view(1, 1, side, side).expand(40, 3, side, side).float()
    cut = patches(place)
    assert cut.shape == (360, 3, size, size)
    top, left = cut[:, 0, 0, 0].long() // side, cut[:, 0, 0, 0].long() % side
    rows = torch.arange(size).view(-1, 1) * side + torch.arange(size)
    torch.testing.assert_close(cut[:, 0].long() - cut[:, 0, :1, :1].long(), rows.expand(360, -1, -1))
    cell, number = side // 3, torch.arange(9).repeat(40)
    assert ((top - number // 3 * cell >= 0) & (top - number // 3 * cell + size <= cell)).all()
    assert ((left - number % 3 * cell >= 0) & (left - number % 3 * cell + size <= cell)).all()
    if cell > size:
        assert top.view(40, 9).unique(dim=0).shape[0] > 1


def test_key_and_queue_over_fifty_steps():
    method = build(queue=16, momentum=0.9)
    method.encoder.double()
    history = numpy(method.negatives.keys)
    twin = [numpy(p).copy() for p in method.key.parameters()]
    for step in range(50):
        batch = 1 + (7 * step) % 23
        views = [normal(100 * step + i, batch, 3, 6, 6) for i in range(3)]
        _, kept = method(views, [method.encoder(views[0])], torch.arange(batch))
        x = numpy(views[1]).mean((2, 3))
        keys = unit(np.tanh(x @ twin[0].T + twin[1]) @ twin[2].T + twin[3])
        with torch.no_grad():
            for i, p in enumerate([*method.encoder.parameters(), *method.branch.parameters()]):
                p.add_(0.1 * normal(step + i, *p.shape))
        method.after_step(0.0, kept)
        history = np.concatenate([history, keys])[-16:]
        moved = [numpy(p) for p in [*method.encoder.parameters(), *method.branch.parameters()]]
        twin = [0.9 * old + 0.1 * new for old, new in zip(twin, moved, strict=True)]
        for mine, p in zip(twin, method.key.parameters(), strict=True):
            np.testing.assert_allclose(numpy(p), mine, atol=1e-6)
    held = method.negatives.keys.roll(-int(method.negatives.position), 0)
    np.testing.assert_allclose(numpy(held), history, atol=1e-6)


def test_the_plain_view_keeps_its_colours():
    """An image of one colour: after crop and flip alone, it is that colour still."""
    views = Views("infomin", size=32)
    views.count, views.plain = 3, 1
    image = torch.tensor([30, 90, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(16, 3, 40, 40)
    out = views(image, torch.Generator().manual_seed(0))
    color = (torch.tensor([30.0, 90, 200]) / 255 - torch.tensor(views.mean)) / torch.tensor(views.std)
    torch.testing.assert_close(out[2], color.view(3, 1, 1).expand_as(out[2]), atol=1e-4, rtol=0)
    assert (out[1] - color.view(3, 1, 1)).abs().amax((1, 2, 3)).gt(0.05).sum() > 8


def test_patches_are_normalized_in_parts():
    """The patches of an image stay in one part, as on one device; the trained network sees no others beside them."""
    method, seen = build(queue=7, splits=3), []
    method.encoder.double()
    encode = method.encoder.forward
    method.encoder.forward = lambda x: (seen.append(x[:, 0, 0, 0].unique()), encode(x))[1]
    views = [torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 9, 9).double() for _ in range(3)]
    method(views, [normal(0, 8, 5)], torch.arange(8))
    assert [part.tolist() for part in seen] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"jigsaw=1\.0 must be in \[0, 1\)"):
        build(jigsaw=1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        build(temperature=0.0)
