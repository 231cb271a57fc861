from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslevel.data.images import InMemoryImages
from crosslevel.data.sources.turntable import dataset as turntable
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.sources.turntable.rays import HITS
from crosslevel.data.sources.turntable.shapes import FAMILIES, Solid

pytestmark = pytest.mark.slow

SMALL = {"classes": 3, "objects": 9, "frames": 3, "imbalance": 4.0, "size": 16, "test_objects": 2, "test_frames": 2}


@pytest.fixture(scope="module")
def train():
    """The default set but for its size: a quarter of the pixels to draw."""
    return Turntable("train", size=16)


@pytest.fixture(scope="module")
def test():
    return Turntable("test", size=16)


def knn_accuracy(bank, labels, queries, truth, k=200, temperature=0.1):
    """Temperature-weighted cosine kNN in NumPy, in percent."""
    bank, queries = (x.reshape(len(x), -1).astype(np.float32) for x in (bank, queries))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    right = 0
    for start in range(0, len(queries), 500):
        similarity = queries[start : start + 500] @ bank.T
        nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
        weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
        votes = np.stack([(weight * (labels[nearest] == c)).sum(1) for c in range(labels.max() + 1)], 1)
        right += (votes.argmax(1) == truth[start : start + 500]).sum()
    return 100 * right / len(queries)


def test_default_set_is_long_tailed_and_its_test_split_balanced(train, test):
    assert Turntable(classes=2, objects=2, frames=1, imbalance=1).data.shape == (2, 3, 32, 32)
    assert isinstance(train, InMemoryImages)
    assert train.name == "turntable"
    assert train.classes == test.classes == list(FAMILIES)
    assert len(train) == 540 * 20
    assert train.data.shape == (10_800, 3, 16, 16)
    assert train.data.dtype == torch.uint8
    counts = torch.bincount(train.labels)
    assert all(a >= b for a, b in pairwise(counts.tolist()))
    assert counts[0] / counts[-1] == pytest.approx(20, rel=0.1)
    shares = np.arange(1, 13) ** (-np.log(20) / np.log(12))
    np.testing.assert_allclose(counts / 20, 540 * shares / shares.sum(), atol=1)
    assert torch.bincount(test.labels).tolist() == [28 * 6] * 12


def test_an_object_is_in_one_class_and_in_one_split(train, test):
    assert (train.data.shape, train.data.dtype) == ((10_800, 3, 16, 16), torch.uint8)
    assert (test.data.shape, test.data.dtype) == ((12 * 28 * 6, 3, 16, 16), torch.uint8)
    for images in (train, test):
        owner = {}
        for path, track, label in zip(images.paths, images.tracks.tolist(), images.labels.tolist(), strict=True):
            split, name, number, _ = path.split("/")
            assert images.classes[label] == name
            assert owner.setdefault(track, (split, name, number)) == (split, name, number)
        assert len(set(owner.values())) == len(owner)
        assert len(set(images.paths)) == len(images)
    assert train.paths[3] == "train/house/object-0000/frame-03.png"
    assert set(train.tracks.tolist()).isdisjoint(test.tracks.tolist())


def test_no_two_objects_share_their_shape_within_or_across_splits(monkeypatch):
    shapes, centred = [], turntable.centred

    def recording(solids):
        shapes.append(np.concatenate([solid.transform.ravel() for solid in solids]).tobytes())
        return centred(solids)

    monkeypatch.setattr(turntable, "centred", recording)
    Turntable(**SMALL)
    Turntable(**SMALL, split="test")
    Turntable(**SMALL, seed=1)
    assert len(shapes) == 9 + 6 + 9
    assert len(set(shapes)) == len(shapes)


def test_no_frame_is_blank_or_clipped(train):
    pixels = train.data.flatten(1).float()
    assert pixels.std(1).min() > 5
    assert ((pixels == 0) | (pixels == 255)).float().mean() < 0.05


def test_frames_of_an_object_are_near_duplicates(train):
    pixels = train.data.flatten(1).float()
    same = train.tracks[1:] == train.tracks[:-1]
    consecutive = (pixels[1:] - pixels[:-1]).abs().mean(1)[same]
    other = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    apart = (pixels - pixels[other]).abs().mean(1)[train.tracks != train.tracks[other]]
    assert consecutive.mean() < 0.35 * apart.mean()
    assert consecutive.min() > 0


def test_raw_pixels_do_not_tell_the_class(train, test):
    accuracy = knn_accuracy(train.data.numpy(), train.labels.numpy(), test.data.numpy(), test.labels.numpy())
    assert 100 / 12 + 2 < accuracy < 45


def test_colour_does_not_tell_the_class(train, test):
    def colours(images):
        pixels = images.data.flatten(2).float()
        return torch.cat([pixels.mean(2), pixels.std(2)], 1).numpy()

    means = knn_accuracy(colours(train) - 100, train.labels.numpy(), colours(test) - 100, test.labels.numpy())
    assert means < 20


def test_same_seed_same_pixels_whatever_the_threads_and_chunks():
    before, threads = Turntable(**SMALL), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(Turntable(**SMALL).data, before.data)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(Turntable(**SMALL, rays_at_once=1).data, before.data)
    assert not torch.equal(Turntable(**SMALL, seed=1).data, before.data)


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0)
    np.random.seed(0)
    Turntable(**SMALL)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_the_training_split_does_not_depend_on_the_test_parameters():
    other = SMALL | {"test_objects": 5, "test_frames": 7}
    assert torch.equal(Turntable(**SMALL).data, Turntable(**other).data)


def test_an_object_does_not_depend_on_the_number_of_others():
    few, many = Turntable(**SMALL), Turntable(**SMALL | {"objects": 18})
    for label in range(3):
        mine = few.data[few.labels == label]
        assert torch.equal(many.data[many.labels == label][: len(mine)], mine)


def test_pictures_have_32_pixels_unless_told_otherwise():
    usual = {name: value for name, value in SMALL.items() if name != "size"}
    assert Turntable(**usual).data.shape == (27, 3, 32, 32)


def test_larger_pictures_show_the_same_objects():
    small, large = Turntable(**SMALL), Turntable(**SMALL | {"size": 96})
    assert large.data.shape == (27, 3, 96, 96)
    shrunk = torch.nn.functional.avg_pool2d(large.data.float(), 6)
    same = (shrunk - small.data.float()).abs().mean((1, 2, 3))
    apart = (shrunk - small.data.float().roll(3, 0)).abs().mean((1, 2, 3))
    assert same.max() < 8
    assert same.mean() < 0.25 * apart.mean()


@settings(max_examples=200, deadline=None)
@given(classes=st.integers(2, 12), objects=st.integers(1, 3000), imbalance=st.floats(1, 200))
def test_power_law(classes, objects, imbalance):
    shares = np.arange(1, classes + 1) ** (-np.log(imbalance) / np.log(classes))
    shares *= objects / shares.sum()
    if shares[-1] < 1 - 1e-9:
        with pytest.raises(ValueError, match=f"objects={objects} leaves the rarest"):
            turntable.power_law_counts(classes, objects, imbalance)
    elif shares[-1] > 1 + 1e-9:
        counts = turntable.power_law_counts(classes, objects, imbalance)
        assert sum(counts) == objects
        assert counts == sorted(counts, reverse=True)
        np.testing.assert_allclose(counts, shares, atol=1)


def test_the_advice_for_too_few_objects_holds():
    with pytest.raises(ValueError, match="raise objects to 52 or lower imbalance"):
        turntable.power_law_counts(12, 51, 20)
    assert min(turntable.power_law_counts(12, 52, 20)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "valid"}, "split='valid' is not one of train, test"),
        ({"classes": 1}, "classes=1 is out of range: choose 2 to 12"),
        ({"classes": 13}, "classes=13 is out of range"),
        ({"frames": 0}, "frames=0 is out of range"),
        ({"size": 4}, "size=4 is out of range: choose 8 to 512"),
        ({"test_objects": 0}, "test_objects=0 is out of range"),
        ({"test_frames": 0}, "test_frames=0 is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"imbalance": 0.5}, "imbalance=0.5 is not a ratio of at least 1"),
        ({"imbalance": float("nan")}, "imbalance=nan is not a ratio"),
        ({"objects": 2}, "objects=2 leaves the rarest of 3 classes"),
    ],
)
def test_impossible_parameters(wrong, message):
    with pytest.raises(ValueError, match=message):
        Turntable(**SMALL | wrong)


# The solids against plain sampling: walk along the ray in float64 and take the first point inside.

UNIT = np.column_stack([np.eye(3), np.zeros(3)])
INSIDE = {
    "ball": lambda p, s: (p**2).sum(-1) <= 1,
    "box": lambda p, s: np.abs(p).max(-1) <= 1,
    "rod": lambda p, s: (
        (np.abs(p[..., 1]) <= 1)
        & (np.hypot(p[..., 0], p[..., 2]) <= 1 + s.shape * p[..., 1])
        & (np.hypot(p[..., 0], p[..., 2]) >= s.hole * (1 + s.shape * p[..., 1]))
    ),
    "ring": lambda p, s: np.hypot(np.hypot(p[..., 0], p[..., 2]) - 1, p[..., 1]) <= s.shape,
}
SOLIDS = [
    Solid("ball", UNIT, 0),
    Solid("box", UNIT, 0),
    Solid("rod", UNIT, 0),
    Solid("rod", UNIT, 0, -0.95),
    Solid("rod", UNIT, 0, 0.4),
    Solid("rod", UNIT, 0, 0.3, 0.8),
    Solid("rod", UNIT, 0, 0.0, 0.5),
    Solid("ring", UNIT, 0, 0.25),
]


@pytest.mark.parametrize("solid", SOLIDS, ids=lambda s: f"{s.kind}{s.shape}-{s.hole}")
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_hits_agree_with_walking_along_the_ray(solid, seed):
    rng = np.random.default_rng(seed)
    origin = rng.standard_normal(3)
    origin *= rng.uniform(3, 6) / np.linalg.norm(origin)
    rays = rng.uniform(-1.3, 1.3, (80, 3)) - origin
    t, normal = HITS[solid.kind](
        torch.tensor(origin, dtype=torch.float32).view(3, 1, 1, 1).unbind(),
        torch.tensor(rays.T, dtype=torch.float32).view(3, 1, 1, 80).unbind(),
        solid,
    )
    t = t.flatten().double().nan_to_num(torch.inf, posinf=torch.inf).numpy()
    steps = np.linspace(0.1, 3.1, 3001)

    def walk(rays):
        inside = INSIDE[solid.kind](origin + steps[:, None, None] * rays, solid)
        return np.where(inside.any(0), steps[inside.argmax(0)], 9)

    expected = walk(rays)
    shifted = np.stack([walk(rays + shift) for shift in 0.05 * np.concatenate([np.eye(3), -np.eye(3)])])
    clear = (np.abs(shifted - expected) < 0.05).all(0)  # a ray that grazes an edge may go either way
    assert clear.mean() > 0.3
    agree = np.isclose(np.minimum(t, 9), expected, atol=5e-3)
    assert agree[clear].all()
    seen = np.isfinite(t) & agree
    normal = np.stack([n.expand(1, 1, 80).flatten().numpy() for n in normal], 1)[seen].astype(np.float64)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    at = origin + t[seen, None] * rays[seen]
    normal *= -np.sign((normal * rays[seen]).sum(1, keepdims=True))
    outwards, inwards = (INSIDE[solid.kind](at + side * 0.01 * normal, solid) for side in (1, -1))
    assert (~outwards & inwards).mean() > 0.9
