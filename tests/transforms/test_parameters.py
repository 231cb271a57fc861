"""The parameters of a view follow the laws of torchvision's transforms, independently for each image."""

import math
from itertools import permutations

import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing, RandomResizedCrop

from crosslevel.transforms.parameters import HUE, Augment, draw, draw_box, draw_boxes

MANY = 20_000
PLAIN = Augment()
# Seeds are fixed, so a test passes always or never; over some 70 statistics chance alone reaches 1e-3.
CHANCE = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(augment: Augment = PLAIN, count: int = MANY, height: int = 32, width: int = 32, seed: int = 0):
    return draw(augment, count, height, width, size=32, generator=generator(seed))


def test_crop_area_and_ratio_are_uniform():
    """On a large image rounding is small, and a crop of up to 40 % always fits."""
    boxes = draw_boxes(Augment(scale=(0.1, 0.4)), MANY, 2000, 2000, generator())
    _, _, rows, columns = boxes.double().unbind(1)
    area, log_ratio = rows * columns / 2000**2, (columns / rows).log()
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert stats.kstest(area, stats.uniform(0.1, 0.3).cdf).pvalue > CHANCE
    assert stats.kstest(log_ratio, stats.uniform(low, high - low).cdf).pvalue > CHANCE


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 20), (17, 60), (5, 200)])
def test_crops_follow_torchvision(height, width):
    """The same joint law, with the tries that do not fit and the fallback for long images in it."""
    augment = Augment(scale=(0.2, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image = torch.zeros(3, height, width)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = draw_boxes(augment, 4000, height, width, generator(2))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column].float()).pvalue > CHANCE


def test_impossible_ratio_takes_the_largest_centred_box():
    expected = RandomResizedCrop.get_params(torch.zeros(3, 4, 400), [0.9, 1.0], [3 / 4, 4 / 3])
    boxes = draw_boxes(Augment(scale=(0.9, 1.0)), 50, 4, 400, generator())
    assert boxes.unique(dim=0).tolist() == [list(expected)]


def test_no_crop_takes_the_centred_square():
    assert draw_boxes(Augment(crop=False), 2, 20, 31, None).tolist() == [[0, 5, 20, 20]] * 2


@pytest.mark.parametrize("name", ["flip", "jitter", "grayscale", "blur", "solarize", "erase"])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probabilities(name, probability):
    happened = getattr(drawn(Augment(**{name: probability})), name)
    assert stats.binomtest(int(happened.sum()), MANY, probability).pvalue > CHANCE


def test_factors_are_uniform_in_colorjitters_ranges():
    factors = drawn(Augment(brightness=0.4, contrast=0.8, saturation=1.5, hue=0.1)).factors
    for column, (low, high) in enumerate([(0.6, 1.4), (0.2, 1.8), (0.0, 2.5), (-0.1, 0.1)]):
        assert stats.kstest(factors[:, column], stats.uniform(low, high - low).cdf).pvalue > CHANCE


def test_every_order_of_the_jitter_is_as_likely():
    order = drawn().order
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    codes, counts = code.unique(return_counts=True)
    assert len(codes) == len(list(permutations(range(4))))
    assert stats.chisquare(counts).pvalue > CHANCE


def test_images_are_independent():
    """Neighbours in the batch agree no more often than chance has it, in order, place and factors."""
    one = drawn()
    same_order = (one.order[:-1] == one.order[1:]).all(1)
    assert stats.binomtest(int(same_order.sum()), MANY - 1, 1 / 24).pvalue > CHANCE
    place = (one.order == HUE).int().argmax(1)
    for values in (*one.factors.unbind(1), one.sigma, *one.boxes.unbind(1), place):
        assert abs(stats.spearmanr(values[:-1], values[1:]).statistic) < 5 / math.sqrt(MANY)


def test_blur_sigma_is_uniform():
    assert stats.kstest(drawn(Augment(blur_sigma=(0.5, 3.0))).sigma, stats.uniform(0.5, 2.5).cdf).pvalue > CHANCE


def test_what_is_never_erased_takes_as_many_random_numbers():
    states = []
    for erase in (0.0, 1.0):
        same = generator(5)
        draw(Augment(erase=erase), 50, 32, 32, size=32, generator=same)
        states.append(same.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60), (70, 31)])
def test_boxes_of_a_batch_are_those_of_its_images(scale, height, width):
    """With large crops of long images, most of which fit at a later try or never."""
    augment, same = Augment(scale=scale), generator(6)
    boxes = draw_boxes(augment, 200, height, width, generator(6))
    assert boxes.int().tolist() == [list(draw_box(augment, height, width, same)) for _ in range(200)]


def test_erased_boxes_follow_torchvision():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        image = torch.zeros(3, 32, 32)
        theirs = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
    ours = drawn(Augment(erase=1.0), count=4000).erase_boxes
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], torch.tensor(theirs)[:, column].float()).pvalue > CHANCE


def test_the_seed_decides():
    first, again, other = drawn(seed=5, count=9), drawn(seed=5, count=9), drawn(seed=6, count=9)
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.boxes, other.boxes)


@pytest.mark.parametrize(
    "setting",
    [{"flip": 1.5}, {"hue": 0.6}, {"brightness": -0.1}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)},
     {"ratio": (2.0, 1.0)}, {"blur_sigma": (0.0, 1.0)}, {"jitter": float("nan")}],
)  # fmt: skip
def test_a_setting_outside_its_range_is_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name}="):
        Augment(**setting)


@pytest.mark.parametrize("shape", [(375, 500), (256, 341), (32, 32), (20, 300), (1, 1)])
@pytest.mark.parametrize("augment", [Augment(), Augment(scale=(0.9, 1.0)), Augment(crop=False)])
def test_one_box_is_that_of_a_batch_of_one(shape, augment):
    for seed in range(100):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        want = draw_boxes(augment, 1, *shape, one)[0].int().tolist()
        assert list(draw_box(augment, *shape, other)) == want
        assert torch.equal(one.get_state(), other.get_state())
