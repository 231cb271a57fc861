"""Parts of a source: what stays of it, and the long-tailed convention."""

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images, ImageView, InMemoryImages
from crosslevel.data.loaders.batches import pack
from crosslevel.data.subsets.repeat import Repeated
from crosslevel.data.subsets.select import (
    first_frames,
    held_out,
    long_tailed,
    of_classes,
    pareto,
    pareto_counts,
    sample,
    some_tracks,
    stretches,
    take,
    unlabelled,
)
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import UserError


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
    images = InMemoryImages(data, list("abcdef"), torch.tensor([0, 1, 0, 1, 0, 1]), ["x", "y"])
    index = torch.tensor([4, 1])
    part = take(images, index)
    assert isinstance(part, InMemoryImages)
    assert torch.equal(part.data, data[index])
    lazy = ImageView(images, index)
    for chosen in (part, lazy):
        assert (list(chosen.paths), chosen.labels.tolist(), chosen.classes) == (["e", "b"], [0, 1], ["x", "y"])
        assert torch.equal(chosen[1][0], data[1])


def test_a_sample_has_no_repetition():
    images = InMemoryImages(torch.zeros(50, 3, 2, 2, dtype=torch.uint8), [str(i) for i in range(50)])
    index = sample(images, 20, generator())
    assert len(index.unique()) == 20
    assert torch.equal(index, index.sort().values)
    assert len(sample(images, 99, generator())) == 50


def test_parts_keep_tracks_and_differ_in_identity():
    whole = InMemoryImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), list("abcd"))
    whole.tracks = torch.tensor([5, 5, 6, 6])
    for part in (take(whole, torch.tensor([1, 2])), ImageView(whole, torch.tensor([1, 2]))):
        assert part.tracks.tolist() == [5, 6]
    first = ImageView(whole, torch.tensor([1, 2])).identity()
    assert ImageView(whole, torch.tensor([1, 2])).identity() == first
    assert ImageView(whole, torch.tensor([2, 1])).identity() != first


def test_pareto_sizes_are_the_quantiles_of_the_distribution():
    """Against SciPy's Pareto: rank r of C has the quantile at 1 - r / C, stretched to go from most to least."""
    for classes, power, most, least in ((1000, 6, 1280, 5), (365, 1.34, 4980, 5), (7, 2.5, 90, 3)):
        quantiles = scipy.stats.pareto.ppf(1 - np.arange(1, classes + 1) / classes, power)
        want = np.interp(quantiles, [quantiles.min(), quantiles.max()], [least, most])
        got = pareto_counts(classes, power, most, least).numpy()
        assert np.abs(got - np.floor(want + 1e-6)).max() == 0
        assert (got[0], got[-1]) == (most, least)
    counts = pareto_counts(1000, 6, 1280, 5)
    # The published ImageNet-LT, drawn at random: 115,846 images; 385 classes above 100 images, 136 below 20.
    assert abs(int(counts.sum()) - 115_846) < 0.06 * 115_846
    assert abs(int((counts > 100).sum()) - 385) < 25
    assert abs(int((counts < 20).sum()) - 136) < 10


def test_a_pareto_part_keeps_a_small_class_whole():
    labels = torch.arange(4).repeat_interleave(torch.tensor([50, 2, 50, 50]))[torch.randperm(152)]
    index = pareto(labels, 2, 40, 4, generator())
    want = pareto_counts(4, 2, 40, 4).tolist()
    assert labels[index].bincount().tolist() == [40, 2, *want[2:]]
    assert torch.equal(index, index.unique())
    assert torch.equal(index, pareto(labels, 2, 40, 4, generator()))
    assert not torch.equal(index, pareto(labels, 2, 40, 4, generator(1)))


@pytest.mark.parametrize(
    ("power", "most", "least", "says"),
    [(0, 9, 1, "pareto=0"), (float("nan"), 9, 1, "pareto=nan"), (6, 3, 5, "most=3, least=5"), (6, 3, 0, "least=0")],
)
def test_pareto_settings_that_cannot_be(power, most, least, says):
    with pytest.raises(ValueError, match=says):
        pareto_counts(5, power, most, least)


@given(tracks=st.lists(st.integers(0, 6), min_size=1, max_size=60), most=st.integers(1, 5))
def test_the_first_frames_of_each_track(tracks, most):
    seen, want = Counter(), []
    for i, track in enumerate(tracks):
        seen[track] += 1
        want += [i] * (seen[track] <= most)
    assert first_frames(torch.tensor(tracks), most).tolist() == want


def test_long_tracks_are_cut_into_stretches_in_their_order():
    tracks = torch.tensor([7, 7, 7, 2, 7, 2, 7, 9])
    assert stretches(tracks, 2).tolist() == [1, 1, 2, 0, 2, 0, 3, 4]
    assert stretches(tracks, 4).tolist() == [1, 1, 1, 0, 2, 0, 2, 3]
    assert stretches(tracks, 5).tolist() == [1, 1, 1, 0, 1, 0, 1, 2]
    assert stretches(tracks, 0).tolist() == stretches(tracks, 1).tolist() == [2, 3, 4, 0, 5, 1, 6, 7]


@given(tracks=st.lists(st.integers(-3, 20), min_size=1, max_size=60), seed=st.integers(0, 9), data=st.data())
def test_whole_tracks_are_drawn(tracks, seed, data):
    count = data.draw(st.integers(1, len(set(tracks))))
    index = some_tracks(torch.tensor(tracks), count, generator(seed))
    kept = {tracks[i] for i in index}
    assert len(kept) == count
    assert index.tolist() == [i for i, track in enumerate(tracks) if track in kept]
    assert torch.equal(index, some_tracks(torch.tensor(tracks), count, generator(seed)))


def test_more_tracks_than_there_are():
    with pytest.raises(ValueError, match="tracks=4: choose 1 to 3"):
        some_tracks(torch.tensor([5, 5, 6, 9]), 4, generator())
    with pytest.raises(ValueError, match="frames=0"):
        first_frames(torch.tensor([5, 5]), 0)


def test_classes_are_chosen_and_numbered_anew():
    index, labels = of_classes(torch.tensor([3, 0, 1, 3, 2, 0]), [3, 0])
    assert index.tolist() == [0, 1, 3, 5]
    assert labels.tolist() == [0, 1, 0, 1]


def test_a_part_has_its_own_labels():
    whole = InMemoryImages(torch.arange(48).view(4, 3, 2, 2).to(torch.uint8), list("abcd"), torch.tensor([0, 1, 2, 1]))
    whole.classes = ["x", "y", "z"]
    index, labels = torch.tensor([3, 2]), torch.tensor([0, 1])
    for part in (take(whole, index, labels, ["y", "z"]), take(ImageView(whole), index, labels, ["y", "z"])):
        assert [part[i][1] for i in range(2)] == part.labels.tolist() == [0, 1]
        assert part.classes == ["y", "z"]
        assert torch.equal(part[0][0], whole.data[3])


def test_a_part_keeps_what_is_left_of_blocks():
    whole = InMemoryImages(torch.zeros(9, 3, 2, 2, dtype=torch.uint8), [str(i) for i in range(9)])
    whole.blocks = [range(0, 4), range(4, 6), range(6, 9)]
    assert ImageView(whole, torch.tensor([1, 3, 6, 7])).blocks == [range(0, 2), range(2, 4)]
    assert ImageView(whole, torch.tensor([0, 4, 5, 8])).blocks == [range(0, 1), range(1, 3), range(3, 4)]
    assert ImageView(whole, torch.tensor([6, 1])).blocks is None


def test_labels_without_images_are_no_classes():
    """Labels that begin at 1, or skip some, rank as those that are there."""
    labels = torch.tensor([1] * 20 + [3] * 20 + [7] * 20)
    dense = torch.tensor([0] * 20 + [1] * 20 + [2] * 20)
    for gaps, plain in (
        (
            long_tailed(labels, 4, torch.Generator().manual_seed(0)),
            long_tailed(dense, 4, torch.Generator().manual_seed(0)),
        ),
        (
            pareto(labels, 6, 12, 3, torch.Generator().manual_seed(0)),
            pareto(dense, 6, 12, 3, torch.Generator().manual_seed(0)),
        ),
    ):
        assert torch.equal(gaps, plain)
    assert len(long_tailed(labels, 1)) == 60


@pytest.mark.parametrize("count", [49, 98, 103, 107, 161])
def test_one_image_may_be_left(count):
    """count * count^-1 is below 1 in floating point for these."""
    labels = torch.tensor([0] * count + [1] * count)
    assert torch.bincount(labels[long_tailed(labels, count)]).tolist() == [count, 1]


class Everything(Images):
    """Six images of which everything is known that can be."""

    def __init__(self):
        self.name, self.paths, self.classes = "all", [f"f/{i}" for i in range(6)], ["x", "y"]
        self.labels, self.tracks = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
        self.blocks, self.left_out = [range(0, 2), range(2, 6)], {"f.tar": "cut off"}
        self.watch = Watch.of("/", [""])

    def __getitem__(self, i):
        return torch.full((3, 2, 2), i, dtype=torch.uint8), -1 if self.labels is None else int(self.labels[i])

    def content(self):
        return [b"everything"]


INDEX = torch.tensor([1, 2, 5])


@pytest.mark.parametrize(
    ("make", "index", "carried"),
    [
        (ImageView, range(6), {"labels", "tracks", "blocks"}),
        (lambda whole: take(whole, INDEX), [1, 2, 5], {"labels", "tracks", "blocks"}),
        (lambda whole: take(ImageView(ImageView(whole)), INDEX), [1, 2, 5], {"labels", "tracks", "blocks"}),
        (unlabelled, range(6), {"tracks", "blocks"}),
        (lambda whole: unlabelled(take(whole, INDEX)), [1, 2, 5], {"tracks", "blocks"}),
        (lambda whole: Repeated(whole, 2), [i for i in range(6) for _ in range(2)], {"labels", "tracks", "blocks"}),
        (lambda whole: pack(whole, 2, bad_files=BadFiles(), workers=0), range(6), {"labels", "tracks"}),
        (lambda whole: take(pack(whole, 2, bad_files=BadFiles(), workers=0), INDEX), [1, 2, 5], {"labels", "tracks"}),
    ],
)
def test_whatever_stands_before_a_source_carries_what_is_known_of_it(make, index, carried):
    whole, index = Everything(), list(index)
    view = make(whole)
    assert len(view) == len(index)
    assert [int(view[i][0][0, 0, 0]) for i in range(len(view))] == index
    assert [path.split("#")[0] for path in view.paths] == [f"f/{i}" for i in index]
    assert view.left_out == {"f.tar": "cut off"}
    assert view.watch is whole.watch
    assert view.name == "all"
    assert view.tracks.tolist() == whole.tracks[index].tolist()
    if "labels" in carried:
        assert view.classes == ["x", "y"]
        assert view.labels.tolist() == [view[i][1] for i in range(len(view))] == whole.labels[index].tolist()
    else:
        assert view.labels is None
        assert view.classes is None
        assert {view[i][1] for i in range(len(view))} == {-1}
    if "blocks" in carried:
        want = [[k for k, i in enumerate(index) if i in block] for block in whole.blocks]
        assert [list(block) for block in view.blocks] == want


def test_labels_that_are_dropped_tell_nothing():
    """Not even a part of a part, or copies of it, depends on them."""
    one, other = Everything(), Everything()
    other.labels = 1 - other.labels
    for make in (
        lambda i: i,
        lambda i: take(i, INDEX),
        lambda i: take(take(i, INDEX), INDEX[:1]),
        lambda i: Repeated(i, 2),
    ):
        assert make(one).identity() != make(other).identity()
        assert unlabelled(make(one)).identity() == unlabelled(make(other)).identity()
    assert one.labels.tolist() == [0, 1, 0, 1, 0, 1]


@given(st.lists(st.integers(0, 5), min_size=4, max_size=40), st.integers(0, 3), st.integers(0, 9))
def test_whole_tracks_are_held_out(tracks, count, seed):
    images = InMemoryImages(torch.zeros(len(tracks), 3, 2, 2, dtype=torch.uint8), [str(i) for i in range(len(tracks))])
    images.tracks = torch.tensor(tracks)
    largest = max(Counter(tracks).values())
    if count + largest > len(tracks) - 2:
        return
    held, rest = held_out(images, count, torch.Generator().manual_seed(seed))
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(len(tracks)))
    assert held.tolist() == sorted(held.tolist())
    assert not {tracks[i] for i in held.tolist()} & {tracks[i] for i in rest.tolist()}
    assert (len(held) == 0) if count == 0 else (count <= len(held) < count + largest)


def test_something_is_left_when_images_are_held_out():
    images = InMemoryImages(torch.zeros(5, 3, 2, 2, dtype=torch.uint8), list("abcde"))
    with pytest.raises(UserError, match="hold_out=4 leaves 1 of 5 images to train on"):
        held_out(images, 4, torch.Generator().manual_seed(0))
