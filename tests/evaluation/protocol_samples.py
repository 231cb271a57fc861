"""Sources of coloured noise, and figures that are equal up to rounding."""

import numpy as np
import torch

from crosslevel.data.images import InMemoryImages
from crosslevel.features.extract import Runtime
from crosslevel.utils.device import choose

PLACE = Runtime(choose("cpu", "fp32"), workers=0, batch_size=32)
CLASSES = ["ant", "bee", "cow", "dog"]
ROUNDING = 1e-3  # percent: figures are means in float32
COLOURS = torch.tensor([[150, 90, 90], [90, 150, 90], [90, 90, 150], [125, 125, 70]])


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(labels, seed, noise=90):
    """Four colours under so much noise that no protocol is perfect; each class's colour varies from image to image."""
    count = len(labels)
    colours = COLOURS[labels] + torch.randint(-45, 46, (count, 3), generator=draws(seed))
    pixels = colours[:, :, None, None] + torch.randint(-noise, noise + 1, (count, 3, 16, 16), generator=draws(seed + 1))
    return InMemoryImages(pixels.clamp(0, 255).to(torch.uint8), [f"{i:03}.png" for i in range(count)], labels, CLASSES)


def bank():
    """Long-tailed: 40, 24, 16 and 8 images."""
    return pictures(torch.tensor([0] * 40 + [1] * 24 + [2] * 16 + [3] * 8), 10)


def queries(seed=20, count=60):
    """The same names in another order, and of the fourth class none."""
    labels = torch.randint(3, (count,), generator=draws(seed))
    source = pictures(torch.tensor([2, 0, 1])[labels], seed)
    source.labels, source.classes = labels, ["cow", "ant", "bee"]
    return source


def named(source):
    """The classes' names, image by image."""
    return np.array(source.classes)[source.labels.numpy()]


def film(objects, frames, seed=30):
    """Frames of objects whose looks say nothing about their class."""
    looks = torch.randint(20, 236, (objects, 3, 16, 16), generator=draws(seed))
    noise = torch.randint(-3, 4, (objects, frames, 3, 16, 16), generator=draws(seed + 1))
    pixels = (looks[:, None] + noise).flatten(0, 1).to(torch.uint8)
    labels = torch.randint(4, (objects,), generator=draws(seed + 2)).repeat_interleave(frames)
    source = InMemoryImages(pixels, [f"{i:03}.png" for i in range(len(labels))], labels, CLASSES)
    source.tracks = torch.arange(objects).repeat_interleave(frames)
    return source


def unit(features):
    features = features.double().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def within(judged):
    """Each interval's figure is inside it, and there is one for every figure that is a mean over images."""
    assert judged.intervals
    for name, (low, high) in judged.intervals.items():
        assert 0 <= low <= high <= 100 + ROUNDING
        assert low - ROUNDING <= judged.figures[name] <= high + ROUNDING
    return set(judged.intervals)
