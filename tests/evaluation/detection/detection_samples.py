"""Scenes of a few shapes in the layout of VOC, and a narrow encoder."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from crosslevel.data.sources.annotated.annotations import Objects
from crosslevel.evaluation.detection.benchmark import Settings
from crosslevel.evaluation.detection.model import Sizes
from crosslevel.evaluation.detection.training import (
    Schedule,
)
from crosslevel.models.encoder import Encoder, View
from crosslevel.utils.device import Hardware

CLASSES = ("disc", "square", "triangle")
CPU = Hardware(torch.device("cpu"), "fp32", "")
SMALL = Sizes((48,), 48, 96)
QUICK = Settings(Schedule(4, 2, 0.1), sizes=SMALL, regions=8)


def draw(picture, name, box, colour):
    x1, y1, x2, y2 = box
    pen = ImageDraw.Draw(picture)
    if name == "disc":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=colour)
    elif name == "square":
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    else:
        pen.polygon([((x1 + x2) / 2, y1), (x2 - 1, y2 - 1), (x1, y2 - 1)], fill=colour)


def noise(rng, size):
    return Image.fromarray(rng.integers(60, 120, (size, size, 3), np.uint8))


def scene(rng, size):
    """One or two shapes on noise, each class in shades of a colour of its own; and what there is."""
    picture, objects = noise(rng, size), []
    halves = [(0, size // 2), (size // 2, size)][: rng.integers(1, 3)]
    for left, right in halves:
        side = int(rng.integers(18, 32))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, size - side + 1))
        kind = int(rng.integers(3))
        colour = rng.integers(0, 60, 3)
        colour[kind] += 180
        draw(picture, CLASSES[kind], (x, y, x + side, y + side), tuple(map(int, colour)))
        objects.append((CLASSES[kind], (x, y, x + side, y + side)))
    return picture, objects


def write_voc(root, split, count, seed, size=64):
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = [f"{split}{i:03}" for i in range(count)]
    for key in keys:
        picture, objects = scene(rng, size)
        picture.save(root / "JPEGImages" / f"{key}.png")
        items = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for name, (x1, y1, x2, y2) in objects
        )
        text = f"<filename>{key}.png</filename><size><width>{size}</width><height>{size}</height></size>{items}"
        (root / "Annotations" / f"{key}.xml").write_text(f"<annotation>{text}</annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(keys))


def narrow(seed=0):
    torch.manual_seed(seed)
    encoder = Encoder("resnet18", True, 0.125)
    encoder.view = View(32)
    return encoder


def annotated_copy(images, **changes):
    copied = images.numbered_as(images)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def keep(objects, labels):
    wanted = torch.isin(objects.labels, torch.tensor(labels))
    return Objects(*(column[wanted] for column in objects))
