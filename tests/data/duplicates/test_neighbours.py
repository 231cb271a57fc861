"""Neighbours found through cells, against comparing all with all."""

import torch
import torch.nn.functional as F

from crosslevel.data.duplicates.neighbours import Cells, neighbours


def points(count, seed=0):
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_few_are_compared_with_all():
    keys, queries = points(300), points(40, 1)
    values, places = neighbours(queries, keys, 5)
    expected = (queries @ keys.T).topk(5)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(places, expected.indices)


def test_of_many_the_close_ones_are_found_through_cells():
    keys = points(4000)
    queries = F.normalize(keys[::4] + 0.1 * points(1000, 2), dim=1)
    values, places = neighbours(queries, keys, 4, Cells(all=1000, points=64))
    expected = (queries @ keys.T).topk(4)
    assert (places[:, 0] == expected.indices[:, 0]).float().mean() > 0.97
    seen = (places.unsqueeze(2) == expected.indices.unsqueeze(1)).any(1).float().mean()
    assert seen > 0.8
    own = (queries.unsqueeze(1) * keys[places.clamp(min=0)]).sum(2)
    torch.testing.assert_close(values[places >= 0], own[places >= 0])


def test_keys_that_are_all_alike_do():
    keys = points(1).expand(500, -1).clone()
    assert neighbours(keys, keys, 3, Cells(all=100, points=50)).values.allclose(torch.ones(500, 3))
