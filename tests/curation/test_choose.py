"""Who is chosen: as many, each once; balanced where crowds are not; against independent references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from table_samples import crowds

from crosslevel.curation.choose import choose, even_shares, facility_location, farthest_first, typical

HOWS = ("balanced", "typical", "diverse", "covering", "random")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("n", [1, 7, 60, 500])
def test_as_many_as_asked_for_each_once(how, n):
    features, _ = crowds([60, 20, 10])
    rows = choose(features, n, how)
    assert len(rows) == min(n, 90)
    assert len(rows.unique()) == len(rows)
    assert torch.equal(rows, choose(4 * features, n, how))


@pytest.mark.parametrize("how", ["balanced", "typical", "diverse", "covering"])
def test_small_crowds_are_not_missed_as_by_chance(how):
    """Of ten crowds, the largest with 300 and the smallest with 6, twenty random images miss some."""
    sizes = [300, 200, 120, 80, 50, 30, 20, 12, 8, 6]
    features, owner = crowds(sizes, noise=0.05)
    found = owner[choose(features, 20, how)].bincount(minlength=10)
    by_chance = owner[choose(features, 20, "random")].bincount(minlength=10)
    assert (found > 0).all()
    assert (by_chance == 0).any()
    if how == "balanced":
        assert found.max() <= 5


@pytest.mark.parametrize("how", ["balanced", "covering"])
def test_small_crowds_that_hardly_differ_from_the_mean_are_not_missed(how):
    """As behind a ReLU: all features share a direction, and rare kinds, seldom trained on, hardly leave it."""
    sizes = [300, 200, 120, 80, 20, 20, 20, 20, 20, 20]
    features, owner = crowds(sizes, noise=0.05)
    features = F.normalize(features, dim=1) * torch.where(owner < 4, 1.0, 0.1).unsqueeze(1)
    shared = torch.full((features.shape[1],), 2.0)
    rows = choose(features + shared, 30, how)
    assert (owner[rows].bincount(minlength=10) > 0).all()


def test_farthest_first_is_that_of_float64():
    features, _ = crowds([30, 10, 5], noise=0.4)
    x = F.normalize(features, dim=1)
    rows = farthest_first(x, 8).tolist()
    y = x.double().numpy()
    chosen = [rows[0]]
    assert rows[0] == int(np.argmax(y @ y.mean(0)))
    while len(chosen) < 8:
        chosen.append(int(np.argmin((y @ y[chosen].T).max(1))))
    assert rows == chosen


def test_typical_features_have_the_nearest_neighbours_of_their_cluster_in_float64():
    """TypiClust's rule by itself: of the largest clusters the feature with the least mean distance to 20 others."""
    features, _ = crowds([60, 40, 25, 4], noise=0.3)
    x = F.normalize(features, dim=1)
    generator = torch.Generator().manual_seed(3)
    seed = int(torch.randint(2**31 - 1, (1,), generator=torch.Generator().manual_seed(3)))
    owner = KMeans(6, n_init=1, max_iter=20, random_state=seed).fit_predict(x.numpy())
    y, chosen = x.double().numpy(), []
    sizes = np.bincount(owner)
    for cluster in sorted(range(6), key=lambda c: (sizes[c] < 5, -sizes[c])):
        rows = np.flatnonzero(owner == cluster)
        apart = np.sort(np.linalg.norm(y[rows, None] - y[None, rows], axis=2), axis=1)[:, 1:21]
        chosen.append(int(rows[apart.mean(1).argmin()]) if len(rows) > 1 else int(rows[0]))
    assert typical(x, 6, generator).tolist() == chosen


def test_more_typical_ones_than_clusters_are_taken_in_turns():
    features, owner = crowds([50, 40, 30], noise=0.02)
    rows = typical(F.normalize(features, dim=1), 12, torch.Generator().manual_seed(0), most=3)
    assert owner[rows].bincount().tolist() == [4, 4, 4]


def test_facility_location_covers_nearly_as_well_as_the_greedy_that_tries_all():
    features, _ = crowds([40, 30, 20, 10], noise=0.5)
    x = F.normalize(features, dim=1)
    cosines = (x @ x.T).double().numpy()
    chosen, best = [], np.full(len(x), -1.0)
    for _ in range(8):
        gains = np.maximum(cosines - best[:, None], 0).sum(0)
        chosen.append(int(gains.argmax()))
        best = np.maximum(best, cosines[:, chosen[-1]])
    rows = facility_location(x, 8, torch.Generator().manual_seed(0)).tolist()
    random = np.random.default_rng(0).permutation(len(x))[:8]
    covered = {name: cosines[:, own].max(1).mean() for name, own in
               (("greedy", chosen), ("ours", rows), ("random", random))}  # fmt: skip
    assert covered["ours"] > covered["random"] + 0.5 * (covered["greedy"] - covered["random"])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 400))
def test_shares_are_as_even_as_the_sizes_allow(sizes, n):
    shares = even_shares(torch.tensor(sizes), n).tolist()
    assert sum(shares) == min(n, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    unfilled = [share for share, size in zip(shares, sizes, strict=True) if share < size]
    if unfilled:
        assert max(shares) <= min(unfilled) + 1
