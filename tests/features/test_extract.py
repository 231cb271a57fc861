"""Images through an encoder: the same features as a plain forward pass, in order, with everything left as it was."""

import pytest
import torch

from crosslevel import Encoder
from crosslevel.data.images import InMemoryImages
from crosslevel.features.extract import extract, normalize, stream
from crosslevel.models.copies import frozen
from crosslevel.models.encoder import View
from crosslevel.utils.device import choose

CPU = choose("cpu", "fp32")


def pictures(count, size=16):
    data = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return InMemoryImages(data, [f"{i}.png" for i in range(count)], torch.arange(count) % 3)


def lively(name="resnet18", **options):
    """An encoder whose normalizations do something: statistics and weights away from 0 and 1."""
    torch.manual_seed(0)
    encoder = Encoder(name, **options)
    draws = torch.Generator().manual_seed(2)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draws))
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draws))
    encoder.view = View(16)
    return encoder


@pytest.mark.parametrize(
    "options",
    [
        {"small_images": True, "width": 0.25},
        {"name": "resnet50", "width": 0.125},
        {"name": "resnet18d"},
        {"name": "test_resnet"},
        {"name": "test_efficientnet"},
    ],
)
def test_folded_normalizations_leave_the_features(options):
    encoder = lively(**options).eval()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(frozen(encoder)(x), encoder(x), rtol=1e-4, atol=1e-4)


def test_a_resnet_has_no_normalization_left():
    copied = frozen(lively(small_images=True, width=0.25))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in copied.modules())


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_a_plain_forward_pass(training):
    encoder, images = lively(small_images=True, width=0.125).train(training), pictures(150)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = extract(encoder, images, batch_size=70, hardware=CPU)
    assert encoder.training == training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(found.indices, torch.arange(150))
    assert torch.equal(found.labels, images.labels)
    with torch.no_grad():
        expected = encoder.eval()(normalize(images.data, encoder.view))
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_threads_stays():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(stream(lively(width=0.125), pictures(200), hardware=CPU))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_encoder_that_fails_fails_the_stream():
    encoder = lively(width=0.125)
    encoder.backbone.conv1 = torch.nn.Conv2d(4, 8, 3)
    with pytest.raises(RuntimeError, match="channels"):
        list(stream(encoder, pictures(200), hardware=CPU))


def test_a_stream_can_be_left_in_the_middle():
    parts = stream(lively(width=0.125), pictures(300), hardware=CPU)
    assert torch.equal(next(parts).indices, torch.arange(64))
    parts.close()
