"""Tar shards of pictures that tell their numbers."""

import functools
import io
import tarfile

import numpy as np
import torch
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse


@functools.cache
def picture(number):
    """A PNG of one colour that tells its number."""
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number % 251, np.uint8)).save(stream, "png")
    return stream.getvalue()


def archive(numbers, format=tarfile.PAX_FORMAT, others=True, name="{:04}.png", bad=()):
    """A tar file of pictures, each followed by a caption, as WebDataset's are."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for number in numbers:
            data = b"no picture" if number in bad else picture(number)
            members = [(name.format(number), data), (f"{number:04}.txt", b"a caption" * number)]
            for title, content in members[: 1 + others]:
                member = tarfile.TarInfo(title)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def shards(folder, *parts, **how):
    for i, numbers in enumerate(parts):
        (folder / f"s-{i}.tar").write_bytes(archive(numbers, **how))
    return ImageStream.open(parse(f"stream:{folder}/s-*.tar"))


def crops(image, generator):
    """The image as it is, and one that shows which generator was used."""
    return torch.stack([image, torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)])


def batches(stream, size, epoch_size, **how):
    return StreamBatches(stream, size, epoch_size, **{"seed": 0, "bad_files": BadFiles(), "crops": crops, **how})


def numbers(batch):
    return batch.images[:, 0, 0, 0, 0].tolist()


def seen(delivered):
    return [number for batch in delivered for number in numbers(batch)]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
