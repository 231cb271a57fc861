"""Pictures to pack."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosslevel.data import pack
from crosslevel.data.pack_writer import Sizes
from crosslevel.settings.parser import run

ODD = ["with space.png", "😀 ü.png", "new\nline.png"]


def write(root, count=24, seed=0):
    draws = np.random.default_rng(seed)
    for n in range(count):
        file = root / "ab"[n % 2] / f"{n:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (30 + n % 7, 40, 3), np.uint8)).save(file)
    return root


@contextmanager
def failing_at(name, error):
    """While the block runs, ``error`` is raised where a file of this name is to be put in its place."""
    replace = os.replace

    def fails(file, target):
        if Path(target).name == name:
            raise error
        replace(file, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fails)
        yield


def full_at_the_end():
    """While the block runs, the disk has no room for a pack's index, which comes after all its pixels."""
    return failing_at("index.safetensors", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def packed(source, folder, *options):
    """A pack of a few images with several parts and, where they are not of one square size, several files."""
    small = Sizes(part=4, shard=15_000, at_once=2)
    return run(pack.pack, [str(source), "-o", str(folder), "--size=20", "--workers=0", *options], sizes=small)
