"""Intervals against their known limits, and their coverage."""

import math

import pytest
import torch

from crosslevel.metrics.bootstrap import accuracy_intervals, intervals
from crosslevel.metrics.shots import accuracies, split_by_frequency


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_of_many_images_it_is_the_normal_interval():
    correct = torch.rand(2000, generator=draws()) < 0.7
    mean = correct.float().mean().item()
    reach = 1.96 * math.sqrt(mean * (1 - mean) / 2000)
    low, high = intervals(correct, generator=draws())
    assert low == pytest.approx(100 * (mean - reach), abs=0.25)
    assert high == pytest.approx(100 * (mean + reach), abs=0.25)


def test_balanced_accuracy_varies_with_its_smallest_class():
    """Nine hundred images of one class and ten of another: half of the figure hangs on the ten."""
    correct = torch.cat([torch.ones(900), torch.tensor([1.0, 0.0]).repeat(5)])
    classes = torch.cat([torch.zeros(900, dtype=torch.long), torch.ones(10, dtype=torch.long)])
    low, high = intervals(correct, classes, generator=draws())
    assert low < 100 * 0.75 < high
    assert high - low == pytest.approx(100 * 0.5 * 2 * 1.96 * math.sqrt(0.25 / 10), rel=0.2)
    plain = intervals(correct, generator=draws())
    assert plain[1] - plain[0] < 2


def test_it_covers_the_truth_as_often_as_it_says():
    chance = draws(3)
    covered = 0
    for _ in range(200):
        low, high = intervals(torch.rand(150, generator=chance) < 0.6, level=0.9, resamples=200, generator=chance)
        covered += low <= 60 <= high
    # 180 expected of 200; below 165 or above 195 with a chance under one in a thousand.
    assert 165 <= covered <= 195


def test_the_generator_decides():
    correct = torch.rand(100, generator=draws()) < 0.5
    assert intervals(correct, generator=draws(1)) == intervals(correct, generator=draws(1))
    assert intervals(correct, generator=draws(1)) != intervals(correct, generator=draws(2))


def test_wrong_use():
    with pytest.raises(ValueError, match="0 images"):
        intervals(torch.zeros(0))
    with pytest.raises(ValueError, match=r"level=1\.0"):
        intervals(torch.ones(3), level=1.0)


def test_intervals_of_accuracies_are_those_of_their_own_means():
    """Each figure's interval, from a table of scores, against the same bootstrap of that figure alone."""
    labels = torch.randint(8, (600,), generator=draws(1))
    scores = torch.randn(600, 8, generator=draws(2))
    scores[torch.arange(600), labels] += 1
    counts = torch.tensor([400, 300, 200, 90, 60, 15, 10, 5])
    shots = split_by_frequency(counts)
    found = accuracy_intervals(scores, labels, shots, generator=draws())
    correct = scores.argmax(1) == labels
    fifth = (scores > scores.gather(1, labels.unsqueeze(1))).sum(1) < 5
    assert found["top1"] == intervals(correct, generator=draws())
    assert found["top5"] == intervals(fifth, generator=draws())
    assert found["balanced"] == pytest.approx(intervals(correct, labels, generator=draws()))
    for name in ("many", "medium", "few"):
        inside = torch.isin(labels, getattr(shots, name))
        alone = intervals(correct[inside], labels[inside], generator=draws())
        # Alone, a split always has the same number of images; among the others it does not.
        assert found[name] == pytest.approx(alone, abs=1.0)
    figures = accuracies(scores, labels, counts, shots)
    assert set(found) == set(figures)
    assert all(low < figures[name] < high for name, (low, high) in found.items())


def test_many_images_are_drawn_a_few_resamples_at_a_time():
    correct, classes = torch.rand(50, generator=draws()) < 0.5, torch.arange(50) % 5
    whole = intervals(correct, classes, resamples=40, generator=draws(1))
    assert intervals(correct, classes, resamples=40, generator=draws(1), at_once=120) == whole
