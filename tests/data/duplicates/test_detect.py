"""Copies, edited copies and near-duplicates: against a plain perceptual hash, and on pictures whose truth is known."""

import itertools

import imagehash
import numpy as np
import pytest
import torch
from duplicates_samples import EDITS, look_alikes, pictures, recompressed, scene, small

from crosslevel.data.duplicates import descriptor, detect
from crosslevel.data.duplicates.detect import Kind, duplicate_pairs, tracks
from crosslevel.data.sources.turntable.dataset import Turntable

SCENES = 40
# Found of 40 by the rule that this one replaced: a root mean square difference of pixels of at most 0.05.
FORMER = {"brightness": 0, "contrast": 19, "gray": 15, "stamp": 4, "crop 3 %": 24, "crop 6 %": 7, "shift": 40,
          "jpeg": 40, "half": 40, "flip": 0}  # fmt: skip


@pytest.fixture(scope="module")
def scenes():
    generator = np.random.default_rng(0)
    return [scene(generator) for _ in range(SCENES)]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_found_as_by_the_better_of_two_rules_and_no_wrong_pair(scenes, edit):
    edited = [EDITS[edit](image) for image in scenes]
    plain = sum(imagehash.phash(a) - imagehash.phash(b) <= 8 for a, b in zip(scenes, edited, strict=True))
    pairs = duplicate_pairs(torch.stack([small(image) for image in (*scenes, *edited)]))
    right = pairs.images[:, 1] - pairs.images[:, 0] == SCENES
    assert bool(right.all())
    assert int(right.sum()) >= max(plain, FORMER[edit], 1)
    expected = Kind.COPY if edit in ("jpeg", "half") else Kind.EDITED
    assert (pairs.kind == expected).float().mean() > 0.9


def test_many_edits_of_one_image_are_one_set(scenes):
    edited = [edit(image) for name, edit in EDITS.items() if name != "stamp" for image in scenes[:12]]
    owner = tracks(12 * 10, duplicate_pairs(torch.stack([small(image) for image in (*scenes[:12], *edited)])).images)
    assert torch.equal(owner.view(10, 12), owner[:12].expand(10, 12))
    assert len(owner.unique()) == 12


@pytest.fixture(scope="module")
def alike():
    return look_alikes(600)


def test_different_objects_that_look_alike_are_no_track(alike):
    data = torch.stack([small(image) for image in alike])
    close = torch.combinations(torch.arange(len(data)))
    chained = tracks(len(data), close[descriptor.alike(data, close, 0.05)]).bincount()
    assert int(chained.max()) > 100, "these are no look-alikes"
    found = tracks(len(data), duplicate_pairs(data).images).bincount()
    assert int(found[found > 1].sum()) <= 0.05 * len(data)
    assert int(found.max()) <= 10


def test_copies_among_look_alikes_are_found(alike):
    again = [recompressed(image, 60) for image in alike[:60]]
    data = torch.stack([small(image) for image in (*alike, *again)])
    owner = tracks(len(data), duplicate_pairs(data).images)
    assert (owner[:60] == owner[600:]).float().mean() >= 0.9


def test_frames_of_an_object_are_found_and_no_two_objects_are_one():
    made = Turntable(classes=6, objects=60, frames=8, imbalance=3, size=32, seed=6)
    pairs = duplicate_pairs(made.data)
    i, j = pairs.images.T
    assert torch.equal(made.tracks[i], made.tracks[j])
    with_another = torch.cat([i, j]).unique()
    assert len(with_another) >= 0.75 * len(made)
    assert bool((pairs.kind == Kind.NEAR).any())


def test_a_track_hangs_together_where_single_links_chain():
    """A slow change from one picture into others: neighbours are near-duplicates, the first and the last are not."""
    ends = pictures(5, seed=3).float()
    steps = torch.linspace(0, 1, 21)[:-1].view(-1, 1, 1, 1)
    chain = torch.cat([a + (b - a) * steps for a, b in itertools.pairwise(ends)]).byte()
    data = torch.cat([chain, pictures(200, seed=4)])
    close = torch.combinations(torch.arange(len(chain)))
    assert tracks(len(chain), close[descriptor.alike(chain, close, detect.NEAR)]).max() == 0
    owner = tracks(len(data), duplicate_pairs(data).images)
    sizes = owner[: len(chain)].bincount()
    assert int((sizes > 1).sum()) >= 3
    assert int(sizes.max()) < len(chain) / 2
    assert bool((owner[: len(chain)].unsqueeze(1) != owner[len(chain) :]).all())


def test_equal_pictures_hang_together_however_many():
    """A thousand equal ones are no crowd of look-alikes."""
    data = torch.cat([pictures(1).expand(300, -1, -1, -1), pictures(50, seed=9)])
    owner = tracks(len(data), duplicate_pairs(data).images)
    assert len(owner[:300].unique()) == 1
    assert len(owner.unique()) == 51


def test_pairs_are_each_once_and_in_order():
    data = torch.cat([pictures(30), pictures(30).flip(3), (pictures(30).float() * 0.8).byte()])
    pairs = duplicate_pairs(data)
    assert len(pairs.images.unique(dim=0)) == len(pairs.images)
    assert bool((pairs.images[:, 0] < pairs.images[:, 1]).all())


def test_beside_only_pairs_of_one_with_another_are_looked_for():
    data = pictures(60)
    own, other = torch.cat([data[:40], data[:1].roll(1, 3)]), torch.cat([(data[5:10].float() * 0.8).byte(), data[50:]])
    pairs = duplicate_pairs(torch.cat([own, other]), len(own))
    assert {tuple(pair) for pair in pairs.images.tolist()} == {(5 + i, len(own) + i) for i in range(5)}


@pytest.mark.parametrize("count", [2, 3, 9])
def test_few_pictures_do(count):
    data = pictures(count)
    assert len(duplicate_pairs(data).images) == 0
    pairs = duplicate_pairs(torch.cat([data, (data.float() * 0.9).byte()]))
    assert {tuple(pair) for pair in pairs.images.tolist()} == {(i, i + count) for i in range(count)}


def track_by_track(pairs, outlines, crowd, linked):
    """The rule of `coherent_pairs`, each round over all tracks and each track over all pairs."""
    while True:
        members = tracks(len(outlines), pairs.images)[pairs.images[:, 0]]
        names, size = members.unique(return_counts=True)
        kept, crowded = torch.ones(len(members), dtype=torch.bool), False
        for name in names[size > 1].tolist():
            links = (members == name).nonzero()[:, 0]
            inside = pairs.images[links].unique()
            if len(inside) > linked:
                crowded = True
                kept[links[pairs.distance[links] > pairs.distance[links].median()]] = False
                continue
            owner = torch.full((len(outlines),), -1)
            owner[inside] = detect.average_linkage(outlines[inside], crowd.around(inside, outlines))
            kept[links] = owner[pairs.images[links, 0]] == owner[pairs.images[links, 1]]
        pairs = pairs.of(kept)
        if not crowded or kept.all():
            return pairs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("links", [250, 900])
def test_tracks_are_cut_as_by_a_loop_over_all_of_them(seed, links):
    """Random pairs of clusters of outlines, of which the largest tracks are cut in several rounds."""
    draws, count = torch.Generator().manual_seed(seed), 300
    centre = torch.randn(30, 64, generator=draws)[torch.randint(30, (count,), generator=draws)]
    outlines = torch.nn.functional.normalize(centre + 0.7 * torch.randn(count, 64, generator=draws), dim=1)
    crowd = detect.Crowd(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), outlines)
    near = detect.neighbour_pairs(torch.arange(count), crowd.indices[:, :4])
    index = near[torch.randperm(len(near), generator=draws)[:links]]
    pairs = detect.Pairs(index, torch.full((len(index),), 3), torch.rand(len(index), generator=draws))
    found, expected = (rule(pairs, outlines, crowd, 12) for rule in (detect.coherent_pairs, track_by_track))
    assert 0 < len(found.images) < len(index)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [0, 1, 500])
def test_different_pairs_are_those_of_unique_rows(count):
    pairs = torch.randint(30, (count, 2), generator=torch.Generator().manual_seed(0)) ** 4
    rows, owner = detect.unique_pairs(pairs)
    expected = pairs.unique(dim=0, return_inverse=True) if count else (pairs, owner)
    assert torch.equal(rows, expected[0])
    assert torch.equal(owner, expected[1])
