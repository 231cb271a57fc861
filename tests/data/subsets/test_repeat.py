"""Near-duplicates: against NumPy's padding, and the same wherever they stand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import Numbered

from crosslevel.data.images import InMemoryImages
from crosslevel.data.subsets.repeat import Repeated, reflected, repeat
from crosslevel.data.subsets.select import take
from crosslevel.utils.errors import BadImage


@pytest.fixture
def packed():
    data = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return InMemoryImages(data, [f"{i}.png" for i in range(7)], torch.arange(7) % 2, ["a", "b"], "some")


@given(size=st.integers(2, 12), shift=st.integers(-11, 11))
def test_reflection_is_numpys(size, shift):
    if abs(shift) >= size:
        return
    row = np.arange(size)
    want = np.pad(row, abs(shift), mode="reflect")[abs(shift) - shift :][:size]
    assert reflected(shift, size).tolist() == want.tolist()


def test_a_shift_beyond_the_image_stays_inside():
    for size in (1, 2, 3):
        for shift in range(-9, 10):
            assert 0 <= reflected(shift, size).min() <= reflected(shift, size).max() < size


def test_copies_are_shifted_originals(packed):
    copies = Repeated(packed, 4, 2, seed=1)
    assert len(copies) == 28
    assert list(copies.paths)[:5] == ["0.png#0", "0.png#1", "0.png#2", "0.png#3", "1.png#0"]
    assert copies.labels.tolist() == packed.labels.repeat_interleave(4).tolist()
    assert copies.tracks.tolist() == torch.arange(7).repeat_interleave(4).tolist()
    assert copies.classes == ["a", "b"]
    for i in range(28):
        down, across = copies.offset(i)
        padded = np.pad(packed.data[i // 4].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        want = padded[:, 2 - down : 7 - down, 2 - across : 8 - across]
        assert np.array_equal(copies[i][0].numpy(), want)
        assert copies[i][1] == copies.labels[i]


def test_all_shifts_are_drawn_about_equally_often():
    copies = Repeated(Numbered(50), 200, 1)
    counts = torch.tensor([3 * (y + 1) + x + 1 for y, x in map(copies.offset, range(10_000))]).bincount(minlength=9)
    # 10,000 draws of 9: 1,111 each, standard deviation 31.
    assert 950 < counts.min() <= counts.max() < 1270


def test_small_packed_sources_stay_packed_with_the_same_pixels(packed):
    small = repeat(packed, 3, 2, 5)
    assert isinstance(small, InMemoryImages)
    large = repeat(packed, 3, 2, 5, in_memory=100)
    assert not isinstance(large, InMemoryImages)
    for i in range(len(large)):
        assert torch.equal(small[i][0], large[i][0])
        assert small[i][1] == large[i][1]
    assert list(small.paths) == list(large.paths)
    assert torch.equal(small.tracks, large.tracks)


def test_an_image_has_the_same_copies_in_any_part(packed):
    whole = {path: image for path, (image, _) in zip(repeat(packed, 3).paths, repeat(packed, 3), strict=False)}
    some = repeat(take(packed, torch.tensor([5, 2])), 3)
    for path, (image, _) in zip(some.paths, some, strict=False):
        assert torch.equal(image, whole[path])


def test_tracks_and_blocks_of_the_source_are_kept():
    images = Numbered(4)
    images.tracks, images.blocks = torch.tensor([8, 8, 9, 9]), [range(0, 3), range(3, 4)]
    copies = Repeated(images, 2)
    assert copies.tracks.tolist() == [8, 8, 8, 8, 9, 9, 9, 9]
    assert copies.blocks == [range(0, 6), range(6, 8)]


def test_a_bad_image_has_its_own_name():
    with pytest.raises(BadImage, match="n/3"):
        Repeated(Numbered(5, bad=[3]), 2)[7]


def test_identity_follows_the_settings(packed):
    settings = [(2, 2, 0), (3, 2, 0), (2, 1, 0), (2, 2, 1)]
    assert len({Repeated(packed, *chosen).identity() for chosen in settings}) == 4
    assert Repeated(packed, 2).identity() == Repeated(packed, 2, 2, 0).identity()


@pytest.mark.parametrize(("times", "shift"), [(0, 2), (2, -1)])
def test_copies_that_cannot_be(packed, times, shift):
    with pytest.raises(ValueError, match=f"repeat={times}, shift={shift}"):
        repeat(packed, times, shift)
