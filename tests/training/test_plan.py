"""The rules together, as `settle` applies them: whatever the collection, view, batch and length, a training fits."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from crosslevel.cld.loss import CrossLevel
from crosslevel.methods import MoCo
from crosslevel.models.encoder import Encoder
from crosslevel.training.components import assemble, bases
from crosslevel.training.options import Optimization
from crosslevel.training.plan import settle
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

IMAGES = (2, 50, 500, 5_000, 1_000_000)
VIEWS = (8, 64, 512)
BATCHES = (None, 8, 4_096)
STEPS = (1, 1_000_000)
UNSET = dict.fromkeys(Optimization.__dataclass_fields__)


class Batches:
    """Stands for those of a number of images: a batch has at most all of them, and an epoch no part of one."""

    def __init__(self, images, size):
        self.batch_size = min(size, images)
        self.steps = images // self.batch_size

    def __len__(self):
        return self.steps


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Encoder("resnet18", True, 0.0625)


def planned(network, images, view, batch, steps):
    """The plan and the parts of about as many steps, with the method that has most settings to choose."""
    base = bases(network, lambda features: CrossLevel(features, out_features=8), lambda: Views(size=view), 0)
    parts = assemble(base, lambda encoder, count: MoCo(encoder, out_features=8), images, False)
    size = min(batch or 128, images)
    requested = Optimization(**UNSET | {"epochs": steps * size / images, "batch_size": batch, "accumulate": 1})
    feed = SimpleNamespace(choices=(), length=images)
    runtime = SimpleNamespace(world=SimpleNamespace(size=1), hardware=choose("cpu", "fp32"), strategy="auto")
    return settle(parts, requested, feed, lambda size: Batches(images, size), runtime), parts


@pytest.mark.parametrize("images", IMAGES)
def test_whatever_is_known_before_a_training_its_settings_fit_each_other(network, images):
    for view, batch, steps in itertools.product(VIEWS, BATCHES, STEPS):
        plan, parts = planned(network, images, view, batch, steps)
        rates = plan.optimization
        assert 2 <= plan.batches.batch_size <= images
        assert plan.steps >= 1
        assert 0 <= plan.warmup_steps <= plan.steps
        chosen = {choice.setting: choice.value for choice in plan.choices}
        assert 2 <= chosen["cld.groups"] <= plan.batches.batch_size
        assert len(chosen) == len(plan.choices)  # each setting is chosen once
        assert all(0 < value < 10 for value in (rates.lr, rates.encoder_rate, rates.layer_decay))
        assert 0 < rates.weight_decay < 1
        scale, flip = parts.views.arguments()["scale"], parts.views.arguments()["flip"]
        assert scale is None or 0 < scale[0] < scale[1] <= 1
        assert flip is None or 0 <= flip <= 1
        assert 1 <= chosen["method.queue"] < images
        assert 0 < chosen["method.momentum"] < 1
