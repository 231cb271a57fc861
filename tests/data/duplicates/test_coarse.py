"""What few numbers of each picture rule out, against whole comparisons."""

import numpy as np
import torch
from duplicates_samples import EDITS, pictures, scene, small
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.duplicates.alignment import agreement
from crosslevel.data.duplicates.coarse import blocks, halves, maybe_alike, maybe_edited
from crosslevel.data.duplicates.descriptor import alike


def neighbouring(count, change, seed):
    """Pictures, each shifted by up to 2 pixels and changed by noise of the given deviation behind it."""
    draws = torch.Generator().manual_seed(seed)
    large = torch.nn.functional.interpolate(pictures(count, seed).float(), size=(36, 36), mode="bilinear")
    shifts = torch.randint(0, 5, (count, 2), generator=draws).tolist()
    moved = torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(large, shifts, strict=True)])
    noise = change * torch.randn(moved.shape, generator=draws)
    return torch.cat([large[:, :, 2:34, 2:34], moved + noise]).round().clamp(0, 255).byte()


@given(st.integers(0, 1000), st.sampled_from([0, 4, 12, 20, 40]))
def test_no_pair_that_is_alike_is_ruled_out_and_most_others_are(seed, change):
    images = neighbouring(12, change, seed)
    pairs = torch.combinations(torch.arange(24))
    possible = maybe_alike(blocks(images), pairs, 0.05)
    right = alike(images, pairs, 0.05)
    assert possible[right].all()
    assert right.any() or change > 4
    assert possible[~right].float().mean() < 0.6


def test_blocks_are_means():
    images = pictures(3)
    means = blocks(images).float()
    gray = images.float().mean(1) / 255
    torch.testing.assert_close(means[:, 0, 0, 0], gray[:, :4, :4].mean((1, 2)), atol=5e-4, rtol=0)
    torch.testing.assert_close(means[:, 2, 1, 8], gray[:, 6:10, 5:9].mean((1, 2)), atol=5e-4, rtol=0)


def test_edited_copies_are_not_ruled_out_and_different_pictures_are():
    draws = np.random.default_rng(0)
    for _ in range(10):
        original = scene(draws)
        for edit in EDITS.values():
            images = torch.stack([small(original), small(edit(original))])
            for mirror in (False, True):
                copy = agreement(images[:1], images[1:].flip(3) if mirror else images[1:]).edges >= 0.96
                assert maybe_edited(halves(images), torch.tensor([[0, 1]]), mirror) or not copy
    others = torch.stack([small(scene(draws)) for _ in range(20)])
    assert maybe_edited(halves(others), torch.combinations(torch.arange(20))).float().mean() < 0.3


def test_none_of_none():
    none = torch.empty(0, 2, dtype=torch.long)
    assert not len(maybe_alike(blocks(pictures(2)), none, 0.05))
    assert not len(maybe_edited(halves(pictures(2)), none))
