"""Tables of features by an encoder of random weights, as several tests compare them."""

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from crosslevel import Encoder
from crosslevel.features import embed
from crosslevel.models.encoder import View
from crosslevel.settings.parser import run


def random_encoder(folder):
    """A run's folder with an encoder of random weights."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    folder.mkdir(exist_ok=True)
    encoder.save(folder / "encoder.safetensors")
    return folder


def draw(folder, numbers, seed=0):
    for i in numbers:
        place = folder / ("b" if i % 3 else "a ü")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.png")


def embedded(trained, photos, output, *options):
    return run(
        embed.embed,
        [str(trained), str(photos), "-o", str(output), "--device=cpu", "--precision=fp32", *options],
        rows=8,
    )


def rows(place):
    """Label, class and feature by path; every path once."""
    table = pq.read_table(place).to_pydict()
    assert len(set(table["path"])) == len(table["path"])
    return {p: (n, c, f) for p, n, c, f in zip(*(table[k] for k in ("path", "label", "class", "feature")), strict=True)}


def same(one, other):
    assert one.keys() == other.keys()
    for path, (label, name, feature) in one.items():
        assert other[path][:2] == (label, name)
        np.testing.assert_allclose(feature, other[path][2], rtol=1e-4, atol=1e-5)
