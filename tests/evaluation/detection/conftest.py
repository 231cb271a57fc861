"""What the tests of detection share."""

import pytest
from detection_samples import write_voc

from crosslevel.data.sources.annotated.open import annotated
from crosslevel.data.uri import parse


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
