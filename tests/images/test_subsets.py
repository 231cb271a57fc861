"""Parts of a source: what stays of it, and the long-tailed convention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.images import Packed
from crosslevel.images.subsets import Subset, long_tailed, sample, take


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_long_tailed_cifar10_has_its_published_size():
    """Cui et al. 2019: 12,406 images at imbalance 100, 20,431 at 10."""
    labels = torch.arange(10).repeat_interleave(5000)[torch.randperm(50_000, generator=generator())]
    index = long_tailed(labels, 100, generator())
    counts = labels[index].bincount()
    assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(index) == 12_406
    assert len(long_tailed(labels, 10, generator())) == 20_431


@given(seed=st.integers(0, 1000), imbalance=st.floats(1, 40), classes=st.integers(1, 6))
def test_which_images_stay_is_drawn_and_repeatable(seed, imbalance, classes):
    labels = torch.arange(classes).repeat(40)
    index = long_tailed(labels, imbalance, generator(seed))
    assert torch.equal(index, long_tailed(labels, imbalance, generator(seed)))
    assert torch.equal(index, index.unique())
    counts = labels[index].bincount(minlength=classes)
    assert counts[0] == 40
    assert (counts.diff() <= 0).all()
    assert counts[-1] == (int(40 * imbalance**-1) if classes > 1 else 40)


def test_another_seed_keeps_others():
    labels = torch.arange(4).repeat(50)
    assert not torch.equal(long_tailed(labels, 10, generator(0)), long_tailed(labels, 10, generator(1)))


def test_an_imbalance_that_cannot_be():
    with pytest.raises(ValueError, match=r"imbalance=0\.5 must be at least 1"):
        long_tailed(torch.tensor([0, 1]), 0.5)
    with pytest.raises(ValueError, match="leaves nothing of class 1"):
        long_tailed(torch.tensor([0, 0, 1, 1]), 10)


def test_packed_images_stay_packed_and_others_are_looked_up():
    data = torch.arange(6 * 12, dtype=torch.uint8).view(6, 3, 2, 2)
    images = Packed(data, list("abcdef"), torch.tensor([0, 1, 0, 1, 0, 1]), ["x", "y"])
    index = torch.tensor([4, 1])
    part = take(images, index)
    assert isinstance(part, Packed)
    assert torch.equal(part.data, data[index])
    lazy = Subset(images, index)
    for chosen in (part, lazy):
        assert (list(chosen.paths), chosen.labels.tolist(), chosen.classes) == (["e", "b"], [0, 1], ["x", "y"])
        assert torch.equal(chosen[1][0], data[1])


def test_a_sample_has_no_repetition():
    images = Packed(torch.zeros(50, 3, 2, 2, dtype=torch.uint8), [str(i) for i in range(50)])
    index = sample(images, 20, generator())
    assert len(index.unique()) == 20
    assert torch.equal(index, index.sort().values)
    assert len(sample(images, 99, generator())) == 50


def test_parts_keep_tracks_and_differ_in_identity():
    whole = Packed(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), list("abcd"))
    whole.tracks = torch.tensor([5, 5, 6, 6])
    for part in (take(whole, torch.tensor([1, 2])), Subset(whole, torch.tensor([1, 2]))):
        assert part.tracks.tolist() == [5, 6]
    first = Subset(whole, torch.tensor([1, 2])).identity()
    assert Subset(whole, torch.tensor([1, 2])).identity() == first
    assert Subset(whole, torch.tensor([2, 1])).identity() != first
