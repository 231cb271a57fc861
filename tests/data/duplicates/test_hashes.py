"""Hashes, near pairs, tracks: against comparing all with all."""

import numpy as np
import pytest
import torch
from duplicates_samples import pictures
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from crosslevel.data.duplicates import hashes as duplicates
from crosslevel.data.duplicates.detect import tracks


def test_the_hash_is_the_low_frequencies_above_their_median():
    shown = pictures(20)
    for picture, found in zip(shown.numpy().astype(float), duplicates.perceptual_hash(shown).tolist(), strict=True):
        low = dctn(np.tensordot([0.299, 0.587, 0.114], picture, 1), norm="ortho")[1:9, 1:9]
        # Our frequencies are not normalized, but all but the first row and column by the same factor.
        bits = (low > np.sort(low.ravel())[31]).ravel()
        assert [bool(found >> i & 1) for i in range(64)] == bits.tolist()


def test_the_hash_bears_a_change_of_brightness_and_contrast():
    shown = pictures(50)
    darker = (shown.float() * 0.7 + 20).byte()
    a, b = duplicates.perceptual_hash(shown), duplicates.perceptual_hash(darker)
    assert int(duplicates.hamming(a, b).max()) <= 4
    assert int(duplicates.hamming(a, a.roll(1)).min()) > duplicates.BITS // 8


def test_flat_images_have_one_hash():
    flat = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    assert len(duplicates.perceptual_hash(flat.contiguous()).unique()) == 1


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="32"):
        duplicates.perceptual_hash(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


@given(st.integers(0, 12), st.integers(0, 2**32), st.sampled_from([2**10, 2**22]), st.sampled_from([10, 2**17]))
def test_near_pairs_connect_what_comparing_all_with_all_connects(radius, seed, piece, many):
    draws = np.random.default_rng(seed)
    centres = draws.integers(-(2**63), 2**63 - 1, 8)
    flips = [np.int64(sum(1 << int(b) for b in draws.choice(63, draws.integers(0, 12), False))) for _ in range(60)]
    hashes = torch.from_numpy(np.array([centres[i % 8] ^ flip for i, flip in enumerate(flips)]))
    pairs = duplicates.near_pairs(hashes, radius, many=many, at_once=piece)
    values = [int(h) & (2**64 - 1) for h in hashes.tolist()]
    all_pairs = [(i, j) for i in range(60) for j in range(i + 1, 60) if (values[i] ^ values[j]).bit_count() <= radius]
    assert {tuple(p) for p in pairs.tolist()} <= set(all_pairs)
    everything = torch.tensor(all_pairs).long().view(-1, 2)
    assert torch.equal(tracks(60, pairs), tracks(60, everything))


def test_near_pairs_leave_out_what_is_known():
    hashes = torch.tensor([0, 1, 3, 7, 0, -1])
    known = torch.tensor([5, 5, 5, 6, 6, 7])
    found = {tuple(pair) for pair in duplicates.near_pairs(hashes, 2, known).tolist()}
    assert found == {(0, 4), (1, 3), (2, 3)}  # 0 and 4 have equal hashes
    assert {(0, 1), (0, 2), (1, 2)} <= {tuple(pair) for pair in duplicates.near_pairs(hashes, 2).tolist()}


def test_frames_of_a_fixed_camera_are_not_compared_all_with_all():
    """Hashes that differ in some of their last bits: all would be pairs, and are connected by far fewer."""
    hashes = torch.arange(4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))] << 4
    pairs = duplicates.near_pairs(hashes, 8, crowd=8)
    assert len(pairs) == len(pairs.unique(dim=0))
    assert len(pairs) < 64 * 4096
    assert int(duplicates.hamming(hashes[pairs[:, 0]], hashes[pairs[:, 1]]).max()) <= 8
    assert len(tracks(4096, pairs).unique()) == 1


def test_a_radius_that_compares_all_with_all_is_refused():
    with pytest.raises(ValueError, match="radius=17"):
        duplicates.near_pairs(torch.zeros(2, dtype=torch.long), 17)
