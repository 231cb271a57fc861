"""What the tests of features share."""

import pytest
import torch
from cache_samples import Killed, draw
from run_samples import watching_encoders

from crosslevel import Encoder
from crosslevel.models.encoder import View


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    return encoder


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of noise in two classes."""
    return draw(tmp_path / "photos", 12, 0)


@pytest.fixture
def encoded():
    """How many images went through an encoder, pass by pass; ``encoded.most`` of them kill the process."""

    class Encoded(list):
        most = None

    counts = Encoded()

    def counting(encoder, shown):
        if counts.most is not None and sum(counts) + len(shown) > counts.most:
            raise Killed
        counts.append(len(shown))

    with watching_encoders(counting):
        yield counts
