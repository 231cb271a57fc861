"""What the tests of detection and of protocols share."""

import pytest
import torch
from detection_samples import write_voc
from protocol_samples import PLACE, bank, queries

from crosslevel import Encoder
from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse
from crosslevel.evaluation.protocols import (
    PIXELS,
    Subject,
)
from crosslevel.models.encoder import View


@pytest.fixture(scope="module")
def pycocotools():
    return pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'crosslevel[detection]'")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Training and test sets in the layout of VOC."""
    root = tmp_path_factory.mktemp("VOC")
    write_voc(root, "train", 100, 0)
    write_voc(root, "test", 30, 1)
    return annotated(parse(f"{root}:train")), annotated(parse(f"{root}:test"))


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
