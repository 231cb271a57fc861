"""Linear classifiers: the batched sweep against one at a time, PyTorch's optimizer and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegressionCV

from crosslevel.evaluation.linear import Linear, choose, held_out, train_sweep

SETTINGS = [(0.03, 1e-3), (0.3, 0.0), (0.1, 0.1)]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed, count, classes=5, size=12, noise=1.0):
    """Overlapping clouds, of dimensions that differ in scale and are correlated."""
    centres, mixing = torch.randn(classes, size, generator=draws(1)), torch.randn(size, size, generator=draws(2))
    labels = torch.randint(classes, (count,), generator=draws(seed))
    features = centres[labels] + noise * torch.randn(count, size, generator=draws(seed + 1))
    return 3 + (features @ mixing) * torch.logspace(-2, 2, size), labels


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6), batch=st.integers(3, 70))
@settings(max_examples=25)
def test_settings_trained_together_are_those_trained_alone(seed, classes, batch):
    features, labels = problem(seed, 60, classes)
    features = features.double()
    together = train_sweep(features, labels, classes, SETTINGS, epochs=3, batch_size=batch, generator=draws(seed))
    for s, setting in enumerate(SETTINGS):
        alone = train_sweep(features, labels, classes, [setting], epochs=3, batch_size=batch, generator=draws(seed))
        torch.testing.assert_close(together.weight[:, s], alone.weight[:, 0])
        torch.testing.assert_close(together.bias[s], alone.bias[0])
        torch.testing.assert_close(together.scores(features)[:, s], alone.scores(features)[:, 0])


@given(seed=st.integers(0, 1000), rate=st.floats(0.001, 0.5), decay=st.floats(0, 0.2))
@settings(max_examples=25)
def test_a_step_is_pytorchs(seed, rate, decay):
    """SGD with Nesterov momentum, the weights decayed and the bias not, the rate along a cosine."""
    features, labels = problem(seed, 40, 4)
    features = features.double()
    ours = train_sweep(features, labels, 4, [(rate, decay)], epochs=4, batch_size=10, generator=draws(seed))
    x = (features - features.mean(0)) / features.std(0, correction=0)
    layer = torch.nn.Linear(12, 4, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    shuffles = draws(seed)
    for epoch in range(4):
        order = torch.randperm(40, generator=shuffles)
        for i in range(4):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (4 * epoch + i) / 16))
            index = order[10 * i : 10 * i + 10]
            optimizer.zero_grad()
            F.cross_entropy(layer(x[index]), labels[index]).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight[:, 0], layer.weight.T.detach())
    torch.testing.assert_close(ours.bias[0], layer.bias.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("noise", [1.0, 2.5])
def test_accuracy_is_scikit_learns_logistic_regression(noise):
    """To half a point, with its penalty chosen by cross-validation."""
    (known, labels), (asked, truth) = problem(10, 4000, noise=noise), problem(20, 8000, noise=noise)
    chosen = choose(known, labels, 5, Linear(), draws())
    ours = 100 * float((chosen.classifier.scores(asked)[:, 0].argmax(1) == truth).double().mean())
    mean, deviation = known.mean(0), known.std(0)
    model = LogisticRegressionCV(
        Cs=[0.001, 0.01, 0.1, 1, 10],
        cv=3,
        max_iter=2000,
        scoring="accuracy",
        use_legacy_attributes=False,
        l1_ratios=(0,),
    )
    model.fit(((known - mean) / deviation).numpy(), labels.numpy())
    theirs = 100 * float(np.mean(model.predict(((asked - mean) / deviation).numpy()) == truth.numpy()))
    assert ours == pytest.approx(theirs, abs=0.5)
    assert 30 < theirs < 99


def test_the_held_out_part_chooses():
    """Where a rate is far too low, and a penalty far too strong, the other is taken."""
    features, labels = problem(3, 1500)
    chosen = choose(features, labels, 5, Linear(epochs=10, lrs=(1e-7, 0.03), weight_decays=(1e-4, 10.0)), draws())
    assert (chosen.lr, chosen.weight_decay) == (0.03, 1e-4)
    assert 0.5 < chosen.held_out_accuracy <= 1
    again = choose(features, labels, 5, Linear(epochs=10, lrs=(1e-7, 0.03), weight_decays=(1e-4, 10.0)), draws())
    assert torch.equal(again.classifier.weight, chosen.classifier.weight)


@given(
    seed=st.integers(0, 1000),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.05, 0.5),
)
def test_every_class_of_several_images_has_some_held_out_and_some_not(seed, labels, share):
    labels = torch.tensor(labels)
    mask = held_out(labels, share, draws(seed))
    for c in labels.unique():
        count, out = int((labels == c).sum()), int(mask[labels == c].sum())
        assert out == (0 if count == 1 else max(1, round(share * count)))
        assert out < count


@given(
    seed=st.integers(0, 1000),
    images=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=60),
    share=st.floats(0.05, 0.5),
    pure=st.booleans(),
)
def test_whole_tracks_are_held_out_and_one_at_least_of_each_class_trains(seed, images, share, pure):
    labels, tracks = torch.tensor(images).T
    tracks = 7 * (10 * labels + tracks if pure else tracks)
    mask = held_out(labels, share, draws(seed), tracks)
    assert torch.equal(mask, held_out(labels, share, draws(seed), tracks))
    assert not set(tracks[mask].tolist()) & set(tracks[~mask].tolist())
    for c in labels.unique():
        of_class = labels == c
        sizes = tracks[of_class].unique(return_counts=True)[1]
        assert (of_class & ~mask).any()
        if not pure:
            continue  # a track of several classes may be needed by another one
        out, goal = int(mask[of_class].sum()), max(1, round(share * int(of_class.sum())))
        if len(sizes) == 1:
            assert not out
        else:
            assert 1 <= out <= max(goal, int(sizes.min()))


def test_tracks_of_one_image_are_held_out_as_single_images_are():
    labels = torch.arange(200) % 5
    mask = held_out(labels, 0.2, draws(), torch.arange(200))
    assert mask.sum() == held_out(labels, 0.2, draws()).sum()
    assert labels[mask].bincount().tolist() == [8] * 5


def test_features_that_do_not_vary_do_no_harm():
    features, labels = problem(3, 200)
    features[:, 4] = 7.0
    sweep = train_sweep(features, labels, 5, SETTINGS, epochs=2)
    assert sweep.scores(features).isfinite().all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"lrs": ()}, r"lrs=\(\)"),
        ({"weight_decays": (-1.0,)}, "weight_decays"),
        ({"schedule": "steps"}, "schedule='steps'"),
    ],
)
def test_wrong_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        Linear(**options)


def test_too_few_images_to_hold_any_out():
    with pytest.raises(ValueError, match="3 labelled images are too few"):
        choose(torch.randn(3, 2), torch.arange(3), 3, Linear(), draws())
