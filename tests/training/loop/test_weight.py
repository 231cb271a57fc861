"""The weight of the group branch: the loop multiplies by it, once."""

import pytest
import torch

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.loaders.batches import Batch
from crosslevel.methods import SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.settings.command import Command
from crosslevel.settings.parser import read_line, settings_of
from crosslevel.training.loop.module import Pretrain
from crosslevel.training.train import train
from crosslevel.transforms.views import Views


@pytest.mark.parametrize("weight", [0.0, 0.25, 2.0])
def test_the_loss_of_a_step_is_the_sum(weight):
    """L = L_I + weight * L_G, the gradient too."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.0625).double()
    method, cld = SimCLR(encoder).double(), CrossLevel(encoder.num_features, groups=4, weight=weight).double()
    views = Views("none", size=32)
    views.count = 2
    step = Pretrain(
        encoder, method, cld, views, steps=9, warmup_steps=0, optimizer="sgd", lr=0.1, weight_decay=0, seed=0
    )
    images = torch.randint(0, 256, (8, 2, 3, 32, 32), dtype=torch.uint8)
    drawn = []
    views.register_forward_hook(lambda module, given, out: drawn.append([view.double() for view in out]) or drawn[-1])
    loss, _ = step(Batch(images, torch.zeros(8, dtype=torch.long), torch.arange(8)))
    features = [encoder(view) for view in drawn[0]]
    expected = method(drawn[0], features, torch.arange(8))[0] + weight * cld(*features)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_the_command_line_has_the_weight_that_python_has():
    command = Command.of_function(train)
    told = settings_of(command, read_line(command, ["photos"]))
    assert told["cld"]["weight"] == CrossLevel(8).weight == 0.25
