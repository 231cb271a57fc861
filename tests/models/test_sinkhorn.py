"""Sinkhorn's scaling against loops, and what it promises of the sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import normal, numpy
from reference import sinkhorn as loops

from crosslevel.models.sinkhorn import sinkhorn

seeds = st.integers(0, 2**31 - 1)


def shares(count, power):
    share = np.arange(1, count + 1) ** -float(power)
    return share / share.sum()


@given(seed=seeds, samples=st.integers(1, 7), prototypes=st.integers(2, 6), power=st.floats(0, 2),
       iterations=st.integers(1, 5), epsilon=st.floats(0.05, 1))  # fmt: skip
def test_it_is_the_loops(seed, samples, prototypes, power, iterations, epsilon):
    scores, prior = torch.tanh(normal(seed, samples, prototypes)), shares(prototypes, power)
    mass = (torch.arange(samples) % 3 != 1).double() if samples > 1 else torch.ones(1, dtype=torch.float64)
    found = numpy(sinkhorn(scores, epsilon, iterations, torch.from_numpy(prior), mass))
    expected = loops(numpy(scores), epsilon, iterations, prior, numpy(mass))
    counted = numpy(mass) > 0
    np.testing.assert_allclose(found[counted], expected[counted], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_prototypes_get_their_shares_and_samples_are_whole(power):
    scores, prior = torch.tanh(normal(0, 40, 8)), torch.from_numpy(shares(8, power))
    found = sinkhorn(scores, 0.1, 500, prior)
    torch.testing.assert_close(found.mean(0), prior, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.ones(40, dtype=torch.float64))


def test_a_sample_without_mass_changes_nothing():
    scores, prior = torch.tanh(normal(0, 12, 5)), torch.from_numpy(shares(5, 0.5))
    mass = torch.cat([torch.ones(8), torch.zeros(4)])
    whole, part = sinkhorn(scores, 0.1, 3, prior, mass), sinkhorn(scores[:8], 0.1, 3, prior)
    torch.testing.assert_close(whole[:8], part)


def test_views_are_assigned_apart_and_scores_of_any_level_alike():
    scores, prior = torch.tanh(normal(1, 2, 9, 4)).float(), torch.full((4,), 0.25)
    together = sinkhorn(scores, 0.05, 3, prior)
    for view, found in zip(scores, together, strict=True):
        torch.testing.assert_close(found, sinkhorn(view, 0.05, 3, prior))
        torch.testing.assert_close(found, sinkhorn(view - 50, 0.05, 3, prior), rtol=1e-3, atol=1e-5)
