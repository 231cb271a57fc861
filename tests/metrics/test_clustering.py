"""Agreement of partitions against contingency tables in NumPy and every matching; k-means on what it must find."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.metrics.clustering import agreement, clusters, matched_accuracy

partitions = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)))
)


def table(a, b):
    return np.array([[np.sum((a == i) & (b == j)) for j in range(4)] for i in range(4)])


@given(pair=partitions)
def test_agreement_is_its_definition(pair):
    a, b = (np.array(side) for side in pair)
    found = agreement(torch.tensor(a), torch.tensor(b))
    counts, n = table(a, b), len(a)
    best = max(sum(counts[i, p[i]] for i in range(4)) for p in permutations(range(4)))
    assert found["accuracy"] == pytest.approx(100 * best / n)
    p = counts / n
    rows, columns = p.sum(1), p.sum(0)
    entropy = [-sum(x * np.log(x) for x in side if x > 0) for side in (rows, columns)]
    mutual = sum(p[i, j] * np.log(p[i, j] / (rows[i] * columns[j])) for i in range(4) for j in range(4) if p[i, j] > 0)
    if sum(entropy) > 0:
        assert found["nmi"] == pytest.approx(100 * 2 * mutual / sum(entropy), abs=1e-6)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    same_a, same_b = (np.array([side[i] == side[j] for i, j in pairs]) for side in (a, b))
    chance = same_a.mean() * same_b.mean()
    most = (same_a.mean() + same_b.mean()) / 2
    if most - chance > 1e-12:
        assert found["ari"] == pytest.approx(100 * ((same_a & same_b).mean() - chance) / (most - chance), abs=1e-6)


def test_names_of_clusters_do_not_matter():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert agreement((labels + 1) % 3, labels) == pytest.approx({"nmi": 100, "ari": 100, "accuracy": 100})


def test_more_clusters_than_labels():
    assert matched_accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])) == 0.5


def test_kmeans_finds_separate_clouds_by_direction():
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(30)
    length = 0.1 + torch.rand(120, 1, generator=draws)
    features = length * (torch.eye(4)[labels] + 0.05 * torch.randn(120, 4, generator=draws))
    found = clusters(features, 4)
    assert agreement(found, labels)["accuracy"] == 100
    assert torch.equal(found, clusters(features, 4))


def test_wrong_use():
    with pytest.raises(ValueError, match="clusters=6 must be between 1 and the 5 images"):
        clusters(torch.eye(5), 6)
    with pytest.raises(ValueError, match="2 clusters, 3 labels"):
        agreement(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
