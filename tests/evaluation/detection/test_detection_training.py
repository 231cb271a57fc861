"""The encoder's weights in torchvision's detector, and a training that continues."""

import numpy as np
import pytest
import torch
from detection_samples import CPU, SMALL, annotated_copy, narrow

from crosslevel.data.bad_files import BadFiles
from crosslevel.evaluation.detection.benchmark import published
from crosslevel.evaluation.detection.model import detector
from crosslevel.evaluation.detection.training import (
    Checkpoint,
    Schedule,
    TrainingData,
    fine_tune,
    own_random_numbers,
    reseed,
)
from crosslevel.models.encoder import Encoder


@torch.no_grad()
@pytest.mark.parametrize(("name", "small", "width"), [("resnet18", True, 0.125), ("resnet50", False, 0.25)])
def test_the_detector_computes_what_the_encoder_computes(name, small, width):
    torch.manual_seed(0)
    encoder = Encoder(name, small, width).eval()
    images = torch.randn(2, 3, 96, 96)
    maps = encoder.backbone.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    c4, fpn = (detector(encoder, 3, kind, sizes=SMALL).eval() for kind in ("c4", "fpn"))
    torch.testing.assert_close(c4.backbone(images), maps[2])
    expected = encoder.backbone.layer4(maps[2])
    # The normalization after conv5 is new: its statistics are still 0 and 1.
    expected = (expected / np.sqrt(1 + 1e-5)).mean((2, 3))
    torch.testing.assert_close(c4.roi_heads.box_head(maps[2]), expected)
    for level, found in zip(maps, fpn.backbone.body(images).values(), strict=True):
        torch.testing.assert_close(found, level)
    stride = 96 // maps[2].shape[-1]
    assert c4.rpn.anchor_generator.sizes == (tuple(n * stride for n in (2, 4, 8, 16, 32)),)
    assert c4.transform.image_mean == list(encoder.view.mean)


def test_a_usual_stem_gets_the_published_anchors():
    kinds = [detector(Encoder("resnet18", False), 20, kind).rpn.anchor_generator.sizes for kind in ("c4", "fpn")]
    assert kinds == [((32, 64, 128, 256, 512),), ((32,), (64,), (128,), (256,), (512,))]


@pytest.mark.parametrize("kind", ["c4", "fpn"])
@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_a_step_changes_all_weights_but_frozen_normalizations(shapes, kind, batchnorm):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.125, zero_init_last=False)
    reseed(0)
    model = detector(encoder, 3, kind, sizes=SMALL, regions=8, batchnorm=batchnorm)
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "BatchNorm" in type(module).__name__
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert len(norms) >= 4 * 20
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(model, shapes[0], Schedule(1, 4, 2.0))
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same == (norms if batchnorm == "frozen" else set())


def step(model, images, schedule, checkpoint=None, show=lambda done, loss: None):
    data = TrainingData(images, schedule.batch_size, 0, 1, BadFiles())
    kept = checkpoint or Checkpoint(None, "", 0)
    fine_tune(model, data, schedule, name="x", seed=0, device=CPU.device, checkpoint=kept, show=show)


def test_a_killed_training_ends_as_an_uninterrupted_one(shapes, tmp_path):
    schedule = Schedule(5, 2, 0.1)

    def model():
        reseed(0)
        return detector(narrow(), 3, sizes=SMALL, regions=8)

    whole, killed = model(), model()
    step(whole, shapes[0], schedule)

    def stop(done, loss):
        if done == 4:
            raise KeyboardInterrupt

    file = tmp_path / "x.ckpt"
    with pytest.raises(KeyboardInterrupt):
        step(killed, shapes[0], schedule, Checkpoint(file, "key", 0), stop)
    seen = []
    continued = model()
    torch.rand(7)  # what is random is drawn from the seed, whatever was drawn before
    step(continued, shapes[0], schedule, Checkpoint(file, "key", 0), lambda done, loss: seen.append(done))
    assert seen == [4, 5]
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in continued.state_dict().items())
    optimizer = torch.optim.SGD(whole.parameters(), 1.0)
    assert Checkpoint(file, "another", 0).restore(whole, optimizer) == 0


def test_the_caller_s_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    with own_random_numbers(CPU.device):
        reseed(1, 2)
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    reseed(1, 2)
    assert torch.equal(torch.rand(3), first)


def test_every_epoch_has_every_image_once(shapes):
    data = TrainingData(shapes[0], 30, 5, 1, BadFiles())
    places = data.index_batches(0)
    order = [place for _ in range(10) for place in next(places)]
    for epoch in range(3):
        assert sorted(order[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert order[:100] != order[100:200]
    assert next(data.index_batches(7)) == order[210:240]


def test_the_schedule_is_the_published_one(shapes):
    voc = published(shapes[0]).schedule
    assert (voc.iterations, voc.batch_size) == (24_000, 16)
    rates = [voc.at(n) for n in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    # detectron2: a linear rise from a thousandth, over 100 iterations
    rise = 0.02 * (0.001 + 0.999 / 2)
    assert rates == pytest.approx([0.02e-3, rise, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    short = Schedule(240, 8)
    assert [short.at(n) for n in (24, 179, 180, 220)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])
    crowds = annotated_copy(shapes[0], ignored="crowd")
    coco = published(crowds)
    assert [coco.schedule.at(n) for n in (119_999, 120_000, 160_000)] == pytest.approx([0.02, 0.002, 0.0002])
    assert coco.sizes.train[0] == 640
