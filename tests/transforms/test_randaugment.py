"""RandAugment's operations equal torchvision's, image by image; which image takes which is the law's."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode

from crosslevel.transforms import randaugment as ra
from crosslevel.transforms.parameters import Augment
from crosslevel.transforms.views import Views

IMAGES = 6
seeds = st.integers(0, 2**31 - 1)
levels = st.lists(st.floats(-1, 1), min_size=IMAGES, max_size=IMAGES)


def images(seed, side=16):
    """Random, flat, gray, and few levels, in whole steps of 1 / 255."""
    x = torch.randint(256, (IMAGES, 3, side, side), generator=torch.Generator().manual_seed(seed)) / 255
    x[1] = 0.4
    x[2] = x[2, :1]
    x[3] = (x[3] * 4).round() * 51 / 255
    return x


def on(operation, x, level, fill=(0.0, 0.0, 0.0)):
    return operation(x.clone(), torch.tensor(level, dtype=torch.float32), torch.tensor(fill))


def whole(x):
    return (x * 255).round().to(torch.uint8)


def affine(x, **changed):
    plain = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return reference.affine(x, **{**plain, **changed}, interpolation=InterpolationMode.BILINEAR)


def shear(value):
    """torchvision takes the angle, and measures from the centre unless told."""
    return math.degrees(math.atan(value))


EXPECTED = {
    ra.autocontrast: lambda x, v: reference.autocontrast(x),
    ra.equalize: lambda x, v: reference.equalize(whole(x)) / 255,
    ra.invert: lambda x, v: reference.invert(x),
    ra.posterize: lambda x, v: reference.posterize(whole(x), bits=int(abs(v) * 4)) / 255,
    ra.solarize: lambda x, v: torch.where(whole(x).int() >= int(abs(v) * 256), 1 - x, x),
    ra.color: lambda x, v: reference.adjust_saturation(x, 1.8 * abs(v) + 0.1),
    ra.contrast: lambda x, v: reference.adjust_contrast(x, 1.8 * abs(v) + 0.1),
    ra.brightness: lambda x, v: reference.adjust_brightness(x, 1.8 * abs(v) + 0.1),
    ra.sharpness: lambda x, v: reference.adjust_sharpness(x, 1.8 * abs(v) + 0.1),
    ra.rotate: lambda x, v: reference.rotate(x, 30 * v, interpolation=InterpolationMode.BILINEAR),
    ra.shear_x: lambda x, v: affine(x, shear=[shear(0.3 * v), 0.0], center=[0, 0]),
    ra.shear_y: lambda x, v: affine(x, shear=[0.0, shear(0.3 * v)], center=[0, 0]),
}


@pytest.mark.parametrize("operation", EXPECTED, ids=lambda o: o.__name__)
@given(seed=seeds, level=levels)
def test_an_operation_is_torchvisions(operation, seed, level):
    level = [float(torch.tensor(v, dtype=torch.float32)) for v in level]
    x = images(seed)
    ours = on(operation, x, level)
    theirs = torch.stack([EXPECTED[operation](image, v) for image, v in zip(x, level, strict=True)])
    torch.testing.assert_close(ours, theirs.float(), atol=2e-4, rtol=0)


@given(seed=seeds, level=levels)
def test_shifts_fetch_from_where_the_level_says(seed, level):
    """In units of pixels: level v shows at x what was at x + 0.45 v W, halfway values by interpolation."""
    x = images(seed)
    for operation, axis in ((ra.translate_x, 2), (ra.translate_y, 1)):
        ours = on(operation, x, level)
        for image, v, out in zip(x, level, ours, strict=True):
            lines = torch.cat([torch.zeros_like(image), image, torch.zeros_like(image)], dim=axis).unbind(axis)
            expected = []
            for place in range(16):
                at = 16 + place + 0.45 * v * 16
                low, share = math.floor(at), at - math.floor(at)
                expected.append((1 - share) * lines[low] + share * lines[low + 1])
            torch.testing.assert_close(out, torch.stack(expected, dim=axis), atol=2e-4, rtol=0)


@given(seed=seeds, level=levels)
def test_solarize_add_brightens_the_darker_half(seed, level):
    x = images(seed)
    ours = whole(on(ra.solarize_add, x, level))
    for image, v, out in zip(whole(x).int(), level, ours.int(), strict=True):
        added = int(abs(float(torch.tensor(v, dtype=torch.float32))) * 110)
        expected = torch.where(image < 128, (image + added).clamp(max=255), image)
        assert ((out - expected).abs() <= (1 if abs(abs(v) * 110 - round(abs(v) * 110)) < 1e-4 else 0)).all()


@pytest.mark.parametrize(
    "operation", [ra.rotate, ra.shear_x, ra.shear_y, ra.translate_x, ra.translate_y], ids=lambda o: o.__name__
)
def test_what_comes_into_the_picture_has_the_fill_colour(operation):
    fill = torch.tensor([0.2, 0.5, 0.7])
    flat = fill.view(3, 1, 1).expand(IMAGES, 3, 16, 16)
    torch.testing.assert_close(on(operation, flat, [1.0] * IMAGES, fill.tolist()), flat)
    moved = on(operation, torch.ones(IMAGES, 3, 16, 16), [1.0] * IMAGES, fill.tolist())
    torch.testing.assert_close(moved.amin((0, 2, 3)), fill)


def test_draws_follow_their_law():
    kind, level = ra.draw_operations(20_000, 2, 0.9, torch.Generator().manual_seed(0))
    assert (kind == ra.SKIP).float().mean().item() == pytest.approx(0.5, abs=0.01)
    counts = kind[kind != ra.SKIP].bincount(minlength=15).double()
    # Fourteen degrees of freedom: beyond 45 with a chance below 1e-4.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 45
    assert (level < 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    inner = level.abs()[level.abs() < 1]
    assert level.abs().max() <= 1
    assert (level.abs() == 1).float().mean().item() == pytest.approx(0.0228, abs=0.004)  # two standard deviations up
    assert inner.mean().item() == pytest.approx(0.9 - 0.05 * 0.0553, abs=0.002)


def test_each_image_gets_the_operations_that_it_drew():
    x, fill = images(3), torch.zeros(3)
    kind = torch.tensor([[2, 2], [-1, -1], [2, 0], [9, -1], [-1, 7], [0, 2]])
    level = torch.full((6, 2), 0.5)
    out = x.clone()
    ra.apply_(out, list(ra.rows_by_operation(kind)), level, fill)
    for image, own, result in zip(x, kind.tolist(), out, strict=True):
        expected = image[None].clone()
        for number in own:
            if number != ra.SKIP:
                expected = ra.OPERATIONS[number](expected, torch.tensor([0.5]), fill)
        torch.testing.assert_close(result, expected[0])


def test_views_apply_it_after_the_blur_and_before_the_colour_is_dropped():
    views = Views("infomin", size=24, grayscale=1.0)
    pixels = torch.randint(256, (40, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = views(pixels, torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    assert all(view.isfinite().all() for view in out)
    values = out[0] * std + mean
    torch.testing.assert_close(values, values[:, :1].expand_as(values), atol=1e-5, rtol=0)  # gray came last
    assert not torch.equal(out[0], Views("infomin", size=24, grayscale=1.0, randaugment=0)(
        pixels, torch.Generator().manual_seed(2))[0])  # fmt: skip


def test_settings_outside_their_range():
    with pytest.raises(ValueError, match="randaugment=-1"):
        Augment(randaugment=-1)
    with pytest.raises(ValueError, match="magnitude=11"):
        Augment(magnitude=11)
