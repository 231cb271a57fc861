"""Hashes, near pairs, tracks: against comparing all with all."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from crosslevel.metrics import descriptor, duplicates


def pictures(count, seed=0):
    """Smooth random pictures."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=draws)
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).byte()


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


@given(st.integers(0, 16), st.integers(0, 2**32), st.sampled_from([2**10, 2**22]))
def test_near_pairs_connect_what_comparing_all_with_all_connects(radius, seed, piece):
    draws = np.random.default_rng(seed)
    centres = draws.integers(-(2**63), 2**63 - 1, 8)
    flips = [np.int64(sum(1 << int(b) for b in draws.choice(63, draws.integers(0, 12), False))) for _ in range(60)]
    hashes = torch.from_numpy(np.array([centres[i % 8] ^ flip for i, flip in enumerate(flips)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_PAIRS", piece)
        pairs = duplicates.near_pairs(hashes, radius)
    values = [int(h) & (2**64 - 1) for h in hashes.tolist()]
    all_pairs = [(i, j) for i in range(60) for j in range(i + 1, 60) if (values[i] ^ values[j]).bit_count() <= radius]
    assert {tuple(p) for p in pairs.tolist()} <= set(all_pairs)
    everything = torch.tensor(all_pairs).long().view(-1, 2)
    assert torch.equal(duplicates.tracks(60, pairs), duplicates.tracks(60, everything))


def test_near_pairs_leave_out_what_is_known():
    hashes = torch.tensor([0, 1, 3, 7, 0, -1])
    known = torch.tensor([5, 5, 5, 6, 6, 7])
    found = {tuple(pair) for pair in duplicates.near_pairs(hashes, 2, known).tolist()}
    assert found == {(0, 4), (1, 3), (2, 3)}  # 0 and 4 have equal hashes
    assert {(0, 1), (0, 2), (1, 2)} <= {tuple(pair) for pair in duplicates.near_pairs(hashes, 2).tolist()}


def test_frames_of_a_fixed_camera_are_not_compared_all_with_all(monkeypatch):
    """Hashes that differ in some of their last bits: all would be pairs, and are connected by far fewer."""
    monkeypatch.setattr(duplicates, "CROWD", 8)
    hashes = torch.arange(4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))] << 4
    pairs = duplicates.near_pairs(hashes, duplicates.RADIUS)
    assert len(pairs) == len(pairs.unique(dim=0))
    assert len(pairs) < 64 * 4096
    assert int(duplicates.hamming(hashes[pairs[:, 0]], hashes[pairs[:, 1]]).max()) <= duplicates.RADIUS
    assert len(duplicates.tracks(4096, pairs).unique()) == 1


def test_a_radius_that_compares_all_with_all_is_refused():
    with pytest.raises(ValueError, match="radius=17"):
        duplicates.near_pairs(torch.zeros(2, dtype=torch.long), 17)


def test_mutual_pairs_name_each_other():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(80, 4, generator=draws)
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    near = cosine.topk(3, dim=1).indices
    wanted = {
        (i, j) for i in range(80) for j in range(i + 1, 80)
        if j in near[i].tolist() and i in near[j].tolist() and cosine[i, j] >= 0.9
    }  # fmt: skip
    assert {tuple(p) for p in duplicates.mutual_pairs(features, 0.9, 3).tolist()} == wanted
    named = {tuple(sorted((i, j))) for i in range(80) for j in near[i].tolist()}
    assert {tuple(p) for p in duplicates.neighbour_pairs(features, 3).tolist()} == named


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
