"""Accuracies against scikit-learn and against sums made by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import normal
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from crosslevel.metrics.shots import accuracies, split_by_frequency

seeds = st.integers(0, 2**31 - 1)


def split(counts, limits=None):
    shots = split_by_frequency(torch.tensor(counts), limits)
    return shots and (shots.many.tolist(), shots.medium.tolist(), shots.few.tolist(), shots.low, shots.high)


def test_the_conventions_limits():
    """Exactly 20 and exactly 100 images are medium-shot."""
    assert split([100, 19, 101, 20, 0, 500, 1]) == ([2, 5], [0, 3], [1, 6], 20, 100)


def test_thirds_where_the_convention_leaves_a_split_empty():
    assert split([10, 60, 20, 50, 30, 40]) == ([1, 3], [4, 5], [0, 2], 30, 40)
    assert split([300, 200, 900, 0]) == ([2], [0], [1], 300, 300)


def test_ties_at_a_third_stay_together():
    many, medium, few, _, _ = split([10, 10, 10, 10, 50, 60])
    assert (many, medium, few) == ([4, 5], [0, 1, 2, 3], [])


@pytest.mark.parametrize("counts", [[50] * 10, [5, 5, 0, 5], [3, 200], [0, 0, 0]])
def test_no_split_of_equal_or_too_few_classes(counts):
    assert split(counts) is None


def test_given_limits_are_taken():
    assert split([5] * 3, (1, 4)) == ([0, 1, 2], [], [], 1, 4)
    assert split([1, 2, 3], (2, 2)) == ([2], [1], [0], 2, 2)
    with pytest.raises(ValueError, match=r"shots=\(9, 3\): the first limit must not exceed the second"):
        split([5] * 3, (9, 3))


def test_limits_are_described():
    assert split_by_frequency(torch.tensor([1, 50, 500])).describe() == "many: over 100 training images, few: under 20"


@given(counts=st.lists(st.integers(0, 300), min_size=3, max_size=30))
def test_every_known_class_is_in_one_split(counts):
    found = split(counts)
    known = [c for c, count in enumerate(counts) if count]
    if len(known) < 3 or len({counts[c] for c in known}) == 1:
        assert found is None
        return
    many, medium, few, low, high = found
    assert sorted(many + medium + few) == known
    assert all(counts[c] > high for c in many)
    assert all(counts[c] < low for c in few)
    assert all(low <= counts[c] <= high for c in medium)
    if len({counts[c] for c in known}) == len(known) and (low, high) != (20, 100):
        assert len(many) == len(few) == len(known) // 3


@given(seed=seeds, classes=st.integers(6, 12), queries=st.integers(20, 60))
def test_accuracies_are_scikit_learns(seed, classes, queries):
    """Some classes without test images, one without training images."""
    scores = normal(seed, queries, classes)
    labels = torch.randint(classes - 1, (queries,), generator=torch.Generator().manual_seed(seed))
    counts = torch.arange(classes) * 17
    shots = split_by_frequency(counts)
    found = accuracies(scores, labels, counts, shots)
    guess = scores.argmax(1)
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, guess), abs=1e-4)
    top5 = top_k_accuracy_score(labels, scores, k=5, labels=range(classes))
    assert found["top5"] == pytest.approx(100 * top5, abs=1e-4)
    recalls = recall_score(labels, guess, labels=labels.unique(), average=None, zero_division=0)
    by_class = dict(zip(labels.unique().tolist(), recalls, strict=True))
    assert found["balanced"] == pytest.approx(100 * np.mean(recalls), abs=1e-4)
    if set(guess.tolist()) <= set(labels.tolist()):
        assert found["balanced"] == pytest.approx(100 * balanced_accuracy_score(labels, guess), abs=1e-4)
    for name in ("many", "medium", "few"):
        tested = [by_class[c] for c in getattr(shots, name).tolist() if c in by_class]
        assert (name in found) == bool(tested)
        if tested:
            assert found[name] == pytest.approx(100 * np.mean(tested), abs=1e-4)


def test_accuracies_by_hand():
    """Class 0 is right in 3 of 4, class 1 in 1 of 2, class 2 in 0 of 1; class 3 is not tested."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    guesses = torch.tensor([0, 0, 0, 3, 1, 0, 1])
    counts = torch.tensor([500, 50, 40, 3])
    scores = torch.nn.functional.one_hot(guesses, 4).float()
    found = accuracies(scores, labels, counts, split_by_frequency(counts))
    expected = {"top1": 400 / 7, "balanced": 125 / 3, "many": 75, "medium": 25}
    assert found == pytest.approx(expected)
    assert "few" not in accuracies(scores, labels, counts, None)
