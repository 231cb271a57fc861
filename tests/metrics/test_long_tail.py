"""Inequality and shares of duplicates, against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.metrics import long_tail

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(torch.tensor)


@given(SIZES)
def test_gini_is_half_the_relative_mean_difference(sizes):
    x = sizes.double()
    mean_difference = (x[:, None] - x).abs().mean()
    assert long_tail.gini(sizes) == pytest.approx(float(mean_difference / (2 * x.mean())), abs=1e-9)


def test_empty_groups_do_not_count():
    assert long_tail.imbalance_factor(torch.tensor([0, 5, 20])) == 4
    assert long_tail.gini(torch.tensor([0, 7, 7])) == 0
    with pytest.raises(ValueError, match="no group"):
        long_tail.gini(torch.tensor([0]))


@given(SIZES, st.integers(1, 40))
def test_shares_are_exact(sizes, batch):
    total = int(sizes.sum())
    b = min(batch, total)
    alone = sum(m * math.comb(total - m, b - 1) / math.comb(total - 1, b - 1) for m in sizes.tolist()) / total
    assert long_tail.duplicate_share(sizes, batch) == pytest.approx(1 - alone, abs=1e-9)
    held = sum(1 - math.comb(total - m, b) / math.comb(total, b) for m in sizes.tolist())
    assert long_tail.distinct_tracks(sizes, batch) == pytest.approx(held, abs=1e-9)


def test_the_share_agrees_with_drawing():
    sizes = torch.tensor([1] * 50 + [10] * 20)
    owner = torch.arange(70).repeat_interleave(sizes)
    draws, shares = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        batch = owner[torch.randperm(250, generator=draws)[:32]]
        shares.append(float((torch.bincount(batch)[batch] > 1).float().mean()))
    assert long_tail.duplicate_share(sizes, 32) == pytest.approx(sum(shares) / 2000, abs=0.01)


def test_a_large_collection_keeps_its_digits():
    assert long_tail.duplicate_share(torch.full((50_000,), 2), 2) == pytest.approx(1 / 99_999, rel=1e-4)
    assert long_tail.duplicate_share(torch.ones(10, dtype=torch.long), 256) == 0
    for broken in (torch.tensor([0]), 4), (torch.tensor([3]), 0):
        with pytest.raises(ValueError, match="at least one"):
            long_tail.duplicate_share(*broken)


def test_groups_count_a_track_once_and_come_by_size():
    draws = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8)
    of_track = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)
    tracks = torch.arange(70).repeat_interleave(torch.tensor([1] * 40 + [6] * 30))
    features = centres[of_track[tracks]] + 0.05 * torch.randn(len(tracks), 8, generator=draws)
    found = long_tail.grouped(features, tracks)
    assert torch.equal(found.groups, of_track[tracks])
    assert found.separation > 0.5


def mixture(sizes, apart, seed, dimensions=16):
    """Gaussian classes of these sizes around random directions, ``apart`` standard deviations from the origin."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), dimensions, generator=draws), dim=1) * apart
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return centres[labels] + torch.randn(len(labels), dimensions, generator=draws), labels


@pytest.mark.parametrize("classes", [4, 8])
def test_sizes_of_separate_groups_rank_the_imbalance(classes):
    true, ratios, ginis = [1, 3, 10, 30], [], []
    for imbalance in true:
        weights = torch.tensor([imbalance ** (-c / (classes - 1)) for c in range(classes)])
        sizes = (weights / weights.sum() * 600).round().long().tolist()
        features, labels = mixture(sizes, 12.0, imbalance)
        found = long_tail.grouped(features, torch.arange(len(labels)))
        counts = torch.bincount(found.groups)
        ratios.append(long_tail.imbalance_factor(counts))
        ginis.append(long_tail.gini(counts))
        assert found.separation > 0.25
    assert sorted(ratios) == ratios
    assert sorted(ginis) == ginis


@pytest.mark.parametrize(("classes", "imbalance"), [(2, 3.0), (10, 1.0), (10, 100.0), (100, 20.0)])
def test_the_imbalance_of_an_exponential_decay_is_found_by_its_gini_index(classes, imbalance):
    sizes = 1000 * imbalance ** (-torch.arange(classes, dtype=torch.float64) / (classes - 1))
    assert long_tail.exponential_imbalance(sizes) == pytest.approx(imbalance, rel=1e-3)
    assert long_tail.exponential_imbalance(sizes.flip(0) / 7) == pytest.approx(imbalance, rel=1e-3)


def test_one_straggler_hardly_changes_the_imbalance_of_a_decay():
    sizes = torch.tensor([100] * 10 + [1])
    assert long_tail.imbalance_factor(sizes) == 100
    assert 1 < long_tail.exponential_imbalance(sizes) < 3
    assert long_tail.exponential_imbalance(torch.tensor([5])) == 1
    with pytest.raises(ValueError, match="no group"):
        long_tail.exponential_imbalance(torch.tensor([0]))


def test_dense_groups_are_found_in_whatever_number_and_shape_and_stragglers_go_with_the_nearest():
    """More groups than a mixture would have, drawn-out ones, and tracks far from all."""
    draws = torch.Generator().manual_seed(0)
    sizes = torch.tensor([40] * 5 + [10] * 25)
    labels = torch.arange(30).repeat_interleave(sizes)
    noise = torch.randn(len(labels), 32, generator=draws)
    noise[:, 0] *= 3
    features = 40 * torch.eye(30, 32)[labels] + noise
    far = torch.arange(0, len(labels), 15)
    features[far] += 12 * torch.randn(len(far), 32, generator=draws)
    found = long_tail.grouped(features, torch.arange(len(labels)))
    near = torch.ones(len(labels), dtype=torch.bool)
    near[far] = False
    named = [found.groups[near & (labels == c)].unique() for c in range(30)]
    assert all(len(groups) == 1 for groups in named)
    assert len(torch.cat(named).unique()) == 30
    assert long_tail.grouped(features, torch.arange(len(labels)), most=8).groups.max() < 8


def test_one_cloud_has_no_separate_groups():
    features, labels = mixture([500], 0.0, 0)
    assert long_tail.grouped(features, torch.arange(len(labels))).separation < 0.25


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_or_equal_images_are_grouped(count):
    equal = torch.ones(count, 4)
    found = long_tail.grouped(equal, torch.arange(count), most=3)
    assert len(found.groups) == count
    assert found.separation == 0
    assert int(found.groups.max()) < 3


def test_the_same_seed_gives_the_same_groups():
    features, labels = mixture([60, 30, 10], 3.0, 5)
    tracks = torch.arange(len(labels))
    assert torch.equal(
        long_tail.grouped(features, tracks, 6, 1).groups, long_tail.grouped(features, tracks, 6, 1).groups
    )
