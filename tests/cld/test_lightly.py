"""CLD in lightly's own loops, and our losses against lightly's on the same tensors. Needs lightly."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import normal
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.transforms.v2 import functional as tvf

from crosslevel import CrossLevel
from crosslevel.methods.byol import distance
from crosslevel.methods.memory import KeyQueue
from crosslevel.methods.moco import contrast
from crosslevel.methods.simclr import nt_xent
from crosslevel.transforms.views import Views

pytest.importorskip("lightly", reason="needs lightly: pip install lightly")
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum

seeds = st.integers(0, 2**31 - 1)
BATCH, STEPS = 32, 250


@given(seed=seeds, batch=st.integers(2, 12), temperature=st.floats(0.05, 1))
def test_nt_xent_is_lightlys(seed, batch, temperature):
    ours, theirs = ([normal(seed + i, batch, 6).requires_grad_() for i in range(2)] for _ in range(2))
    loss = nt_xent(*(nn.functional.normalize(z, dim=1) for z in ours), temperature)
    expected = NTXentLoss(temperature)(*theirs)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-10)


@given(seed=seeds, batches=st.lists(st.integers(1, 9), min_size=1, max_size=6), temperature=st.floats(0.05, 1))
def test_queue_loss_is_lightlys_while_the_queue_fills(seed, batches, temperature):
    """Batches that divide neither the queue nor one another: what both hold stays the same set of keys."""
    theirs = NTXentLoss(temperature, memory_bank_size=(16, 6)).double()
    ours = KeyQueue(16, 6).double()
    ours.keys.copy_(theirs.memory_bank.bank)
    for step, batch in enumerate(batches):
        if int(theirs.memory_bank.bank_ptr) + batch > 16:
            break  # lightly drops what does not fit at the end of its bank
        query = normal(seed + step, batch, 6).requires_grad_()
        key = nn.functional.normalize(normal(seed + 50 + step, batch, 6), dim=1)
        loss = contrast(nn.functional.normalize(query, dim=1), key, ours, temperature)
        again = query.detach().clone().requires_grad_()
        expected = theirs(again, key)
        loss.backward()
        expected.backward()
        ours.enqueue(key)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(query.grad, again.grad, rtol=1e-6, atol=1e-10)


@given(seed=seeds, batch=st.integers(1, 9))
def test_byols_distance_is_lightlys(seed, batch):
    a, b = normal(seed, batch, 6), normal(seed + 1, batch, 6)
    torch.testing.assert_close(distance(a, b), 2 + 2 * NegativeCosineSimilarity()(a, b), rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def photographs():
    """Crops of the two photographs that scikit-learn brings along."""
    crops = []
    for photo in load_sample_images().images:
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        crops += [image[:, y : y + 96, x : x + 96] for y in range(0, 330, 40) for x in range(0, 540, 40)]
    return torch.stack([tvf.resize(crop, [32, 32], antialias=True) for crop in crops])


class Backbone(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


class LightlySimCLR(nn.Module):
    """https://docs.lightly.ai/self-supervised-learning/examples/simclr.html"""

    views = 2

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), SimCLRProjectionHead(32, 32, 16)
        self.criterion = NTXentLoss(0.2)

    def forward(self, views):
        h = [self.backbone(view) for view in views]
        return self.criterion(self.head(h[0]), self.head(h[1])), h[0], h[1]

    def after_step(self):
        pass


class LightlyMoCo(nn.Module):
    """https://docs.lightly.ai/self-supervised-learning/examples/moco.html, with a second query view for CLD"""

    views = 3

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), MoCoProjectionHead(32, 32, 16)
        self.key, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.key)
        deactivate_requires_grad(self.key_head)
        self.criterion = NTXentLoss(0.2, memory_bank_size=(64, 16))

    def forward(self, views):
        h = [self.backbone(view) for view in views[:2]]
        with torch.no_grad():
            key = self.key_head(self.key(views[2]))
        return self.criterion(self.head(h[0]), key), h[0], h[1]

    def after_step(self):
        update_momentum(self.backbone, self.key, m=0.99)
        update_momentum(self.head, self.key_head, m=0.99)


class LightlyBYOL(nn.Module):
    """https://docs.lightly.ai/self-supervised-learning/examples/byol.html"""

    views = 2

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Backbone(), BYOLProjectionHead(32, 64, 16)
        self.predictor = BYOLPredictionHead(16, 64, 16)
        self.target, self.target_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.target)
        deactivate_requires_grad(self.target_head)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views):
        h = [self.backbone(view) for view in views]
        online = [self.predictor(self.head(x)) for x in h]
        with torch.no_grad():
            target = [self.target_head(self.target(view)) for view in views]
        loss = (self.criterion(online[0], target[1]) + self.criterion(online[1], target[0])) / 2
        return loss, h[0], h[1]

    def after_step(self):
        update_momentum(self.backbone, self.target, m=0.99)
        update_momentum(self.head, self.target_head, m=0.99)


@pytest.mark.parametrize("build", [LightlySimCLR, LightlyMoCo, LightlyBYOL])
def test_lightlys_loop_with_two_lines_more(photographs, build):
    torch.manual_seed(0)
    method = build()
    views = Views("cifar", size=32, scale=(0.5, 1.0))
    views.count = method.views
    cld = CrossLevel(in_features=32, groups=24, temperature=0.2)
    optimizer = torch.optim.SGD([*method.parameters(), *cld.parameters()], lr=0.05, momentum=0.9)
    draws = torch.Generator().manual_seed(0)

    def batch():
        return views(photographs[torch.randperm(len(photographs), generator=draws)[:BATCH]], draws)

    _, h_a, h_b = method(batch())
    slope = torch.autograd.grad(cld(h_a, h_b), method.backbone[0].weight)[0]
    assert slope.abs().max() > 1e-6
    slope = torch.autograd.grad(method(batch())[0], method.backbone[0].weight)[0]
    assert slope.abs().max() > 1e-6

    instance, group = [], []
    for _ in range(STEPS):
        loss, h_a, h_b = method(batch())
        cross = cld(h_a, h_b)
        optimizer.zero_grad()
        (loss + 0.25 * cross).backward()
        optimizer.step()
        method.after_step()
        instance.append(loss.item())
        group.append(cross.item())
    for seen in (instance, group):
        # MoCo's bank begins with random vectors, which are easy to tell from keys: its first steps do not count.
        assert sum(seen[-20:]) / 20 < sum(seen[5:25]) / 20 - 0.1, seen
