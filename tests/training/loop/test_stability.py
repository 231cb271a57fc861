"""A hundred steps of every method in bfloat16, half of the images copies of a few: finite, and not collapsed.

As many with CLD by k-means beside one of each kind: with the batch's negatives, a bank's, a queue's, with none, with
prototypes. By normalized cut, which is slow and differs in the groups alone, a third.
"""

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from crosslevel import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.sources.turntable.dataset import Turntable
from crosslevel.data.subsets.select import take
from crosslevel.features.extract import extract
from crosslevel.methods import METHODS
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.fit import fit
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware

pytestmark = pytest.mark.slow

STEPS, BATCH, DISTINCT, COPIED = 100, 16, 160, 10
BF16 = Hardware(torch.device("cpu"), "bf16", "test")
RANK = 5
OPTIONS = {
    "npid": {"negatives": 64},
    "moco": {"queue": 128},
    "infomin": {"queue": 128},
    "byol": {"hidden": 64},
    "swav": {"prototypes": 64, "queue": 128, "small_views": 2},
    "dino": {"outputs": 128, "small_views": 2},
}


@pytest.fixture(scope="module")
def images():
    """Frames of turntable objects, and as many copies of a few of them."""
    source = Turntable(classes=8, objects=40, frames=8, size=16, imbalance=4)
    distinct = torch.linspace(0, len(source) - 1, DISTINCT).long()
    return take(source, torch.cat([distinct, distinct[:COPIED].repeat(DISTINCT // COPIED)]))


def effective_rank(features):
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), of unit, centred features."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    share = values[values > 0] / values.sum()
    return math.exp(-(share * np.log(share)).sum())


def trained(images, folder, name, grouping, steps, blocks=1):
    """A method's training, whole and finite, in bfloat16; of the maps a single pixel is left before the last stride."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_images=False, width=0.0625)
    for stage in range(1, 5):
        del getattr(encoder.backbone, f"layer{stage}")[blocks:]
    method = METHODS[name](encoder, len(images), out_features=32, **OPTIONS.get(name, {}))
    cld = CrossLevel(encoder.num_features, weight=0.5, out_features=32, grouping=grouping) if grouping else None
    method.online = max(method.online, 2) if cld else method.online
    views = Views("cifar", size=16)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    batches = TrainBatches(images, BATCH, seed=0, bad_files=BadFiles())
    module = Pretrain(
        encoder, method, cld, views, steps=steps, warmup_steps=10, optimizer="sgd", lr=0.06, weight_decay=5e-4, seed=0
    )
    done = fit(module, batches, folder, hardware=BF16, console=Console(file=io.StringIO()), checkpoint_minutes=9)
    assert (done.steps, done.finished) == (steps, True)
    module.check_finite()
    assert all(bool(torch.isfinite(p).all()) for p in module.state_dict().values() if p.is_floating_point())
    encoder.view = encoder.view._replace(size=16)
    return module


CASES = [(name, None) for name in METHODS if name != "distill"]  # it needs a teacher
CASES += [(name, "kmeans") for name in ("simclr", "npid", "moco", "byol", "swav")]
CASES += [(name, "normalized-cut") for name in ("simclr", "moco", "byol")]


@pytest.mark.parametrize(("name", "grouping"), CASES)
def test_a_hundred_steps_on_duplicates(images, tmp_path, name, grouping):
    module = trained(images, tmp_path, name, grouping, STEPS // 3 if grouping == "normalized-cut" else STEPS)
    if grouping:
        assert module.values()["groups_used"] >= 2
    shown = take(images, torch.arange(DISTINCT))
    assert isinstance(shown, InMemoryImages)
    assert effective_rank(extract(module.encoder, shown, hardware=BF16).features.numpy()) > RANK


def test_a_few_steps(images, tmp_path):
    """More than the fault that is known of leaves finite (docs/numerics.md); run under each instruction set."""
    trained(images, tmp_path, "simclr", "kmeans", 30, blocks=2)


def test_a_collapsed_network_would_be_noticed():
    """The measure itself: one direction, two directions, all of them."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(50, 1)) @ rng.normal(size=(1, 16))
    assert effective_rank(line + 1e-9) < 1.01
    assert effective_rank(rng.normal(size=(5000, 16))) > 15.9
