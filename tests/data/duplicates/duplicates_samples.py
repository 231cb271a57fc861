"""Pictures whose copies are known: scenes with edits of them, and look-alikes."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tvf


def pictures(count, seed=0):
    """Smooth random pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).byte()


def small(image):
    data = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return tvf.resize(data, [32, 32], antialias=True)


def scene(generator):
    """Patches of colour, blurred, with noise: 320 x 240 pixels."""
    patches = np.kron(generator.random((6, 8, 3)), np.ones((40, 40, 1)))
    noisy = np.clip(patches + generator.normal(0, 0.05, patches.shape), 0, 1) * 255
    return Image.fromarray(noisy.astype(np.uint8)).filter(ImageFilter.GaussianBlur(6))


def recompressed(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def stamped(image):
    image = image.copy()
    image.paste((255, 255, 255), (200, 170, 310, 230))
    return image


EDITS = {
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "gray": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "stamp": stamped,
    "crop 3 %": lambda image: image.crop((10, 7, 310, 233)),
    "crop 6 %": lambda image: image.crop((19, 14, 301, 226)),
    "shift": lambda image: Image.fromarray(np.roll(np.asarray(image), 5, 1)),
    "jpeg": lambda image: recompressed(image, 30),
    "half": lambda image: image.resize((160, 120)),
    "flip": ImageOps.mirror,
}

COLOURS = ((200, 60, 50), (60, 140, 70), (60, 80, 190))


def look_alikes(count, seed=0, size=64):
    """Photographs of different objects of three kinds: a disc, a square, a triangle, each of its own proportions."""
    generator, shown = np.random.default_rng(seed), []
    for i in range(count):
        image = Image.new("RGB", (size * 4, size * 4), (200, 200, 200))
        draw = ImageDraw.Draw(image)
        colour = tuple(np.clip(np.array(COLOURS[i % 3]) + generator.normal(0, 12, 3), 0, 255).astype(int).tolist())
        radius, (x, y) = generator.uniform(0.30, 0.42) * size * 4, generator.uniform(0.47, 0.53, 2) * size * 4
        tall = radius * generator.uniform(0.8, 1.2)
        if i % 3 == 0:
            draw.ellipse((x - radius, y - tall, x + radius, y + tall), fill=colour)
        elif i % 3 == 1:
            draw.rectangle((x - radius, y - tall, x + radius, y + tall), fill=colour)
        else:
            draw.polygon([(x, y - tall), (x - radius, y + tall), (x + radius, y + tall)], fill=colour)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX)) + generator.normal(0, 4, (size, size, 3))
        shown.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return shown
