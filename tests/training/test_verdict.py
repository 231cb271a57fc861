"""The line at the end of a run, against plain NumPy."""

import numpy as np
import pytest
import torch

from crosslevel.data.images import InMemoryImages
from crosslevel.features.extract import pixels
from crosslevel.models.encoder import Encoder, View
from crosslevel.training.monitor import labelled_split, queries_and_keys
from crosslevel.training.verdict import Verdict, verdict
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

CPU = choose("cpu", "fp32")


def bits(*shares, count=400):
    """Booleans of which the first share is true: the more there are, the more they share."""
    return [torch.arange(count) < share * count for share in shares]


def photographs(count=120, labels=True):
    """Noise around one of four colours, which is the class."""
    draws = torch.Generator().manual_seed(0)
    classes = torch.arange(count) % 4
    colours = torch.randint(60, 200, (4, 3, 1, 1), generator=draws)
    data = (colours[classes] + torch.randint(-50, 50, (count, 3, 16, 16), generator=draws)).to(torch.uint8)
    names = [f"{i}.png" for i in range(count)]
    return InMemoryImages(data, names, classes if labels else None, list("abcd") if labels else None, "photographs")


def small_encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    return encoder.eval()


def test_a_clear_gain_is_named_with_its_interval():
    trained, pixels, untrained = bits(0.6, 0.4, 0.2)
    line = Verdict(trained, pixels, untrained, "kNN accuracy").line()
    gain = trained.double().numpy() - pixels.double().numpy()
    margin = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
    assert line.startswith("kNN accuracy: trained 60.0 %, raw pixels 40.0 %, untrained 20.0 %")
    assert f"worth 20.0 (±{100 * margin:.1f}) points over raw pixels" in line


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (0.8, "is worth 20.0 (±{margin:.1f}) points over the weights that it began with"),
        (0.6, "is not clearly above the weights that it began with (+0.0 ±{margin:.1f})"),
        (0.4, "is below the weights that it began with (-20.0 ±{margin:.1f})"),
    ],
)
def test_a_training_from_weights_has_to_be_better_than_these(trained, said):
    """Also where it is far better than raw pixels and the untrained network."""
    trained, pixels, untrained, start = bits(trained, 0.2, 0.3, 0.6)
    found = Verdict(trained, pixels, untrained, "kNN accuracy", start)
    gain = trained.double().numpy() - start.double().numpy()
    said = said.format(margin=196 * gain.std(ddof=1) / np.sqrt(len(gain)))
    share = 100 * float(trained.double().mean())
    shares = f"kNN accuracy: trained {share:.1f} %, start (frozen) 60.0 %, raw pixels 20.0 %, untrained 30.0 %"
    assert found.line().startswith(f"{shares}: the training {said}")
    assert found.headline().startswith(f"The training {said}. {shares}.")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.30, 0.40, 0.20), "the training is below raw pixels (-10.0"),
        ((0.401, 0.20, 0.40), "the training is not clearly above the untrained network (+0.2"),
        ((0.40, 0.40, 0.40), "the training is not clearly above raw pixels (+0.0"),
    ],
)
def test_what_is_not_clearly_better_is_said_with_what_to_do(shares, said):
    line = Verdict(*bits(*shares), "kNN accuracy").line()
    assert said in line
    assert "--epochs" in line
    assert "worth" not in line


def test_labels_judge_where_there_are_some():
    """Raw pixels by a kNN in NumPy on the same images."""
    images = photographs()
    found = verdict(small_encoder(), images, CPU, seed=3)
    queries, others = queries_and_keys(images, 3)
    flat = images.data.flatten(1).numpy() / 127.5 - 1
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    cosine, labels = unit[queries] @ unit[others].T, images.labels.numpy()
    k, right = min(200, len(images) // 10), []
    for row, query in zip(cosine, queries.tolist(), strict=True):
        nearest = np.argsort(-row)[:k]
        votes = np.bincount(labels[others][nearest], np.exp(row[nearest] / 0.1), minlength=4)
        right.append(votes.argmax() == labels[query])
    assert found.pixels.tolist() == right
    assert "by the labels of 20 images trained on" in found.measure
    assert len(found.trained) == len(found.untrained) == 20


def test_views_judge_where_there_are_no_labels():
    """Whose one view has the other for its nearest: raw pixels in NumPy, on views drawn from the same seed."""
    images = photographs(labels=False)
    images.tracks = torch.arange(len(images)) // 2
    found = verdict(small_encoder(), images, CPU, seed=3)
    shown = [v.flatten(1).numpy() for v in Views("cifar", 16)(images.data, torch.Generator().manual_seed(3))]
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in shown)
    cosine = a @ b.T
    own = images.tracks.numpy()
    cosine[(own[:, None] == own) & ~np.eye(len(own), dtype=bool)] = -np.inf
    assert found.pixels.tolist() == (cosine.argmax(1) == np.arange(len(own))).tolist()
    assert "whose other view is the nearest" in found.measure


@pytest.mark.parametrize("labels", [True, False])
def test_the_start_is_judged_as_the_trained_encoder_is(labels):
    images, encoder, start = photographs(60, labels), small_encoder(), small_encoder()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = verdict(encoder, images, CPU, seed=3, start=start)
    assert found.start.tolist() == verdict(start, images, CPU, seed=3).trained.tolist()
    assert not torch.equal(found.start, found.trained)


def test_the_networks_stay_as_they_are():
    encoder = small_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    verdict(encoder, photographs(), CPU, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_one_track_count_as_one_draw():
    """By the variance of the tracks' means, where each has as many images; copies do not narrow the interval."""
    trained, pixels, untrained = bits(0.6, 0.4, 0.2, count=40)
    alone = Verdict(trained, pixels, untrained, "x").line()
    tenfold = [kind.repeat_interleave(10) for kind in (trained, pixels, untrained)]
    tracks = torch.arange(40).repeat_interleave(10)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    copies = Verdict(*(kind[shuffled] for kind in tenfold), "x", tracks=7 * tracks[shuffled] + 3)
    margin = 1.96 * (trained.double() - pixels.double()).numpy().std(ddof=1) / np.sqrt(40)
    assert copies.line() == alone
    assert f"(±{100 * margin:.1f})" in alone
    assert f"(±{100 * margin:.1f})" not in Verdict(*tenfold, "x").line()


def test_tracks_of_the_source_are_those_of_the_verdict():
    images = photographs()
    images.tracks = torch.arange(len(images)) // 4
    found = verdict(small_encoder(), images, CPU, seed=3)
    queries, _ = queries_and_keys(images, 3)
    assert found.tracks.tolist() == images.tracks[queries].tolist()


def test_labels_of_one_class_judge_nothing():
    images = photographs()
    images.labels = torch.zeros(len(images), dtype=torch.int64)
    assert "whose other view is the nearest" in verdict(small_encoder(), images, CPU, seed=3).measure


def test_raw_pixels_of_large_views_are_judged_small():
    """As in `evaluate`: thousands of images of 224 pixels would take gigabytes."""
    draws = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (80, 3, 48, 48), generator=draws, dtype=torch.uint8)
    images = InMemoryImages(data, [f"{i}.png" for i in range(80)], torch.arange(80) % 2, ["a", "b"], "noise")
    encoder, split = small_encoder(), labelled_split(images, 3)
    encoder.view = View(48)
    right = {size: split.right(pixels(split.part, size)).tolist() for size in (32, 48)}
    assert verdict(encoder, images, CPU, seed=3).pixels.tolist() == right[32] != right[48]


def test_too_few_images_have_no_verdict():
    assert verdict(small_encoder(), photographs(20), CPU, seed=0) is None
