"""Nearest neighbours, found through blocks, against sorting everything."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.metrics import nearest as module
from crosslevel.metrics.nearest import nearest


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        patch.setattr(module, "FEW", 10)
        values, index = nearest(asked, bank, k, chunk)
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


def test_memory_stays_below_its_limit(monkeypatch):
    """With room for the similarities of three queries, eight are answered in three parts, and alike."""
    monkeypatch.setattr(module, "MEMORY", 3 * 8192 * 4)
    sizes = []
    fill = module._fill
    monkeypatch.setattr(module, "_fill", lambda table, *rest: sizes.append(len(table)) or fill(table, *rest))
    bank, asked = draw(0, 8000, 8), draw(1, 8, 8)
    values, _ = nearest(asked, bank, 20)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(values.double(), everything(asked, bank, 20).values, atol=1e-6, rtol=0)
