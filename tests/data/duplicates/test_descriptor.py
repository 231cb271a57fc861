"""Differences of small pictures, against their definitions."""

import math

import numpy as np
import pytest
import torch
from duplicates_samples import pictures

from crosslevel.data.duplicates import descriptor


def test_the_difference_is_that_at_the_best_shift():
    shown = torch.cat([pictures(2), pictures(1, 5)])
    moved = shown[0].roll((2, -1), (1, 2))
    both = torch.cat([shown, moved.unsqueeze(0)])
    far, near, self = descriptor.difference(both, torch.tensor([[0, 1], [0, 3], [2, 2]])).tolist()
    assert near < 0.03 < 0.1 < far
    assert self == 0
    plain = descriptor.difference(both, torch.tensor([[0, 1]]), reach=0).item()
    halves = [both[i].float().view(3, 16, 2, 16, 2).mean((2, 4)) / 255 for i in (0, 1)]
    assert plain == pytest.approx(math.sqrt(((halves[0] - halves[1]) ** 2).mean()), abs=1e-6)


def test_alike_is_a_difference_of_at_most_the_limit():
    shown = pictures(12)
    other_colour = shown.clone()
    other_colour[:, 0], other_colour[:, 2] = shown[:, 0] // 2 + 60, (shown[:, 2].float() * 0.9).byte()
    both = torch.cat([shown, shown.roll((1, -2), (2, 3)), (shown.float() * 0.95).byte(), other_colour])
    pairs = torch.combinations(torch.arange(len(both)))
    found = descriptor.difference(both, pairs)
    for limit in (0.0, 0.02, 0.05, 0.1, 0.2, 1.0):
        assert torch.equal(descriptor.alike(both, pairs, limit), found <= limit)
    assert descriptor.alike(both, pairs[:0], 0.1).tolist() == []


def test_the_descriptor_bears_a_shift_better_than_another_picture():
    shown = pictures(30)
    described = [torch.nn.functional.normalize(descriptor.describe(x), dim=1) for x in (shown, shown.roll(1, 3))]
    cosine = described[0] @ described[1].T
    assert torch.equal(cosine.argmax(1), torch.arange(30))
    assert described[0].isfinite().all()


def test_the_product_of_outlines_is_a_correlation():
    shown = pictures(20)
    luminance = torch.einsum("bchw,c->bhw", shown.double(), torch.tensor([0.299, 0.587, 0.114]).double())
    coarse = luminance.view(20, 8, 4, 8, 4).mean((2, 4)).flatten(1).numpy()
    outlines = descriptor.outline(shown)
    np.testing.assert_allclose((outlines @ outlines.T).numpy(), np.corrcoef(coarse), atol=1e-5)
    turned = descriptor.outline(shown.flip(3))
    torch.testing.assert_close(descriptor.mirrored(outlines), turned, atol=1e-6, rtol=0)


def test_an_image_without_contrast_has_no_outline():
    assert descriptor.outline(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)).abs().max() == 0
