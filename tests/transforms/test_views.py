"""Views of a batch: the same as torchvision's operations in sequence, on any device, from one seed."""

import pickle
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from view_samples import MEAN, STD, assert_equal_views, generator, one_view, pixels

from crosslevel.transforms import parameters
from crosslevel.transforms.parameters import Augment, draw, draw_boxes
from crosslevel.transforms.philox import Counted
from crosslevel.transforms.presets import PRESETS
from crosslevel.transforms.random_numbers import Words
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("preset", ["simclr", "mocov2", "byol", "cifar", "none"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (57, 41)])
def test_a_view_is_torchvisions_sequence(preset, height, width):
    views = Views(preset, size=32, erase=0.3)
    images = pixels(32, 3, height, width)
    ours = views(images, generator(1))
    same = generator(1)
    assert len(ours) == 2
    for v, view in enumerate(ours):
        augment = replace(PRESETS[preset][v % len(PRESETS[preset])], erase=0.3)
        drawn = draw(augment, 32, height, width, 32, same)
        theirs = torch.stack([one_view(images[i], drawn, i, 32, crop=True) for i in range(32)])
        assert (view.shape, view.dtype, view.is_contiguous()) == ((32, 3, 32, 32), torch.float32, True)
        assert_equal_views(view, theirs, drawn.solarize)


@pytest.mark.usefixtures("way")
def test_wide_hue_and_large_views_in_several_chunks():
    """Hue beyond a sixth of the circle takes another path; at 160 pixels a chunk holds six images, or thirteen."""
    views = Views("simclr", size=160, hue=0.4, blur=1.0)
    views.chunk = 2**20
    images = pixels(20, 3, 170, 130)
    ours = views(images, generator(2))[0]
    drawn = draw(views.augments[0], 20, 170, 130, 160, generator(2))
    theirs = torch.stack([one_view(images[i], drawn, i, 160, crop=True) for i in range(20)])
    assert_equal_views(ours, theirs, drawn.solarize)


@pytest.mark.usefixtures("way")
def test_crops_are_not_cropped_again():
    views = Views("byol", size=24)
    images = pixels(10, 2, 3, 24, 24)
    same = generator(3)
    for v, view in enumerate(views(images, generator(3))):
        drawn = draw(views.augments[v], 10, 24, 24, 24, same)
        theirs = torch.stack([one_view(images[i, v], drawn, i, 24, crop=False) for i in range(10)])
        assert_equal_views(view, theirs, drawn.solarize)


def test_crops_of_one_image():
    """Each is torchvision's resized crop of a box that fits, and the seed decides."""
    views = pickle.loads(pickle.dumps(Views("cifar", size=16)))
    views.count = 3
    image = pixels(3, 40, 64)
    crops = views.crops(image, generator(4))
    assert (crops.shape, crops.dtype) == ((3, 3, 16, 16), torch.uint8)
    same = generator(4)
    for crop in crops:
        box = draw_boxes(views.augments[0], 1, 40, 64, same)[0].int().tolist()
        assert torch.equal(crop, reference.resized_crop(image, *box, size=[16, 16], antialias=True))
    assert not torch.equal(crops, views.crops(image, generator(5)))


def test_center_is_the_centred_square():
    views = Views("simclr", size=20)
    images = pixels(7, 3, 41, 33)
    square = reference.resized_crop(images / 255, 4, 0, 33, 33, size=[20, 20], antialias=True)
    theirs = reference.normalize(square, list(MEAN), list(STD))
    torch.testing.assert_close(views.center(images), theirs, atol=1e-4, rtol=0)
    small = pixels(2, 3, 20, 20)
    theirs = reference.normalize(small / 255, list(MEAN), list(STD))
    torch.testing.assert_close(views.center(small), theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(Views("none", size=20)(small)[0], theirs, atol=1e-5, rtol=0)


def test_the_seed_decides():
    views, images = Views("simclr"), pixels(16, 3, 32, 32)
    first, again, other = (views(images, generator(seed)) for seed in (6, 6, 7))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert (a != c).flatten(1).any(1).sum() >= 15
    assert not torch.equal(*first)


def test_images_of_a_batch_get_different_parameters():
    view = Views("cifar")(pixels(1, 3, 32, 32).repeat(64, 1, 1, 1), generator(8))[0]
    assert len(view.flatten(1).unique(dim=0)) == 64


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_of_one_and_three_views(preset):
    views = Views(preset)
    views.count = 3
    out = views(pixels(1, 3, 50, 32), generator(9))
    assert [tuple(view.shape) for view in out] == [(1, 3, 32, 32)] * 3
    assert all(view.isfinite().all() for view in out)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(40, 3, 36, 36), (40, 5, 3, 32, 32)])
def test_all_at_once_gives_what_small_parts_give(preset, shape):
    """Five views, the last two of them plain: of three kinds for BYOL, in whole images and in crops of them."""
    views = Views(preset, size=32, erase=0.2)
    views.count, views.plain = 5, 2
    one_by_one = views(pixels(*shape), generator(12))
    with parameters.in_pieces(False):
        at_once = views(pixels(*shape), generator(12))
    for a, b in zip(one_by_one, at_once, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", ["cifar", "byol", "infomin"])
def test_equal_draws_give_equal_views_on_every_device(preset):
    """By parts, as a CPU makes them, and with fixed shapes, as a GPU does: values in [0, 1] within 1e-5."""
    views = Views(preset, size=16, erase=0.5, solarize=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images, numbers = pixels(64, 3, 24, 20), Counted(5, 9, torch.arange(64) + 100)
    here = views(images, numbers)
    with parameters.in_pieces(False):
        elsewhere = views(images, numbers)
    for a, b in zip(here, elsewhere, strict=True):
        # RandAugment's thresholds and whole levels jump where the last bit decides, and an equalized image moves whole.
        wrong = ((a - b).abs() > 1e-5).flatten(1).any(1)
        assert wrong.float().mean() <= (0.05 if preset == "infomin" else 0)


@pytest.mark.usefixtures("way")
def test_an_images_views_do_not_depend_on_the_batch_that_it_comes_in():
    """One process of 8 images a step, two of 4, or any other: the views of image i in step n are the same."""
    views, images, index = (
        Views("mocov2", size=16, erase=0.5),
        pixels(8, 3, 20, 20),
        torch.tensor([9, 2, 7, 4, 1, 0, 3, 8]),
    )
    whole = views(images, Counted(5, 9, index))
    for part in (index.argsort(), torch.tensor([5]), torch.arange(0, 8, 2)):
        for a, b in zip(whole, views(images[part], Counted(5, 9, index[part])), strict=True):
            torch.testing.assert_close(b, a[part], atol=1e-5, rtol=0)
    other = views(images, Counted(5, 10, index))
    assert all((a != b).flatten(1).any(1).all() for a, b in zip(whole, other, strict=True))


def test_numbers_of_an_image_follow_the_law_of_the_generator():
    """The parameters drawn from words have the distributions of those drawn from a generator."""
    augment = replace(PRESETS["infomin"][0], erase=0.3)
    words = Words(Counted(3, 1, torch.arange(20_000)).words([0], Words.needed(augment), torch.device("cpu"))[0])
    ours, theirs = draw(augment, 20_000, 40, 30, 32, words), draw(augment, 20_000, 40, 30, 32, generator(1))
    for name in (
        "boxes",
        "flip",
        "jitter",
        "factors",
        "grayscale",
        "blur",
        "sigma",
        "levels",
        "solarize",
        "erase_boxes",
    ):
        a, b = (getattr(drawn, name).float() for drawn in (ours, theirs))
        deviation = torch.maximum(a.std(0), b.std(0))
        assert ((a.mean(0) - b.mean(0)).abs() <= 0.05 * deviation).all(), name  # five standard errors
        assert ((a.std(0) - b.std(0)).abs() <= 0.05 * deviation).all(), name
    assert torch.equal(ours.order.sort(1).values, torch.arange(4).expand(20_000, 4))
    for a, b in ((ours.order, theirs.order), (ours.operations + 1, theirs.operations + 1)):
        for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
            counts = x.bincount(minlength=16) - y.bincount(minlength=16)
            assert (counts.abs() < 600).all()


@pytest.mark.usefixtures("way")
def test_views_are_tensors_of_their_own():
    """To autograd as well: one may be changed in place while another waits for its gradients."""
    views, factor = Views("cifar"), torch.ones(1, requires_grad=True)
    a, b = views(pixels(8, 3, 32, 32), generator(13))
    loss = (factor * a).sum()
    b.mul_(2).mul_(factor)
    loss.backward()
    assert factor.grad is not None


@pytest.mark.usefixtures("way")
def test_no_byte_falls_short_of_its_level():
    """In whole images that are not cropped: solarize and others compare with levels."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    views = Views("none", size=16, flip=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    made = views(levels.contiguous(), generator())[0]
    assert bool((made >= levels / 255).all())
    torch.testing.assert_close(made, levels / 255, atol=1e-6, rtol=0)


def test_nothing_is_read_back_from_the_device():
    """A meta tensor has no values: any step that waits for the device to decide something would fail."""
    views = Views("byol", hue=0.4, erase=0.5).to("meta")
    for images in (pixels(64, 3, 40, 32), pixels(64, 2, 3, 32, 32)):
        for view in views(images.to("meta"), generator()):
            assert (view.device.type, view.shape) == ("meta", (64, 3, 32, 32))


def test_autocast_and_gradients_stay_outside():
    views, images = Views("cifar"), pixels(8, 3, 32, 32)
    plain = views(images, generator(10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = views(images, generator(10))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(plain, mixed, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["simclr", "mocov2", "byol", "cifar"])
def test_a_gpu_draws_the_same_views(preset):
    views, images = Views(preset, erase=0.3, solarize=0.0), pixels(64, 3, 40, 32)
    views.count, views.plain = 4, 1
    host = views(images, generator(11))
    views.cuda()
    for a, b in zip(host, views(images.cuda(), generator(11)), strict=True):
        assert b.is_cuda
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=0)


def test_presets_are_the_published_ones():
    jitter = ("jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "flip")
    published = {
        "simclr": [((0.08, 1.0), (0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5), 0.5, 0.0)],
        "mocov2": [((0.2, 1.0), (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5), 0.5, 0.0)],
        "byol": [
            ((0.08, 1.0), (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5), 1.0, 0.0),
            ((0.08, 1.0), (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5), 0.1, 0.2),
        ],
        "cifar": [((0.2, 1.0), (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5), 0.0, 0.0)],
        "swav": [((0.14, 1.0), (0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5), 0.5, 0.0)],
        "dino": [
            ((0.4, 1.0), (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5), 1.0, 0.0),
            ((0.4, 1.0), (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5), 0.1, 0.2),
        ],
    }
    for name, expected in published.items():
        found = [(a.scale, tuple(getattr(a, k) for k in jitter), a.blur, a.solarize) for a in PRESETS[name]]
        assert found == expected
        assert all((a.blur_sigma, a.ratio, a.erase) == ((0.1, 2.0), (3 / 4, 4 / 3), 0.0) for a in PRESETS[name])


def test_settings_replace_the_presets():
    views = Views("byol", scale=(0.3, 0.9), blur=0.0, hue=0.3)
    expected = Augment(scale=(0.3, 0.9), saturation=0.2, hue=0.3)
    assert views.augments == (expected, replace(expected, solarize=0.2))
    assert not views.state_dict()


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"preset='mocov3' is unknown: did you mean mocov2\? One of simclr"):
        Views("mocov3")
    with pytest.raises(ValueError, match=r"hue=0\.7 is outside its range"):
        Views(hue=0.7)
    with pytest.raises(ValueError, match=r"size=2"):
        Views(size=2)
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 3, 32, 32\): give uint8"):
        Views()(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(2, 2, 3, 16, 16\): give uint8 .* crops \(B, 2, 3, 32, 32\)"):
        Views()(pixels(2, 2, 3, 16, 16))


def test_a_preset_that_was_left_open_is_chosen_later_with_what_was_given():
    open_one, given = Views(size=16, hue=0.3), Views("cifar", 16)
    assert (open_one.preset, open_one.chosen, given.chosen) == ("cifar", False, True)
    open_one.choose("mocov2")
    assert open_one.chosen
    assert open_one.augments == Views("mocov2", 16, hue=0.3).augments
    assert open_one.arguments() == Views("mocov2", 16, hue=0.3).arguments()
    with pytest.raises(ValueError, match="did you mean simclr"):
        open_one.choose("simclear")


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_partners_are_the_images_of_every_second_view(fixed_shapes):
    images, partners = (torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8) for _ in range(2))
    views = Views("cifar", size=16)
    views.count = 3
    numbers = Counted(0, 4, torch.arange(6))
    with parameters.in_pieces(not fixed_shapes):
        both = views(images, numbers, partners)
        own, others = views(images, numbers), views(partners, numbers)
    assert [torch.equal(both[v], (others if v == 1 else own)[v]) for v in range(3)] == [True] * 3
    assert not torch.equal(both[1], own[1])
    with pytest.raises(UserError, match="give whole ones alike"):
        views(images, numbers, partners[:, :, :10])
