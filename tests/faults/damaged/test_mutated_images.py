"""Images with changed bytes: another image, or a bad one, and never a word of the decoder's own."""

import contextlib
import io

import numpy as np
import pytest
import torch
from mutations import mutated
from PIL import Image

from crosslevel.data.decode import decode
from crosslevel.utils.errors import BadImage


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "AVIF", "JPEG2000"])
def test_changed_bytes_make_a_bad_image_or_another_one(format, capfd):
    rng, stream = np.random.default_rng(0), io.BytesIO()
    picture = np.add.outer(np.arange(48), 2 * np.arange(40))[..., None] + rng.integers(0, 90, 3)
    Image.fromarray(picture.astype(np.uint8)).save(stream, format)
    for _ in range(60):
        with contextlib.suppress(BadImage):
            image = decode(bytearray(mutated(stream.getvalue(), rng)), "x")
            assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
    assert capfd.readouterr().err == ""
