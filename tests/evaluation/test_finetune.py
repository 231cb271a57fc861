"""Classifiers trained on images: PyTorch's plain loop, whole after a kill, with the labels that were asked for."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from finetune_samples import CLASSES, drawn
from PIL import Image
from run_samples import watching_encoders

from crosslevel import Encoder
from crosslevel.data.bad_files import BadFiles
from crosslevel.data.open import open_images
from crosslevel.evaluation.finetune import (
    FineTune,
    Semi,
    fine_tuned,
    new_classifier,
    on_views,
)
from crosslevel.evaluation.linear import Linear
from crosslevel.features.extract import Runtime
from crosslevel.models.encoder import View
from crosslevel.utils.device import choose

PLACE = Runtime(choose("cpu", "fp32"), workers=0, batch_size=32)
SHORT = FineTune(epochs=4, batch_size=8, lr=0.02, lr_classifier=0.3, weight_decay=1e-3)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625, zero_init_last=True)  # in which rounding grows least
    encoder.view = View(16)
    return encoder


def tuned(encoder, source, queries, config, **more):
    scores, labels = fine_tuned(encoder, source, 4, queries, config, PLACE, BadFiles(), **more)
    assert torch.equal(labels, queries.labels)
    return scores


def accuracy(scores, source):
    return float((scores.argmax(1) == source.labels).double().mean())


def kept(run_dir):
    """All that a training has changed."""
    (file,) = (run_dir / "probe").rglob("last.ckpt")
    return torch.load(file)["modules"]


class Killed(BaseException):
    """What no handler of errors catches."""


def killed_after(epochs):
    def progress(done, of):
        if done == epochs:
            raise Killed

    return progress


def normalized(source):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (source.data / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_it_is_pytorchs_plain_loop(encoder, schedule):
    """Crops and flips of one colour are that colour: so all images in one batch are the same in any order."""
    source, queries = drawn(24, 0, noise=0), drawn(12, 5, noise=0)
    config = FineTune(5, 24, lr=0.02, lr_classifier=0.5, weight_decay=0.01, schedule=schedule)
    found = tuned(encoder, source, queries, config, seed=3)

    network, classifier = copy.deepcopy(encoder).train(), torch.nn.Linear(encoder.num_features, 4)
    classifier.load_state_dict(new_classifier(encoder.num_features, 4, 3).state_dict())
    groups = [{"params": network.parameters(), "lr": 0.02}, {"params": classifier.parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
    factors = {"step": [1, 1, 1, 0.1, 0.01], "cosine": [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]}
    for factor in factors[schedule]:
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02 * factor, 0.5 * factor
        optimizer.zero_grad()
        F.cross_entropy(classifier(network(normalized(source))), source.labels).backward()
        optimizer.step()
    with torch.no_grad():
        expected = classifier(network.eval()(normalized(queries)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_easy_problem_is_learnt_and_only_by_learning(encoder):
    source, queries = drawn(96, 0), drawn(80, 5)
    config, still = FineTune(12, 16, lr=0.05, lr_classifier=0.2), FineTune(12, 16, lr=0.0, lr_classifier=0.0)
    assert accuracy(tuned(encoder, source, queries, config), queries) > 0.9
    assert accuracy(tuned(encoder, source, queries, still), queries) < 0.55


def test_the_given_encoder_stays_as_it_is(encoder):
    before, modes = copy.deepcopy(encoder.state_dict()), [m.training for m in encoder.modules()]
    tuned(encoder, drawn(24, 0), drawn(8, 5), SHORT)
    on_views(encoder, drawn(24, 0), 4, Linear(epochs=2, batch_size=8), PLACE, BadFiles())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert [m.training for m in encoder.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize(("lr", "lr_classifier"), [(0.0, 0.2), (0.05, 0.0), (0.05, 0.2)])
def test_each_part_has_its_own_rate(encoder, tmp_path, lr, lr_classifier):
    """At rate 0 nothing is learnt; a network in training still follows the batches' statistics."""
    config = FineTune(2, 8, lr, lr_classifier, weight_decay=0.1)
    tuned(encoder, drawn(24, 0), drawn(8, 5), config, run_dir=tmp_path, seed=2)
    state, start = kept(tmp_path), {f"0.{k}": v for k, v in encoder.state_dict().items()}
    for name, value in new_classifier(encoder.num_features, 4, 2).state_dict().items():
        assert torch.equal(state[f"1.{name}"], value) == (lr_classifier == 0)
    for name, _ in encoder.named_parameters():
        assert torch.equal(state[f"0.{name}"], start[f"0.{name}"]) == (lr == 0)
    means = [name for name in start if name.endswith("running_mean")]
    assert means
    assert not any(torch.equal(state[name], start[name]) for name in means)


def files(folder, source):
    """The same pictures as files."""
    for path, pixels, c in zip(source.paths, source.data, source.labels.tolist(), strict=True):
        (folder / f"{c} {CLASSES[c]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{c} {CLASSES[c]}" / path)
    return open_images(folder)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_training_continues_to_exactly_the_same_scores(encoder, tmp_path, epochs, streamed):
    source, queries = drawn(20, 0), drawn(8, 5)
    source = files(tmp_path / "photos", source) if streamed else source
    whole = tuned(encoder, source, queries, SHORT)
    run_dir, told = tmp_path / "run", []
    with pytest.raises(Killed):
        tuned(encoder, source, queries, SHORT, run_dir=run_dir, progress=killed_after(epochs))
    continued = tuned(encoder, source, queries, SHORT, run_dir=run_dir, progress=lambda *done: told.append(done))
    assert told == [(done, 4) for done in range(epochs + 1, 5)]
    assert torch.equal(continued, whole)


def test_a_kill_within_an_epoch_costs_that_epoch_alone(encoder, tmp_path):
    source, queries = drawn(24, 0), drawn(8, 5)
    whole, steps = tuned(encoder, source, queries, SHORT), []

    def dying(network, views):
        steps.append(network.training)
        if len(steps) == 8:  # the second of three steps of the third epoch
            raise Killed

    with watching_encoders(dying):
        with pytest.raises(Killed):
            tuned(encoder, source, queries, SHORT, run_dir=tmp_path)
        assert torch.equal(tuned(encoder, source, queries, SHORT, run_dir=tmp_path), whole)
    assert sum(steps[8:]) == 6
    del steps[8:]
    assert torch.equal(tuned(encoder, source, queries, SHORT, run_dir=tmp_path), whole)
    assert not any(steps[8:])  # a training that is done is not done again


def test_another_training_is_not_continued(encoder, tmp_path):
    source, queries = drawn(16, 0), drawn(8, 5)
    with pytest.raises(Killed):
        tuned(encoder, source, queries, SHORT, run_dir=tmp_path, key={"of": "a"}, progress=killed_after(2))
    for other in ({"config": FineTune(4, 8, 0.02, 0.31, 1e-3)}, {"seed": 1}, {"key": {"of": "b"}}):
        told = []
        options = {"config": SHORT, "key": {"of": "a"}, "progress": lambda *done, told=told: told.append(done)} | other
        found = tuned(encoder, source, queries, run_dir=tmp_path, **options)
        assert told[0] == (1, 4)
        assert torch.equal(found, tuned(encoder, source, queries, options["config"], seed=options.get("seed", 0)))


def test_files_that_cannot_be_read_are_named_and_do_not_stop_it(encoder, tmp_path):
    source, bad_files = files(tmp_path / "photos", drawn(20, 0)), BadFiles()
    (tmp_path / "photos" / "0 red" / "000.png").write_bytes(b"")
    queries = files(tmp_path / "test", drawn(12, 5))
    (tmp_path / "test" / "3 olive" / "003.png").write_bytes(b"")
    scores, labels = fine_tuned(encoder, source, 4, queries, SHORT, PLACE, bad_files)
    assert bad_files.reasons == {"0 red/000.png": "empty file", "3 olive/003.png": "empty file"}
    assert scores.shape == (11, 4)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("rates", [(1e20, 0.1), (0.1, 1e38)])
def test_a_loss_that_is_no_number_is_one_clear_error(encoder, tmp_path, rates):
    config = FineTune(3, 8, *rates)
    for _ in range(2):  # nothing of it is kept that a second call would begin with
        with pytest.raises(ValueError, match=r"no longer a number in epoch 1: lower the learning rates") as error:
            tuned(encoder, drawn(24, 0), drawn(8, 5), config, run_dir=tmp_path)
        assert "\n" not in str(error.value)
        assert all(f"{rate:g}" in str(error.value) for rate in rates)


def test_a_last_step_that_leaves_no_numbers_is_the_same_error(encoder):
    """The one loss of this training is fine, and what it leaves is not."""
    with pytest.raises(ValueError, match="lower the learning rates"):
        tuned(encoder, drawn(8, 0), drawn(8, 5), FineTune(1, 8, 1e6, 0.1))


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_classifier_on_views_is_pytorchs_plain_loop(encoder, schedule):
    """Of one colour, all views of an image have the features of the image."""
    source = drawn(24, 0, noise=0)
    config = Linear(epochs=5, batch_size=24, lr=3.0, weight_decay=0.01, schedule=schedule)
    found = on_views(encoder, source, 4, config, PLACE, BadFiles(), seed=3)

    with torch.no_grad():
        features = copy.deepcopy(encoder).eval()(normalized(source))
    classifier = new_classifier(encoder.num_features, 4, 3)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=3.0, momentum=0.9, weight_decay=0.01)
    factors = {"step": [1, 1, 1, 0.1, 0.01], "cosine": [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]}
    for factor in factors[schedule]:
        optimizer.param_groups[0]["lr"] = 3.0 * factor
        optimizer.zero_grad()
        F.cross_entropy(classifier(features), source.labels).backward()
        optimizer.step()
    torch.testing.assert_close(found.weight, classifier.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bias, classifier.bias, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.weight, new_classifier(encoder.num_features, 4, 3).weight, atol=1e-3)


def test_on_views_the_encoder_and_its_batch_statistics_do_not_move(encoder):
    seen, before = [], encoder.state_dict()

    def watched(network, views, features):
        moved = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
        seen.append((moved, network.training, features.requires_grad))

    config = Linear(epochs=3, batch_size=8, lr=1.0)
    with watching_encoders(after=watched):
        classifier = on_views(encoder, drawn(24, 0), 4, config, PLACE, BadFiles(), seed=1)
    assert seen == 9 * [([], False, False)]
    assert not torch.equal(classifier.weight, new_classifier(encoder.num_features, 4, 1).weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(encoder, frozen):
    source, shown = drawn(24, 0, noise=0), []
    colours = normalized(source)[:, :, 0, 0]
    assert len(colours.unique(dim=0)) == 24

    def watched(network, views):
        shown.extend(torch.cdist(views[:, :, 8, 8], colours).argmin(1).tolist())

    with watching_encoders(watched):
        if frozen:
            on_views(encoder, source, 4, Linear(epochs=4, batch_size=8), PLACE, BadFiles(), seed=1)
        else:
            tuned(encoder, source, drawn(8, 5), SHORT, seed=1)
    epochs = [tuple(shown[first : first + 24]) for first in range(0, 96, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_views_of_a_frozen_encoder_teach_a_classifier(encoder):
    source, queries = drawn(96, 0, noise=10), drawn(80, 5, noise=10)
    still, taught = (
        on_views(encoder, source, 4, Linear(epochs=20, batch_size=16, lr=lr), PLACE, BadFiles()) for lr in (0.0, 10.0)
    )
    with torch.no_grad():
        features = copy.deepcopy(encoder).eval()(normalized(queries))
        assert accuracy(taught(features), queries) > 0.8
        assert accuracy(still(features), queries) < 0.5


def test_a_killed_classifier_on_views_continues_to_exactly_the_same(encoder, tmp_path):
    source, config, told = drawn(24, 0), Linear(epochs=4, batch_size=8, lr=3.0), []
    call = (encoder, source, 4, config, PLACE, BadFiles())
    whole = on_views(*call)
    with pytest.raises(Killed):
        on_views(*call, run_dir=tmp_path, progress=killed_after(2))
    continued = on_views(*call, run_dir=tmp_path, progress=lambda *done: told.append(done))
    assert told == [(3, 4), (4, 4)]
    assert torch.equal(continued.weight, whole.weight)
    assert torch.equal(continued.bias, whole.bias)


def test_a_new_classifier_is_the_seeds_and_mocos():
    first = new_classifier(512, 40, 7).requires_grad_(False)
    torch.manual_seed(99)
    assert torch.equal(new_classifier(512, 40, 7).weight, first.weight)
    assert not torch.equal(new_classifier(512, 40, 8).weight, first.weight)
    assert first.weight.shape == (40, 512)
    assert float(first.weight.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(first.weight.mean())) < 3e-4
    assert not first.bias.any()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (FineTune, {"epochs": 0}, "epochs=0"),
        (FineTune, {"batch_size": 1}, "batch_size=1"),
        (FineTune, {"schedule": "steps"}, "schedule='steps'"),
        (Semi, {"fractions": ()}, r"semi\.fractions=\(\)"),
        (Semi, {"fractions": (0.1, 1.5)}, r"fractions=\(0\.1, 1\.5\)"),
        (Semi, {"fractions": (0.0,)}, r"fractions=\(0\.0,\)"),
        (Semi, {"epochs": 0}, "epochs=0"),
    ],
)
def test_wrong_settings_are_named(kind, options, said):
    with pytest.raises(ValueError, match=said):
        kind(**options)
