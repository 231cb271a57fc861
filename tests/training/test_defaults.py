"""The rules at their edges: whatever the collection, what they choose can be trained with."""

import inspect
import itertools
import math

import pytest

from crosslevel.methods import SimCLR, VICReg
from crosslevel.training import defaults
from crosslevel.training.plan import Choices
from crosslevel.transforms.views import Views

IMAGES = (2, 50, 500, 5_000, 1_000_000)
BATCHES = (8, 32, 256, 4_096)
STEPS = (1, 10, 1_000, 1_000_000)


def test_no_rule_reads_a_label_or_a_name():
    """They are functions of numbers, a device and an optimizer."""
    rules = [f for _, f in inspect.getmembers(defaults, inspect.isfunction) if f.__module__ == defaults.__name__]
    names = {name for rule in rules for name in inspect.signature(rule).parameters}
    known = {"images", "epochs", "devices", "device", "minutes", "images_a_second", "optimizer", "sgd_rate", "batch"}
    # The network: whether it starts from weights, and its family; the method: the optimizer it prefers.
    known |= {"pretrained", "modern", "preferred"}
    known |= {"size", "requested"}  # images of a batch: of all that there are, and as many as were asked for
    assert len(rules) >= 9
    assert names <= known | {"steps", "view"}


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_fits_the_images(images, device, devices):
    for epochs in (1 / images, 0.5, 1, 10, 400):
        size = defaults.batch_size(images, epochs, devices, device).value
        assert size == 2 or size * devices <= images
        assert 2 <= size <= 256
        # An epoch is more than a step or two wherever there are images enough for batches of 16.
        assert images < 64 * devices or images // (size * devices) >= 4 or size == 16


def test_a_batch_grows_with_the_images_that_are_seen():
    sizes = [defaults.batch_size(1_000_000, seen / 1_000_000).value for seen in (1e3, 2e4, 5e4, 1e5, 3e5, 1e8)]
    assert sizes == sorted(sizes)
    assert (sizes[2], sizes[-1]) == (128, 256)
    assert defaults.batch_size(1_000_000, 0.001, device="cuda").value == 128


@pytest.mark.parametrize("images", IMAGES)
def test_fewer_images_are_seen_more_often(images):
    chosen = defaults.epochs(images).value
    assert 20 <= chosen <= 400
    assert chosen >= defaults.epochs(10 * images).value
    assert defaults.epochs(50_000).value == 100


def test_minutes_are_kept():
    """Never more steps than there is time for, whole epochs where one fits, and never none."""
    for minutes, rate, images in itertools.product((0.01, 1, 60, 6_000), (0.5, 900, 30_000), IMAGES):
        epochs = defaults.affordable_epochs(minutes, rate, images).value
        assert 0 < epochs * images / rate <= 60 * minutes
        assert epochs < 1 or epochs == int(epochs)
    assert defaults.affordable_epochs(10, 1_000, 50_000).value == 10
    with pytest.raises(ValueError, match="minutes=0 must be positive"):
        defaults.affordable_epochs(0, 1.0, 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_rate_is_in_proportion_to_the_batch(optimizer, batch):
    once, twice = (defaults.learning_rate(optimizer, 0.5, b).value for b in (batch, 2 * batch))
    assert twice == pytest.approx(2 * once)
    assert defaults.weight_decay(optimizer).value > 0


def test_the_optimizer_is_that_of_the_network_or_else_of_the_method():
    assert [defaults.optimizer(modern, VICReg.usual_optimizer).value for modern in (False, True)] == ["lars", "adamw"]
    assert [defaults.optimizer(modern, SimCLR.usual_optimizer).value for modern in (False, True)] == ["sgd", "adamw"]


def test_only_sgds_rate_is_the_methods():
    assert defaults.learning_rate("sgd", 0.06, 256).value == 0.06
    assert defaults.learning_rate("adamw", 0.06, 256).value == 1e-3


@pytest.mark.parametrize("epochs", [0.01, 1, 8, 100, 1_000])
def test_the_warmup_is_a_part_of_the_run(epochs):
    assert 0 < defaults.warmup_epochs(epochs).value <= min(5, epochs / 10)


@pytest.mark.parametrize("steps", STEPS)
def test_the_average_spans_a_part_of_the_run(steps):
    """The published 0.999 where runs are as long as the published ones; at 1,000 steps it would average all of them."""
    value = defaults.momentum(steps).value
    assert 0.9 <= value <= 0.999
    if 300 <= steps <= 30_000:
        assert 1 / (1 - value) == pytest.approx(steps / 30)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_queue_is_a_share_of_the_collection(images, batch):
    """At most a quarter of the images, in whole batches; in tiny collections what one batch needs, never all."""
    batch = min(batch, images)
    size = defaults.queue(images, batch).value
    assert 1 <= size <= 4096
    assert size < images
    if images >= 4 * batch:
        assert size <= images / 4
        assert size % batch == 0 or size == 4096
    assert defaults.queue(None, batch).value == 4096


@pytest.mark.parametrize("batch", [2, *BATCHES])
def test_groups_fit_the_batch(batch):
    assert 2 <= defaults.groups(batch).value <= batch


@pytest.mark.parametrize("view", [8, 32, 64, 96, 224, 512])
def test_views_are_blurred_where_there_are_pixels_to_blur(view):
    assert defaults.preset(view).value == ("cifar" if view <= 64 else "mocov2")


def test_small_views_have_larger_crops_unless_some_are_given():
    assert str(defaults.crop_scale(32)).startswith("--views.scale [0.4,1.0]: of 32 pixels")
    chosen, given = Views(), Views(scale=(0.3, 0.9))
    for views in (chosen, given):
        views.choose("cifar", scale=defaults.crop_scale(32).value)
    assert (chosen.augments[0].scale, chosen.arguments()["scale"]) == ((0.4, 1.0), (0.4, 1.0))
    assert (given.augments[0].scale, given.arguments()["scale"]) == ((0.3, 0.9), (0.3, 0.9))
    assert Views("cifar").augments[0].scale == (0.2, 1.0)


@pytest.mark.parametrize(("epochs", "share"), [(1e-3, 0), (8, 0), (19.9, 0), (20, 0.5), (200, 0.5), (1e5, 0.5)])
def test_views_are_mirrored_in_long_trainings_unless_told(epochs, share):
    assert defaults.flip(epochs).value == share
    for given, expected in ((None, share), (0.25, 0.25)):
        views = Views(flip=given)
        views.choose("cifar", flip=defaults.flip(epochs).value)
        assert (views.augments[0].flip, views.arguments()["flip"]) == (expected, expected)


@pytest.mark.parametrize(
    ("images", "held"), [(2, 0), (50, 0), (999, 0), (1000, 50), (5000, 250), (10_000, 500), (1_000_000, 500)]
)
def test_few_images_are_held_out(images, held):
    assert defaults.hold_out(images).value == held


def test_what_was_given_is_kept_and_what_was_not_is_told():
    rules = Choices()
    assert rules(17, defaults.epochs(500)) == 17
    assert rules.choices == []
    chosen = rules(None, defaults.epochs(500))
    assert (chosen, [choice.value for choice in rules.choices]) == (400, [400])
    assert str(rules.choices[0]).startswith("--epochs 400: of 500 images")
    assert math.isclose(float(str(defaults.momentum(1_000)).split()[1][:-1]), 0.97)


@pytest.mark.parametrize("epochs", [1e-3, 1.0, 20.0, 400.0, 1e5])
def test_what_depends_on_time_is_the_published_share_of_the_run(epochs):
    """400 of 2,000 epochs, 15 of 200, 30 of 300, and 500, 10 and 20 of 1,000; a span has an epoch or more."""
    assert defaults.temperature_period(epochs).value == pytest.approx(epochs * 400 / 2000)
    assert defaults.queue_start(epochs).value == pytest.approx(epochs * 15 / 200)
    assert defaults.teacher_warmup(epochs).value == pytest.approx(epochs * 30 / 300)
    found = {choice.setting: choice.value for choice in defaults.harmonization(epochs)}
    assert found == {
        "gh.warmup_epochs": pytest.approx(epochs * 500 / 1000),
        "gh.ramp_epochs": pytest.approx(epochs * 10 / 1000),
        "gh.update_epochs": pytest.approx(max(1.0, epochs * 20 / 1000)),
    }
