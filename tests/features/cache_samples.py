"""Pictures of noise, and what a new process finds of their features."""

import numpy as np
import torch
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.features.cache import FeatureCache
from crosslevel.features.extract import Runtime
from crosslevel.utils.device import choose

PLACE = Runtime(choose("cpu", "fp32"), workers=0, batch_size=4)


class Killed(BaseException):
    """What no handler of errors catches."""


def draw(folder, count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
        file = folder / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return folder


def computed(encoder, source, home, name="trained", place=PLACE, bad_files=None, **sizes):
    """What a new process finds: nothing but the folder is shared between calls."""
    source = open_images(source) if not isinstance(source, Images) else source
    bad_files = BadFiles() if bad_files is None else bad_files
    return FeatureCache(home, place, bad_files, **sizes).features(name, encoder, source), bad_files


def by_hand(encoder, source):
    """Features and labels by path, one image at a time; the mean and deviation are ImageNet's."""
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    rows = {}
    for file in sorted(source.rglob("*.png")):
        try:
            pixels = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
        except OSError:
            continue
        with torch.no_grad():
            shown = torch.tensor((pixels - mean) / std, dtype=torch.float32)[None]
            rows[file.relative_to(source).as_posix()] = (encoder.eval()(shown)[0], "ab".index(file.parent.name))
    return rows


def same(known, other):
    tracks = [k.tracks is None or k.tracks for k in (known, other)]
    return (
        torch.equal(known.features, other.features)
        and torch.equal(known.labels, other.labels)
        and (tracks[0] is tracks[1] is True or torch.equal(*tracks))
    )


def folders(home):
    return {folder.name for folder in (home / "features").iterdir()}
