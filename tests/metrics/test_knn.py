"""The weighted kNN classifier against a loop over queries and neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import normal, numpy, unit
from sklearn.neighbors import KNeighborsClassifier

from crosslevel.metrics.knn import neighbours, weighted_knn

seeds = st.integers(0, 2**31 - 1)


def loop(bank, labels, queries, classes, k, temperature):
    """The votes, relative to the nearest neighbour's."""
    votes = np.zeros((len(queries), classes))
    for row, query in zip(votes, unit(queries), strict=True):
        cosines = [query @ key for key in unit(bank)]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        for i in nearest:
            row[labels[i]] += np.exp((cosines[i] - cosines[nearest[0]]) / temperature)
    return votes


@given(
    seed=seeds,
    size=st.integers(1, 40),
    k=st.integers(1, 60),
    classes=st.integers(1, 6),
    temperature=st.floats(0.02, 2),
    chunk=st.integers(1, 9),
)
def test_votes_are_the_loop(seed, size, k, classes, temperature, chunk):
    """k beyond the bank takes all of it; the chunk changes nothing."""
    bank, queries = normal(seed, size, 4), 3 * normal(seed + 1, 7, 4)
    labels = torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))
    votes = weighted_knn(bank, labels, queries, classes, k, temperature, chunk)
    expected = loop(numpy(bank), labels.tolist(), numpy(queries), classes, k, temperature)
    np.testing.assert_allclose(numpy(votes), expected, rtol=1e-9, atol=1e-12)
    assert votes.argmax(1).tolist() == expected.argmax(1).tolist()


def test_predictions_are_scikit_learns():
    bank, queries = unit(numpy(normal(0, 300, 8))), unit(numpy(normal(1, 200, 8)))
    labels = (bank[:, 0] > 0).astype(int) + 2 * (bank[:, 1] > 0)
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)).fit(bank, labels)
    ours = weighted_knn(torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries), 4, 20)
    assert ours.argmax(1).tolist() == theirs.predict(queries).tolist()


def test_a_tie_between_classes_goes_to_the_first_of_them():
    bank = torch.tensor([[1.0, 0.2], [1.0, -0.2], [-1.0, 0.0]])
    for labels in ([2, 1, 0], [1, 2, 0]):
        votes = weighted_knn(bank, torch.tensor(labels), torch.tensor([[1.0, 0.0]]), 3, k=2)
        assert votes.tolist() == [[0, 1, 1]]
        assert int(votes.argmax(1)) == 1


def test_a_small_temperature_does_not_overflow():
    votes = weighted_knn(normal(0, 20, 4).float(), torch.arange(20), normal(1, 5, 4).float(), 20, 20, 1e-4)
    assert votes.isfinite().all()
    torch.testing.assert_close(votes.amax(1), torch.ones(5))


def test_no_queries_give_no_votes():
    assert weighted_knn(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(0, 3), 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("bank", "labels", "queries", "message"),
    [
        ((0, 3), [], (2, 3), r"the bank is \(0, 3\), the queries are \(2, 3\): they do not match"),
        ((2, 3), [0, 1], (2, 4), r"the bank is \(2, 3\), the queries are \(2, 4\): they do not match"),
        ((2, 3), [0, 4], (2, 3), r"labels must be 2 integers in \[0, 4\)"),
        ((2, 3), [0, -1], (2, 3), r"labels must be 2 integers in \[0, 4\)"),
        ((2, 3), [0], (2, 3), r"labels must be 2 integers in \[0, 4\)"),
    ],
)
def test_inputs_that_do_not_match(bank, labels, queries, message):
    with pytest.raises(ValueError, match=message):
        weighted_knn(torch.ones(*bank), torch.tensor(labels, dtype=torch.long), torch.ones(*queries), 4)


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.1), (5, 0.0)])
def test_no_neighbours_or_no_temperature_is_refused(k, temperature):
    with pytest.raises(ValueError, match="both must be positive"):
        weighted_knn(torch.eye(3), torch.arange(3), torch.eye(3), 3, k=k, temperature=temperature)


def test_of_few_images_few_vote():
    assert [neighbours(images) for images in (1, 9, 50, 250, 1_999, 2_000, 50_000)] == [1, 1, 5, 25, 199, 200, 200]
