"""Containers of images that several tests read: image i is 4 x 6 pixels of value i."""

import io
import tarfile

import numpy as np
from picture_samples import encoded
from PIL import Image


def flat(i):
    return encoded(Image.fromarray(np.full((4, 6, 3), i % 256, np.uint8)), "PNG")


def value(image):
    assert image.shape == (3, 4, 6)
    assert image.min() == image.max()
    return int(image[0, 0, 0])


def write_tar(file, members, **options):
    """``members``: names and contents."""
    with tarfile.open(file, "w", **options) as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return file


def labelled(numbers):
    """Members of a WebDataset shard, each image followed by its label, the number modulo 3."""
    for i in numbers:
        yield f"{i:04d}.png", flat(i)
        yield f"{i:04d}.cls", b"%d" % (i % 3)
