"""Small crops: views of a size of their own, beside the others."""

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from view_samples import MEAN, STD, assert_equal_views, generator, one_view, pixels

from crosslevel.transforms.parameters import draw
from crosslevel.transforms.presets import PLAIN, PRESETS
from crosslevel.transforms.views import Views


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("preset", ["dino", "swav", "cifar"])
def test_small_crops_are_views_of_their_own_size_and_area(preset):
    """Two large views, five small ones, one plain: each is torchvision's sequence of its own settings."""
    views = Views(preset, size=28, small_size=12, erase=0.3)
    views.count, views.small, views.plain = 8, 5, 1
    images, same = pixels(16, 3, 40, 33), generator(1)
    large = PRESETS[preset]
    usual = replace(large[0], blur=0.5) if preset == "dino" else large[0]
    small = replace(usual, scale=(0.05, {"dino": 0.4, "swav": 0.14, "cifar": 0.2}[preset]), erase=0.3)
    kinds = [replace(large[v % len(large)], erase=0.3) for v in range(2)] + [small] * 5 + [PLAIN]
    for view, augment in zip(views(images, generator(1)), kinds, strict=True):
        side = 12 if augment is small else 28
        drawn = draw(augment, 16, 40, 33, side, same)
        theirs = torch.stack([one_view(images[i], drawn, i, side, crop=True) for i in range(16)])
        assert view.shape == (16, 3, side, side)
        assert_equal_views(view, theirs, drawn.solarize)


@pytest.mark.usefixtures("way")
def test_small_crops_lie_side_by_side_and_come_back():
    """Four of 12 pixels in a picture of 28: five small crops take two pictures, after the large and the plain one."""
    views = Views("none", size=28, small_size=12)
    views.count, views.small, views.plain = 8, 5, 1
    image = pixels(3, 40, 40)
    crops = views.crops(image, generator(0))
    assert crops.shape == (3 + 2, 3, 28, 28)
    whole = reference.resize(image, [28, 28], antialias=True)
    part = reference.resize(image, [12, 12], antialias=True)
    assert all(torch.equal(crops[v], whole) for v in range(3))
    for top, left in ((0, 0), (0, 12), (12, 0), (12, 12)):
        assert torch.equal(crops[3, :, top : top + 12, left : left + 12], part)
    assert torch.equal(crops[4, :, :12, :12], part)
    assert int(crops[4, :, 12:].max()) == 0
    out = views(crops[None], generator(0))
    assert [view.shape[-1] for view in out] == [28, 28, *[12] * 5, 28]
    for view, expected in zip(out, [whole, whole, *[part] * 5, whole], strict=True):
        theirs = reference.normalize(expected[None] / 255, list(MEAN), list(STD))
        torch.testing.assert_close(view, theirs, atol=1e-5, rtol=0)


def test_the_size_of_small_crops_follows_the_views():
    assert [Views(size=size).small_side for size in (224, 64, 32, 6)] == [96, 27, 14, 4]
    assert Views(size=32, small_size=64).small_side == 32
    views = Views("dino", small_scale=(0.1, 0.3), small_size=9)
    assert Views(**views.arguments()).arguments() == views.arguments()
    views.count, views.small = 3, 1
    with pytest.raises(ValueError, match="small_size=2"):
        Views(small_size=2)
