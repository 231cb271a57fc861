"""What the tests of protocols share."""

import pytest
import torch
from protocol_samples import PLACE, bank, queries

from crosslevel import Encoder
from crosslevel.evaluation.protocols import (
    PIXELS,
    Subject,
)
from crosslevel.models.encoder import View


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625, zero_init_last=True)  # its random features tell the samples apart
    encoder.view = View(16)
    return encoder


@pytest.fixture(scope="module")
def subject(encoder):
    """Two kinds of features of the same images."""
    return Subject({"raw pixels": PIXELS, "encoder": encoder}, bank(), queries(), PLACE)
