import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslevel.metrics.spectrum import alpha_req, effective_rank, lidar, rankme


def draw(seed, rows=40, columns=6):
    draws = torch.Generator().manual_seed(seed)
    spread = torch.rand(columns, generator=draws) + 0.1
    return torch.randn(rows, columns, generator=draws) * spread + torch.randn(columns, generator=draws)


def entropy(shares):
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def test_rankme_is_the_entropy_of_singular_values():
    x = draw(0)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    assert rankme(x) == pytest.approx(entropy([v / values.sum() + 1e-7 for v in values]), rel=1e-6)


def test_effective_rank_is_the_entropy_of_the_covariance_of_unit_features():
    x = draw(1)
    rows = np.array([row / np.linalg.norm(row) for row in x.double().numpy()])
    energy = np.linalg.eigvalsh(np.cov(rows.T))
    assert effective_rank(x) == pytest.approx(entropy(energy / energy.sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_features_that_use_r_directions_alike_have_rank_r(rank):
    x = torch.eye(8)[torch.arange(40 * rank) % rank] * 5
    assert rankme(x) == pytest.approx(rank, abs=1e-4)
    assert effective_rank(torch.cat([x, -x])) == pytest.approx(rank)
    assert effective_rank(torch.cat([x, -x]) + 1000) == 1  # a millionth of the energy is off the mean


def test_alpha_is_the_slope_of_the_eigenvalues_in_logarithms():
    x = draw(2, rows=50, columns=9)
    values = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    slope, _ = np.polyfit(np.log(np.arange(1, 10)), np.log(values), 1)
    assert alpha_req(x) == pytest.approx(-slope, rel=1e-6)


def test_alpha_of_a_power_law_is_its_exponent():
    basis = torch.linalg.qr(torch.randn(200, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    x = (basis - basis.mean(0)) * torch.arange(1, 21) ** -0.6  # eigenvalues follow i^-1.2, but for the centring
    assert alpha_req(x) == pytest.approx(1.2, abs=0.1)


def test_lidar_is_a_generalized_eigenvalue_problem():
    a, b = draw(3), draw(3) + 0.3 * draw(4)
    x, y = a.double().numpy(), b.double().numpy()
    whole = np.mean([(u + v) / 2 for u, v in zip(x, y, strict=True)], axis=0)
    within, between = 1e-4 * np.eye(6), np.zeros((6, 6))
    for u, v in zip(x, y, strict=True):
        mean = (u + v) / 2
        between += np.outer(mean - whole, mean - whole) / len(x)
        within += (np.outer(u - mean, u - mean) + np.outer(v - mean, v - mean)) / (2 * len(x))
    values = scipy.linalg.eigh(between, within, eigvals_only=True)
    assert lidar(a, b) == pytest.approx(entropy(values / values.sum() + 1e-7), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_rotations_and_orders_change_nothing(seed):
    a, b = draw(seed), draw(seed + 1)
    draws = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=torch.float64))[0]
    order = torch.randperm(len(a), generator=draws)
    for score in (rankme, effective_rank, alpha_req):
        assert score(a.double()[order] @ rotation) == pytest.approx(score(a), rel=1e-5)
    assert lidar(a.double()[order] @ rotation, b.double()[order] @ rotation) == pytest.approx(lidar(a, b), rel=1e-5)


def test_equal_features_are_worst():
    x = torch.full((30, 5), 2.0) + 1e-6 * draw(0, 30, 5)
    assert effective_rank(x) == 1
    assert rankme(torch.ones(30, 5)) == pytest.approx(1, abs=1e-4)
    assert lidar(torch.ones(30, 5), torch.ones(30, 5)) == 1
    assert alpha_req(torch.ones(30, 5)) == math.inf
    assert effective_rank(torch.zeros(30, 5)) == rankme(torch.zeros(30, 5)) == 1


@pytest.mark.parametrize("score", [rankme, effective_rank, alpha_req, lambda x: lidar(x, x)])
def test_what_is_no_number_is_refused(score):
    x = draw(0)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 40 features are not finite"):
        score(x)
    with pytest.raises(ValueError, match=r"features are \(0, 5\)"):
        score(torch.zeros(0, 5))
