"""What several tests of images share: a folder of photos."""

import numpy as np
import pytest
from picture_samples import BAD
from PIL import Image

from crosslevel.data.sources.folder import Files


@pytest.fixture
def photos(tmp_path):
    """12 files of several sizes, two of them unreadable, in two class folders."""
    generator = np.random.default_rng(0)
    for i in range(12):
        file = tmp_path / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        if i in BAD:
            file.write_bytes(BAD[i])
            continue
        pixels = generator.integers(0, 256, (20 + 5 * i, 60 - 3 * i, 3), np.uint8)
        Image.fromarray(pixels).resize((60 - 3 * i, 20 + 5 * i)).save(file)
    return Files.from_folder(str(tmp_path))
