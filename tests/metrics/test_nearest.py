"""Nearest neighbours, found through blocks, against sorting everything."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crosslevel.data.duplicates.neighbours import Cells
from crosslevel.metrics.nearest import Blocking, least_rounded, mutual_pairs, nearest, rounded_bank


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(queries, keys, k):
    return (F.normalize(queries.double(), dim=1) @ F.normalize(keys.double(), dim=1).T).topk(min(k, len(keys)), dim=1)


@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 300),
    queries=st.integers(0, 9),
    k=st.integers(1, 40),
    chunk=st.integers(1, 5),
    tile=st.sampled_from([8, 32, 64]),
)
def test_blocks_lose_nothing(seed, keys, queries, k, chunk, tile):
    """Small tiles, so that blocks of all sizes and partly filled last tiles occur."""
    bank, asked = draw(seed, keys, 3).double(), draw(seed + 1, queries, 3).double()
    values, index = nearest(asked, bank, k, chunk, Blocking(tile=tile, few=10))
    expected = everything(asked, bank, k)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(index, expected.indices)


def test_a_bank_of_the_usual_size():
    bank, asked = draw(0, 50_000, 16), draw(1, 40, 16)
    values, index = nearest(asked, bank, 200)
    expected = everything(asked, bank, 200)
    torch.testing.assert_close(values.double(), expected.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(F.cosine_similarity(asked.unsqueeze(1), bank[index], dim=2), values)
    # Neighbours may change places only where rounding to float32 does not tell them apart.
    theirs = F.cosine_similarity(asked.unsqueeze(1).double(), bank[expected.indices].double(), dim=2)
    assert (values.double() - theirs).abs().max() < 1e-6


def test_a_bank_in_half_precision_is_that_bank_rounded():
    bank, asked = draw(0, 10_000, 16), draw(1, 20, 16)
    values, index = nearest(asked, bank.half(), 50)
    rounded = nearest(asked, bank.half().float(), 50)
    assert values.dtype == torch.float32
    assert torch.equal(values, rounded[0])
    assert torch.equal(index, rounded[1])


def test_equal_keys_are_each_a_neighbour():
    bank = draw(0, 4, 8).repeat_interleave(2000, dim=0)
    values, index = nearest(bank[:1], bank, 2000)
    torch.testing.assert_close(values, torch.ones(1, 2000))
    assert sorted(index[0].tolist()) == list(range(2000))


class Products(TorchDispatchMode):
    """Notes the type and the number of rows of each matrix product with a whole tile of keys."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.mm.out:
            self.found.append((arguments[0].dtype, len(arguments[0])))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("rounded", [False, True])
def test_memory_stays_below_its_limit(rounded):
    """With room for the similarities of three queries, eight are answered in three parts, and alike."""
    blocking = Blocking(memory=3 * 8192 * (2 if rounded else 4), bfloat16=rounded)
    bank, asked = draw(0, 8000, 64), draw(1, 8, 64)
    with Products() as products:
        values, _ = nearest(asked, bank, 20, blocking=blocking)
    dtype = torch.bfloat16 if rounded else torch.float32
    assert products.found == [(dtype, rows) for rows in (3, 3, 2)]  # of two tiles, the second is not full
    torch.testing.assert_close(values.double(), everything(asked, bank, 20).values, atol=1e-6, rtol=0)


@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(11, 400),
    queries=st.integers(1, 9),
    width=st.sampled_from([3, 48]),
    k=st.integers(1, 40),
    alike=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    half=st.booleans(),
)
def test_what_bfloat16_cannot_tell_apart_is_compared_in_float32(seed, keys, queries, width, k, alike, half):
    """From features in all directions to ones whose similarities differ by less than bfloat16 resolves."""
    centre = draw(seed + 2, 1, width) * alike
    bank, asked = draw(seed, keys, width) + centre, draw(seed + 1, queries, width) + centre
    bank = bank.half() if half else bank
    values, index = nearest(asked, bank, k, blocking=Blocking(tile=32, few=10, bfloat16=True))
    exact = F.normalize(asked.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = exact.topk(min(k, keys), dim=1).values
    # In descending order, each the similarity with its key, each key once, and none of the nearest missing: to the
    # rounding of float32, which is three thousand times finer than the first look.
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, index), expected, atol=2e-6, rtol=0)
    assert all(len(set(row)) == len(row) for row in index.tolist())


def test_the_first_look_decides_most():
    """Ordinary features need no second search; ones that are all alike do."""
    bank, asked = draw(0, 20_000, 128), draw(1, 50, 128)
    for keys, expected in ((bank, {(torch.bfloat16, 50)}), (bank + 1000, {(torch.bfloat16, 50), (torch.float32, 50)})):
        with Products() as products:
            nearest(asked, keys, 100, blocking=Blocking(bfloat16=True))
        assert set(products.found) == expected


def test_the_bound_holds_for_every_pair():
    """No similarity of rounded vectors lies below the limit that its own float32 value has as the k-th."""
    bank, asked = draw(0, 3000, 96), F.normalize(draw(1, 40, 96), dim=1)
    rounded, error = rounded_bank(bank, bank.norm(dim=1), 4096)
    rough = (asked.bfloat16() @ rounded.T).float()
    exact = (asked.double() @ F.normalize(bank.double(), dim=1).T).float()
    for k in (1, 50, 1000):
        limit = least_rounded(rough.topk(k, dim=1).values[:, -1], asked, asked.bfloat16(), error)
        near = exact.topk(k, dim=1).indices
        assert (rough.gather(1, near) >= limit.unsqueeze(1)).all()
    # Nor is it so wide that it says nothing.
    assert error < 2**-8


def test_mutual_pairs_name_each_other_and_are_far_from_others():
    features = draw(0, 80, 3)
    unit = F.normalize(features.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    near = cosine.topk(26, dim=1)
    apart = (2 - 2 * near.values).sqrt()
    limit = apart[:, 13:26].sort(dim=1).values[:, 6] / 2
    wanted = {
        (i, j) for i in range(80) for j in range(i + 1, 80)
        if j in near.indices[i, :3].tolist() and i in near.indices[j, :3].tolist() and cosine[i, j] >= 0.9
        and (2 - 2 * cosine[i, j]).sqrt() <= min(limit[i], limit[j])
    }  # fmt: skip
    assert len(wanted) > 5
    assert {tuple(p) for p in mutual_pairs(features, 0.9, 3).tolist()} == wanted


def test_a_dense_crowd_has_no_mutual_pairs():
    """Different things whose features lie close together, and copies of some, far closer."""
    crowd = F.normalize(torch.ones(1, 32) + 0.1 * draw(0, 400, 32), dim=1)
    copies = F.normalize(crowd[:20] + 0.005 * draw(1, 20, 32), dim=1)
    assert float((crowd @ crowd.T).min()) > 0.9
    assert len(mutual_pairs(crowd, 0.9, 6)) == 0
    found = {tuple(pair) for pair in mutual_pairs(torch.cat([crowd, copies]), 0.9, 6).tolist()}
    assert found == {(i, 400 + i) for i in range(20)}


def test_of_many_features_the_mutual_pairs_are_found_in_cells():
    """Copies among clusters: as with all compared with all, but for some that fall into cells far apart."""
    centres = draw(0, 30, 16)
    features = centres.repeat_interleave(200, dim=0) + 0.3 * draw(1, 6000, 16)
    features = torch.cat([features, features[::20] + 0.01 * draw(2, 300, 16)])
    exact = {tuple(pair) for pair in mutual_pairs(features, 0.98, 6).tolist()}
    planted = {(20 * i, 6000 + i) for i in range(300)}
    assert len(planted & exact) > 290
    through_cells = mutual_pairs(features, 0.98, 6, many=1000, cells=Cells(all=1000, points=64))
    found = {tuple(pair) for pair in through_cells.tolist()}
    assert len(planted & found) >= 0.98 * len(planted & exact)
    assert len(found - exact) <= 0.05 * len(found)
