"""A ViT that is built for one size, on others, against timm's own way."""

import pytest
import timm
import torch
from hub_samples import VIT
from reference import normal

from crosslevel.models.any_size import take_any_size
from crosslevel.models.encoder import Encoder


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("test_vit", {}),
        ("vit_small_patch16_dinov3", VIT),
    ],
)
def test_other_sizes_are_taken_as_timm_does_and_its_own_stays_the_same(name, sizes):
    torch.manual_seed(0)
    encoder = Encoder(name, image_size=48, arguments=sizes).eval()
    theirs = timm.create_model(name, img_size=48, num_classes=0, dynamic_img_size=True, **sizes).eval()
    theirs.load_state_dict(encoder.backbone.state_dict())
    images = normal(0, 2, 3, 48, 48, dtype=torch.float32)
    before, names = encoder(images), list(encoder.state_dict())
    assert take_any_size(encoder.backbone) == 16
    assert torch.equal(encoder(images), before)
    assert list(encoder.state_dict()) == names
    small = images[:, :, :32, :32]
    torch.testing.assert_close(encoder(small), theirs(small))


def test_other_networks_are_left():
    """EVA-02 has its rotary embeddings for one size."""
    assert take_any_size(Encoder("resnet18", width=0.0625).backbone) is None
    encoder = Encoder("eva02_base_patch16_clip_224", image_size=48, arguments=VIT).eval()
    images = normal(0, 1, 3, 48, 48, dtype=torch.float32)
    before = encoder(images)
    assert take_any_size(encoder.backbone) is None
    assert torch.equal(encoder(images), before)
