"""Features that lie alone."""

import torch
from table_samples import crowds

from crosslevel.metrics.nearest import nearest
from crosslevel.metrics.outliers import outliers


def test_those_far_from_all_are_found_and_no_others():
    features, _ = crowds([80, 60, 40], width=24, noise=0.2)
    alone = torch.eye(24)[[20, 22]] * 5
    found = outliers(torch.cat([features, alone]))
    assert found.far.nonzero().flatten().tolist() == [180, 181]
    assert not outliers(features).far.any()


def test_the_distance_is_the_mean_over_ten_neighbours():
    features, _ = crowds([30, 30], noise=0.3)
    x = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = (x @ x.T).fill_diagonal_(-2)
    truth = 1 - cosines.topk(10).values.mean(1)
    assert torch.allclose(outliers(features).distance.double(), truth, atol=1e-5)
    known = nearest(features, features, 20)
    assert torch.allclose(outliers(features, known=known).distance.double(), truth, atol=1e-5)


def test_equal_features_and_few_are_no_outliers():
    assert not outliers(torch.ones(50, 4)).far.any()
    assert not outliers(torch.eye(2)).far.any()
