"""Each protocol against scikit-learn on the same features, and what no figure may depend on."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocol_samples import CLASSES, PLACE, ROUNDING, bank, draws, named, queries, within
from run_samples import watching_encoders
from sklearn.metrics import (
    accuracy_score,
    recall_score,
)
from sklearn.neighbors import KNeighborsClassifier

from crosslevel.data.bad_files import BadFiles
from crosslevel.evaluation.finetune import FineTune, Semi, few_labels, fine_tuned
from crosslevel.evaluation.linear import Linear
from crosslevel.evaluation.protocols import (
    PIXELS,
    Subject,
    clustering,
    convention,
    knn,
    linear,
    retrieval,
    semi,
    transfer,
)
from crosslevel.evaluation.scores import truth


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.07), (20, 0.5), (88, 0.02)])
def test_knn_is_scikit_learns_classifier(subject, k, temperature):
    found = knn(subject, k, temperature)
    assert list(found) == [f"kNN, k = {k}, T = {temperature}"]
    for name, judged in found.popitem()[1].items():
        known, asked = subject.features_of(name)
        model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
        model.fit(known.features.double().numpy(), named(subject.bank))
        predicted = model.predict(asked.features.double().numpy())
        expected = named(subject.queries)
        recalls = recall_score(expected, predicted, labels=["ant", "bee", "cow"], average=None)
        assert 30 < judged.figures["top1"] < 100
        assert judged.figures["top1"] == pytest.approx(100 * accuracy_score(expected, predicted), abs=ROUNDING)
        assert judged.figures["balanced"] == pytest.approx(100 * np.mean(recalls), abs=ROUNDING)
        # a third of four classes: the largest is many-shot, the smallest, which is not tested, few-shot
        assert judged.figures["many"] == pytest.approx(100 * recalls[0], abs=ROUNDING)
        assert judged.figures["medium"] == pytest.approx(100 * np.mean(recalls[1:]), abs=ROUNDING)
        assert within(judged) == set(judged.figures) == {"top1", "balanced", "many", "medium"}


def test_linear_chooses_without_the_test_images_and_their_labels(encoder):
    """Neither other labels nor other images move what is chosen, and how well it did on the held-out part."""
    how = Linear(epochs=6, batch_size=16, lrs=(0.001, 0.03, 1.0), weight_decays=(1e-4, 0.1))
    plain, permuted, others = queries(), queries(), queries(50, 30)
    permuted.labels = permuted.labels[torch.randperm(60, generator=draws(1))]
    rows = [
        linear(Subject({"encoder": encoder}, bank(), asked, PLACE), how)["linear"]["encoder"]
        for asked in (plain, permuted, others)
    ]
    assert rows[0].hyperparameters == rows[1].hyperparameters == rows[2].hyperparameters
    assert rows[0].hyperparameters.keys() == {"lr", "weight_decay", "held_out"}
    assert len({row.figures["top1"] for row in rows}) == 3
    learnt = bank()
    learnt.labels = learnt.labels[torch.randperm(88, generator=draws(1))]
    other = linear(Subject({"encoder": encoder}, learnt, plain, PLACE), how)["linear"]["encoder"]
    assert other.hyperparameters["held_out"] != rows[0].hyperparameters["held_out"]


def test_linear_takes_the_setting_that_alone_is_best_on_the_held_out_part(subject):
    rates, decays, shared = (0.001, 0.03, 1.0), (1e-4, 1.0), {"epochs": 6, "batch_size": 16, "held_out": 0.3}
    found = linear(subject, Linear(lrs=rates, weight_decays=decays, **shared))["linear"]
    alone = {
        (rate, decay): linear(subject, Linear(lrs=(rate,), weight_decays=(decay,), **shared))["linear"]
        for rate in rates
        for decay in decays
    }
    for name, judged in found.items():
        held_out = {setting: row[name].hyperparameters["held_out"] for setting, row in alone.items()}
        assert len(set(held_out.values())) > 1
        assert judged.hyperparameters["held_out"] == max(held_out.values())
        assert (
            judged.figures == alone[judged.hyperparameters["lr"], judged.hyperparameters["weight_decay"]][name].figures
        )
        assert judged.figures["top1"] > 40
        assert within(judged) == {"top1", "balanced", "many", "medium"}


def test_linear_on_views_is_for_encoders_alone(subject):
    how = Linear(epochs=6, batch_size=16, lr=3.0, augmented=True)
    found = linear(subject, how)
    assert list(found) == ["linear, on views"]
    assert list(found["linear, on views"]) == ["encoder"]
    judged = found["linear, on views"]["encoder"]
    assert judged.figures["top1"] > 50
    within(judged)


def test_a_protocol_finds_the_same_twice_and_leaves_the_encoder(encoder):
    before = copy.deepcopy(encoder.state_dict())
    how = Linear(epochs=2, batch_size=16)

    def everything():
        subject = Subject({"raw pixels": PIXELS, "encoder": encoder}, bank(), queries(), PLACE, seed=5)
        return [knn(subject), linear(subject, how), clustering(subject), retrieval(subject)]

    assert everything() == everything()
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


@given(
    classes=st.permutations(["ant", "bee", "cow", "dog", "emu"]),
    tested=st.lists(st.sampled_from(["ant", "bee", "cow", "dog", "emu"]), min_size=1, unique=True),
    train=st.lists(st.integers(0, 4), min_size=5, max_size=60),
    data=st.data(),
)
def test_truth_names_every_test_image_as_its_own_source_does(classes, tested, train, data):
    test = data.draw(st.lists(st.integers(0, len(tested) - 1), min_size=1, max_size=30))
    found = truth(torch.tensor(train), classes, torch.tensor(test), tested)
    assert [classes[c] for c in found.test.tolist()] == [tested[c] for c in test]
    assert found.counts.tolist() == [train.count(c) for c in range(5)]


def test_truth_counts_shots_in_the_training_sets_numbering():
    train = torch.tensor([0] * 30 + [1] * 200 + [2] * 3)
    found = truth(train, ["bee", "ant", "cow"], torch.tensor([0, 1, 1, 2]), ["cow", "ant", "bee"])
    assert found.test.tolist() == [2, 1, 1, 0]
    assert [part.tolist() for part in found.shots[:3]] == [[1], [0], [2]]
    figures = found.judge(torch.eye(3)[[2, 1, 0, 1]]).figures  # wrong for one ant of two, and for the bee
    wanted = {"top1": 50.0, "balanced": 50.0, "many": 50.0, "medium": 0.0, "few": 100.0}
    assert figures == pytest.approx(wanted, abs=ROUNDING)
    limits = truth(train, ["bee", "ant", "cow"], torch.tensor([0]), ["cow"], shots=(31, 250)).shots
    assert [part.tolist() for part in limits[:3]] == [[], [1], [0, 2]]


@given(seed=st.integers(0, 10_000), count=st.integers(1, 40), classes=st.integers(2, 8))
def test_judged_figures_are_scikit_learns_and_lie_in_their_intervals(seed, count, classes):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(count, classes)), rng.integers(0, classes, count)
    train = torch.arange(classes).repeat_interleave(torch.arange(1, classes + 1) ** 2)
    names = [str(c) for c in range(classes)]
    judged = truth(train, names, torch.from_numpy(labels), names).judge(torch.from_numpy(scores))
    predicted = scores.argmax(1)
    recalls = recall_score(labels, predicted, labels=np.unique(labels), average=None)
    assert judged.figures["top1"] == pytest.approx(100 * accuracy_score(labels, predicted), abs=ROUNDING)
    assert judged.figures["balanced"] == pytest.approx(100 * np.mean(recalls), abs=ROUNDING)
    assert ("top5" in judged.figures) == (classes > 5)
    if classes > 5:
        fifth = np.sort(scores)[:, -5]
        hits = scores[np.arange(count), labels] >= fifth
        assert judged.figures["top5"] == pytest.approx(100 * np.mean(hits), abs=ROUNDING)
    assert judged.intervals.keys() == judged.figures.keys()
    for name, (low, high) in judged.intervals.items():
        assert 0 <= low <= high <= 100 + ROUNDING
        if name in ("top1", "top5"):  # a mean of classes may lie outside, where some have one image or two
            assert low - ROUNDING <= judged.figures[name] <= high + ROUNDING


@pytest.mark.parametrize(
    ("name", "balanced"),
    [
        ("data/fgvc-aircraft-2013b/train", True),
        ("Caltech101", True),
        ("/data/flowers102", True),
        ("Oxford-IIIT-Pets", True),
        ("cifar10", False),
        ("cifar100:train", False),
        ("/data/imagenet/train", False),
        ("/data/food101", False),
    ],
)
def test_some_data_sets_are_reported_by_the_mean_of_their_classes(name, balanced):
    assert convention(name) == ("balanced" if balanced else "top1")


@pytest.mark.parametrize("name", ["/data/carpets/train", "/home/puppets/cifar10"])
def test_a_word_within_a_word_is_no_data_set(name):
    assert convention(name) == "top1"


def test_what_the_convention_names_is_the_mean_per_class_accuracy(subject):
    judged = knn(subject, 9)["kNN, k = 9, T = 0.1"]["raw pixels"]
    known, asked = subject.features_of("raw pixels")
    model = KNeighborsClassifier(9, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    predicted = model.fit(known.features.double().numpy(), named(subject.bank)).predict(asked.features.double().numpy())
    expected = 100 * recall_score(named(subject.queries), predicted, labels=["ant", "bee", "cow"], average="macro")
    assert judged.figures[convention("flowers102")] == pytest.approx(expected, abs=ROUNDING)
    assert judged.figures["balanced"] != pytest.approx(judged.figures["top1"], abs=ROUNDING)


def top1(scores, labels, source, classes):
    """The share of images whose highest score is at their class's name."""
    names = np.array(source.classes)[labels.numpy()]
    return 100 * np.mean(np.array(classes)[scores.argmax(1).numpy()] == names)


def test_transfer_has_both_rows(subject, encoder):
    how, sweep = FineTune(2, 16, 0.05, 0.2), Linear(epochs=4, batch_size=16)
    found = transfer(subject, how, sweep)
    assert list(found) == ["transfer, linear", "transfer, fine-tuned"]
    assert found["transfer, linear"] == linear(subject, sweep)["linear"]
    assert list(found["transfer, fine-tuned"]) == ["encoder"]
    judged = found["transfer, fine-tuned"]["encoder"]
    scores, labels = fine_tuned(encoder, bank(), 4, queries(), how, PLACE, BadFiles())
    assert judged.figures["top1"] == pytest.approx(top1(scores, labels, queries(), CLASSES), abs=ROUNDING)
    assert within(judged) == {"top1", "balanced", "many", "medium"}


def test_semi_is_a_row_for_each_fraction_in_the_whole_sets_numbering(subject, encoder):
    how = Semi(2, 16, 0.05, 0.2, fractions=(0.25, 0.5))
    found = semi(subject, how)
    assert list(found) == ["semi-supervised, 25 % of labels", "semi-supervised, 50 % of labels"]
    for row, part in zip(found.values(), few_labels(bank(), how, 0).values(), strict=True):
        scores, labels = fine_tuned(encoder, part, 4, queries(), how, PLACE, BadFiles())
        assert list(row) == ["encoder"]
        assert row["encoder"].figures["top1"] == pytest.approx(top1(scores, labels, queries(), CLASSES), abs=ROUNDING)
        within(row["encoder"])


def test_a_repeated_protocol_trains_nothing_again(encoder, tmp_path):
    """Features and finished trainings are there for the next call, and it finds the same."""
    how, sweep = FineTune(2, 16, 0.05, 0.2), Linear(epochs=2, batch_size=16)
    whole = transfer(Subject({"encoder": encoder}, bank(), queries(), PLACE), how, sweep)
    assert transfer(Subject({"encoder": encoder}, bank(), queries(), PLACE, run_dir=tmp_path), how, sweep) == whole
    trained = []
    with watching_encoders(lambda network, images: trained.append(network.training)):
        again = transfer(Subject({"encoder": encoder}, bank(), queries(), PLACE, run_dir=tmp_path), how, sweep)
    assert again == whole
    assert trained == 2 * [False]  # only the fine-tuned network looks at the test images again, 32 at a time
