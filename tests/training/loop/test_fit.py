"""The training step's own parts: LARS and its exclusions, the schedule, the seeds."""

import functools
import math

import pytest
import torch
from reference import TinyEncoder, normal
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crosslevel.cld.loss import CrossLevel
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import Batch, TrainBatches
from crosslevel.methods import NPID, InfoMin, MoCo, SimCLR
from crosslevel.models.encoder import Encoder
from crosslevel.models.schedules import warmed_up
from crosslevel.models.sync_batchnorm import SyncBatchNorm, synchronize
from crosslevel.training.loop.fabric import check_memory, hold_images
from crosslevel.training.loop.module import Pretrain
from crosslevel.transforms.views import Views
from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import step_seed


def module(optimizer, lr=0.3, weight_decay=0.01):
    encoder = TinyEncoder()
    encoder.norm = nn.BatchNorm1d(5)
    return Pretrain(
        encoder, SimCLR(encoder, head="linear", out_features=4), None, Views(), steps=10, warmup_steps=0,
        optimizer=optimizer, lr=lr, weight_decay=weight_decay, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("decay", [0.01, 0.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_lars_adapts_and_decays_matrices_alone(steps, decay):
    """You et al. 2017: a layer's rate is 0.001 |w| / (|g| + decay |w|); biases and normalization take plain SGD."""
    trained = module("lars", weight_decay=decay)
    optimizer = trained.configure_optimizer()
    before = {name: p.detach().double().clone() for name, p in trained.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    for step in range(steps):
        for i, p in enumerate(trained.parameters()):
            p.grad = normal(10 * step + i, *p.shape, dtype=torch.float32)
        for i, name in enumerate(before):
            w, g = before[name], normal(10 * step + i, *before[name].shape)
            if w.ndim > 1:
                g = g + decay * w
                g = g * 0.001 * w.norm() / (normal(10 * step + i, *w.shape).norm() + decay * w.norm())
            momentum[name] = g if step == 0 else 0.9 * momentum[name] + g
            before[name] = w - 0.3 * momentum[name]
        optimizer.step()
    assert {p.ndim for p in trained.parameters()} == {1, 2}
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p.detach().double(), before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_model_that_a_device_cannot_keep_is_refused(optimizer):
    trained = module(optimizer)
    stepped = trained.configure_optimizer()
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    stepped.step()
    kept = [*trained.parameters(), *trained.buffers(), *(p.grad for p in trained.parameters())]
    kept += [part for state in stepped.state.values() for part in state.values() if part.ndim]
    there = sum(part.numel() * part.element_size() for part in kept)
    check_memory(trained, there)
    check_memory(trained, None)
    with pytest.raises(
        UserError, match=r"^the training keeps .* GB on each .* several --devices with --strategy"
    ) as caught:
        check_memory(trained, there - 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("optimizer", "decayed"), [("sgd", {1, 2}), ("adamw", {2}), ("lars", {2})])
def test_which_parameters_are_decayed(optimizer, decayed):
    groups = module(optimizer).configure_optimizer().param_groups
    assert {p.ndim for group in groups if group["weight_decay"] for p in group["params"]} == decayed
    assert sum(len(group["params"]) for group in groups) == len(list(module(optimizer).parameters()))


def test_schedule():
    """From a hundredth over the warm-up, then half a cosine to nothing."""
    assert [warmed_up(s, 100, 20) for s in (0, 20, 60, 100)] == pytest.approx([0.01, 1, 0.5, 0])
    assert warmed_up(10, 100, 20) == pytest.approx(0.505)
    assert warmed_up(30, 100, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)))


def test_seeds_of_steps_and_ranks_do_not_repeat():
    seeds = {step_seed(s, n, r) for s in range(3) for n in range(200) for r in (-1, 0, 1, 2)}
    assert len(seeds) == 3 * 200 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


class SameViews(nn.Module):
    """Each crop as it is; its gradient is kept."""

    count, plain = 3, 0

    def forward(self, images, generator, partners=None):
        self.drawn = [(images[:, v].float() / 255).requires_grad_() for v in range(self.count)]
        return self.drawn


@pytest.mark.parametrize(("splits", "reached"), [(1, set(range(8))), (2, {0, 1, 2, 3}), (3, {0, 1, 2})])
@pytest.mark.parametrize("method", [
    functools.partial(MoCo, queue=16), functools.partial(InfoMin, queue=16), functools.partial(NPID, images=8),
])  # fmt: skip
def test_split_statistics_keep_queries_apart(method, splits, reached):
    """A query's feature depends on its own part's images alone, as on so many devices; CLD sees all of the features."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.0625)
    chosen = method(encoder, online=2, splits=splits)
    views, seen = SameViews(), []
    views.count = chosen.views
    cld = CrossLevel(encoder.num_features, groups=4)
    cld.register_forward_hook(lambda _, features, out: seen.extend(features))
    trained = Pretrain(
        encoder, chosen, cld, views, steps=10, warmup_steps=0, optimizer="sgd", lr=0.1, weight_decay=0.0, seed=0
    )
    images = torch.randint(0, 256, (8, views.count, 3, 32, 32), dtype=torch.uint8)
    trained(Batch(images, torch.zeros(8, dtype=torch.long), torch.arange(8)))
    assert [len(features) for features in seen] == [8, 8]
    for v, features in enumerate(seen):
        slope = torch.autograd.grad(features[0].square().sum(), views.drawn[v], retain_graph=True)[0]
        assert set(slope.abs().amax((1, 2, 3)).nonzero().flatten().tolist()) == reached


def accumulated(encoder, method, cld, accumulate, steps=2):
    """A training of so many steps of 8 images; its logged losses."""
    views = Views("cifar", 16)
    views.count = method.views
    trained = Pretrain(
        encoder, method, cld, views, steps=10, warmup_steps=0, optimizer="sgd", lr=0.1, weight_decay=0.0, seed=0,
        accumulate=accumulate,
    )  # fmt: skip
    optimizer, losses = trained.configure_optimizer(), []
    for step in range(steps):
        images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
        batch = Batch(images, torch.zeros(8, dtype=torch.long), torch.arange(8), images.flip(3))
        trained.begin_step(optimizer)
        optimizer.zero_grad()
        updates = trained.gradients(batch, trained, torch.Tensor.backward)
        assert len(updates) == accumulate
        optimizer.step()
        trained.end_step(*updates)
        losses.append({name: float(value) for name, value in trained.losses.items()})
    return trained, losses


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_parts_of_a_batch_make_the_same_step_where_no_image_sees_another(accumulate):
    """A network without batch normalization, and a loss of each image by itself; parts may be of unequal size."""
    ends = []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        encoder = Encoder("test_vit", image_size=16)
        ends.append(accumulated(encoder, NPID(encoder, 8, out_features=8, online=2), None, parts))
    (whole, losses), (split, split_losses) = ends
    for expected, found in zip(losses, split_losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for (name, a), b in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)


def test_groups_and_keys_of_a_batch_in_parts():
    """CLD compares a part, the mean of whose losses is logged; the queue has the keys of all."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", small_images=True, width=0.0625)
    cld, seen = CrossLevel(encoder.num_features, groups=2), []
    cld.register_forward_hook(lambda _, features, loss: seen.append((len(features[0]), float(loss.detach()))))
    method = MoCo(encoder, queue=16, online=2)
    before = method.negatives.keys.clone()
    trained, ((losses),) = accumulated(encoder, method, cld, 2, steps=1)
    assert [count for count, _ in seen] == [4, 4]
    assert losses["group_loss"] == pytest.approx(cld.weight * sum(loss for _, loss in seen) / 2, rel=1e-5)
    assert losses["loss"] == pytest.approx(losses["instance_loss"] + losses["group_loss"], rel=1e-5)
    changed = (trained.method.negatives.keys != before).any(1)
    assert changed.tolist() == 8 * [True] + 8 * [False]
    assert trained.step == 1


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_a_synchronized_network_computes_the_same(name, on_gpu):
    """timm's normalizations with an activation inside keep it; what needs a GPU is only torch's way to train them."""
    torch.manual_seed(0)
    network = nn.ModuleList([Encoder(name)]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, _BatchNorm):
                norm.running_mean.normal_()
        before, keys = network[0](images), list(network.state_dict())
        synchronize(network, on_gpu)
        torch.testing.assert_close(network[0](images), before, rtol=1e-4, atol=1e-5)
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == {"efficientnet_b0": 49, "resnet18": 20}[name]
    assert all(isinstance(norm, nn.SyncBatchNorm if on_gpu else SyncBatchNorm) for norm in norms)
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_unknown_batch_normalization_is_named(on_gpu):
    class Strange(BatchNormAct2d):
        """Does more."""

    network = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.Sequential(Strange(3))})
    with pytest.raises(ValueError, match=r"cannot convert b\.0, a Strange: leave it out"):
        synchronize(network, on_gpu)
    assert type(network["a"]) is nn.BatchNorm2d


@pytest.mark.parametrize(("free", "there"), [(4 * 768, True), (4 * 768 - 4, False)])
def test_images_in_memory_go_to_a_gpu_that_has_four_times_their_room(monkeypatch, free, there):
    class Sent(InMemoryImages):
        def on(self, device):
            return elsewhere

    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images, elsewhere = (kind(pixels, list("abcd")) for kind in (Sent, InMemoryImages))
    batches = TrainBatches(images, 2, seed=0, bad_files=BadFiles())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    hold_images(batches, torch.device("cpu"))
    assert batches.images is images
    hold_images(batches, torch.device("cuda"))
    assert (batches.images is elsewhere) == there
