"""Each operation on a batch equals torchvision's functional operation, image by image."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from crosslevel.transforms import functional as augment

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
IMAGES = 5

seeds = st.integers(0, 2**31 - 1)
sides = st.integers(4, 40)


def images(seed: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Random, gray, black and white, two equal channels, and few levels: the corner cases of hue."""
    x = torch.rand(IMAGES, 3, height, width, generator=torch.Generator().manual_seed(seed))
    x[1] = x[1, :1]
    x[2, :, : height // 2] = 0
    x[2, :, height // 2 :] = 1
    x[3, 1] = x[3, 0]
    x[4] = (x[4] * 4).round() / 4
    return x


def each(operation, x, *parameters):
    return torch.stack([operation(image, *values) for image, *values in zip(x, *parameters, strict=True)])


def spread(seed: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(IMAGES, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@given(seed=seeds, height=sides, width=sides, factors=st.lists(st.floats(0, 3), min_size=IMAGES, max_size=IMAGES))
@settings(max_examples=30, deadline=None)
def test_factor_operations(name, seed, height, width, factors):
    x = images(seed, height, width)
    before = x.clone()
    ours = getattr(augment, f"adjust_{name}")(x, torch.tensor(factors))
    theirs = each(getattr(reference, f"adjust_{name}"), x, factors)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert torch.equal(x, before)


@given(seed=seeds, shifts=st.lists(st.floats(-0.5, 0.5), min_size=IMAGES, max_size=IMAGES))
@settings(max_examples=50, deadline=None)
def test_hue(seed, shifts):
    x = images(seed)
    before = x.clone()
    ours = augment.adjust_hue(x, torch.tensor(shifts))
    torch.testing.assert_close(ours, each(reference.adjust_hue, x, shifts), **TOLERANCE)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shift", [-0.5, -1 / 3, -1 / 6, 0.0, 1 / 6, 1 / 3, 0.5])
def test_hue_at_the_corners_of_the_circle(shift):
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8).repeat(IMAGES, 1, 1, 1)
    ours = augment.adjust_hue(colours, torch.full((IMAGES,), shift))
    torch.testing.assert_close(ours, each(reference.adjust_hue, colours, [shift] * IMAGES), **TOLERANCE)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_small_hue_steps_in_place(seed):
    x = images(seed)
    sixths = spread(seed + 1, -1, 1)
    theirs = each(reference.adjust_hue, x, (sixths / 6).tolist())
    assert augment.rotate_hue_(x, sixths) is x
    torch.testing.assert_close(x, theirs, **TOLERANCE)


def test_grayscale_flip_and_solarize():
    x = images(3, 9, 14)
    torch.testing.assert_close(
        augment.to_grayscale(x), reference.rgb_to_grayscale(x, num_output_channels=3), **TOLERANCE
    )
    mirror = torch.tensor([True, False, True, True, False])
    flipped = augment.flip(x, mirror)
    assert torch.equal(flipped[mirror], reference.horizontal_flip(x[mirror]))
    assert torch.equal(flipped[~mirror], x[~mirror])
    thresholds = spread(5, 0.2, 0.8)
    assert torch.equal(augment.solarize(x, thresholds), each(reference.solarize, x, thresholds.tolist()))


def test_solarize_at_one_half_is_128_of_255():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    theirs = reference.solarize(levels, 128).float() / 255
    torch.testing.assert_close(augment.solarize(levels / 255, torch.tensor([0.5])), theirs, **TOLERANCE)


@given(seed=seeds, height=sides, width=sides, data=st.data())
@settings(max_examples=25, deadline=None)
def test_blur(seed, height, width, data):
    taps = data.draw(st.sampled_from([k for k in (1, 3, 5, 9, 23) if k // 2 < min(height, width)]))
    x, sigma = images(seed, height, width), spread(seed + 1, 0.1, 5.0)
    theirs = each(lambda image, s: reference.gaussian_blur(image, [taps, taps], [s, s]), x, sigma.tolist())
    torch.testing.assert_close(augment.gaussian_blur(x, sigma, taps), theirs, **TOLERANCE)


def test_blur_kernel_follows_sigma():
    assert [augment.blur_taps(size, 2.0) for size in (4, 8, 16, 32, 224)] == [7, 15, 17, 17, 17]
    assert [augment.blur_taps(32, sigma) for sigma in (0.1, 1.0, 1.1, 3.0)] == [3, 9, 11, 25]
    for taps in (4, 33):
        with pytest.raises(ValueError, match=f"taps={taps} for images of 16x16"):
            augment.gaussian_blur(images(0), spread(1, 0.1, 2.0), taps)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_blur_of_white_noise_is_that_of_a_whole_gaussian(sigma):
    """SciPy's Gaussian of eight deviations to either side; "mirror" is its word for a reflection without the edge."""
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = augment.gaussian_blur(noise, torch.full((2,), sigma, dtype=torch.float64), augment.blur_taps(32, 2.0))
    theirs = ndimage.gaussian_filter(noise.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=8)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3)
    assert float(ours.std()) == pytest.approx(theirs.std(), rel=0.01)


@given(seed=seeds, height=sides, width=sides, size=st.integers(4, 40), data=st.data())
@settings(max_examples=50, deadline=None)
def test_crop_resize(seed, height, width, size, data):
    boxes = []
    for _ in range(IMAGES):
        rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top = data.draw(st.integers(0, height - rows))
        boxes.append([top, data.draw(st.integers(0, width - columns)), rows, columns])
    mirror = torch.tensor(data.draw(st.lists(st.booleans(), min_size=IMAGES, max_size=IMAGES)))
    x = images(seed, height, width)

    def resized(image, box):
        return reference.resized_crop(image, *box, size=[size, size], antialias=True)

    theirs = each(resized, x, boxes)
    torch.testing.assert_close(augment.crop_resize(x, torch.tensor(boxes), size), theirs, **TOLERANCE)
    torch.testing.assert_close(
        augment.crop_resize(x, torch.tensor(boxes), size, mirror), augment.flip(theirs, mirror), **TOLERANCE
    )


@pytest.mark.parametrize("side", [300, 40])
def test_crop_resize_of_bytes(side):
    x = torch.randint(0, 256, (2, 3, side, side + 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = [[3, 5, side - 4, side], [0, 0, 20, side]]
    theirs = each(lambda i, b: reference.resized_crop(i, *b, size=[32, 32], antialias=True), x / 255, boxes)
    ours = augment.crop_resize(x, torch.tensor(boxes), 32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_erase_and_normalize():
    x = images(7, 12, 20)
    boxes = torch.tensor([[0, 0, 3, 4], [2, 5, 10, 15], [11, 19, 1, 1], [4, 4, 0, 0], [0, 0, 12, 20]])

    def erased(image, box):
        return reference.erase(image, *box, v=torch.full((3, 1, 1), 0.25))

    assert torch.equal(augment.erase(x, boxes, 0.25), each(erased, x, boxes.tolist()))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert torch.equal(augment.normalize(x, torch.tensor(mean), torch.tensor(std)), reference.normalize(x, mean, std))
