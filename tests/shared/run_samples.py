"""Small folders of images, and what a run left, as several tests need them."""

import csv
from contextlib import contextmanager

import numpy as np
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from crosslevel.models.encoder import Encoder


def write_images(folder, count=12, size=(16, 16), classes=("cat", "dog"), seed=0):
    """``count`` noisy pictures in each class's folder, of one colour a class."""
    rng = np.random.default_rng(seed)
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (*size, 3)) + np.array([120 * (c == 0), 60, 120 * (c == 1)])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")
    return folder


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder):
    return {int(row["step"]): row["loss"] for row in metrics(folder) if row["loss"]}


@contextmanager
def watching_encoders(before=None, after=None):
    """``before(encoder, images)`` and ``after(encoder, images, features)`` see each pass through an encoder."""
    handles = [
        register_module_forward_pre_hook(
            lambda module, given: before(module, given[0]) if before and isinstance(module, Encoder) else None
        ),
        register_module_forward_hook(
            lambda module, given, out: after(module, given[0], out) if after and isinstance(module, Encoder) else None
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
