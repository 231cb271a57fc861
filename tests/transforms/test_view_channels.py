"""Views of images that have not three channels: brightness and contrast stay, what needs colours is left out."""

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from view_samples import generator, pixels

from crosslevel.transforms.parameters import draw
from crosslevel.transforms.presets import PRESETS
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError


def views_of(channels, preset="simclr", **settings):
    return Views(preset, size=24, mean=(0.4,) * channels, std=(0.2,) * channels, **settings)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("preset", ["simclr", "byol", "dino", "infomin", "none"])
def test_one_channel_is_seen_as_three_that_are_equal(preset):
    gray = pixels(20, 1, 31, 40)
    colourless = {"saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "randaugment": 0}
    ours = views_of(1, preset, erase=0.2)(gray, generator(1))
    threefold = views_of(3, preset, erase=0.2, **colourless)(gray.expand(-1, 3, -1, -1), generator(1))
    for view, three in zip(ours, threefold, strict=True):
        assert view.shape == (20, 1, 24, 24)
        torch.testing.assert_close(view.expand(-1, 3, -1, -1), three, atol=2e-3, rtol=0)  # the three weights: 0.9999


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels", [2, 6])
def test_brightness_and_contrast_are_those_of_all_channels(channels):
    images = pixels(12, channels, 24, 24)
    views = views_of(channels, "simclr", scale=(1.0, 1.0), flip=0.0, blur=0.0)
    ours = views(images, generator(2))[0]
    drawn = draw(views.augments[0], 12, 24, 24, 24, generator(2))
    for i in range(12):
        x = reference.resize(images[i].double() / 255, [24, 24])
        top, left, rows, columns = (int(v) for v in drawn.boxes[i])
        x = reference.resized_crop(images[i].double() / 255, top, left, rows, columns, [24, 24])
        for kind in drawn.order[i].tolist() if drawn.jitter[i] else []:
            factor = float(drawn.factors[i, kind])
            if kind == 0:
                x = (x * factor).clamp(0, 1)
            elif kind == 1:
                x = (factor * x + (1 - factor) * x.mean()).clamp(0, 1)
        torch.testing.assert_close(ours[i].double(), (x - 0.4) / 0.2, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_crops_of_any_number_of_channels_are_torchvisions(channels):
    image = pixels(1, channels, 40, 33)[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    views = views_of(channels, "none")
    made = views.crops(image, generator(3))
    square = reference.resized_crop(image, 3, 0, 33, 33, [24, 24], antialias=True)
    assert made.shape == (2, channels, 24, 24)
    assert torch.equal(made[0], square)
    assert torch.equal(views(made.unsqueeze(0))[0][0], (square / 255 - 0.4) / torch.tensor(0.2))


def test_what_needs_colours_is_refused_where_it_was_asked_for_and_else_left_out():
    views = views_of(4, "infomin")
    (augment,) = views.augments
    assert (augment.saturation, augment.hue, augment.grayscale, augment.randaugment) == (0, 0, 0, 0)
    assert (augment.brightness, augment.blur) == (0.8, PRESETS["infomin"][0].blur)
    views = Views("simclr")
    views.normalize_by((0.5,) * 2, (0.1,) * 2)
    assert (views.channels, views.augments[0].hue) == (2, 0)
    views.choose("byol")
    assert all(augment.grayscale == 0 for augment in views.augments)
    with pytest.raises(
        UserError, match=r"views.grayscale=0.2 needs red, green and blue, not images of 1 channel: leave"
    ):
        views_of(1, grayscale=0.2)
    with pytest.raises(UserError, match=r"views.mean=\[0.5, 0.5, 0.5\]: the images have 2 channels: give one for each"):
        Views(mean=(0.5,) * 3).normalize_by((0.5,) * 2, (0.1,) * 2)
    with pytest.raises(UserError, match="give one of each for every channel"):
        Views(mean=(0.5,) * 4, std=(0.5,) * 3)
    with pytest.raises(UserError, match=r"give uint8 \(B, 4, H, W\)"):
        views_of(4)(pixels(2, 3, 8, 8))
