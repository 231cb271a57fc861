"""Retrieval and clustering against scikit-learn."""

from itertools import permutations

import numpy as np
import pytest
from protocol_samples import PLACE, ROUNDING, bank, film, unit, within
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    confusion_matrix,
    normalized_mutual_info_score,
)

from crosslevel.evaluation.protocols import (
    PIXELS,
    Subject,
    clustering,
    retrieval,
)


def expected_retrieval(features, labels, tracks=None):
    """Recall by a ranking in NumPy, precision by scikit-learn."""
    similarity, labels = unit(features) @ unit(features).T, labels.numpy()
    recall, precision = {1: [], 5: [], 10: []}, []
    for q in range(len(labels)):
        others = np.arange(len(labels)) != q if tracks is None else (tracks != tracks[q]).numpy()
        hits = labels[others] == labels[q]
        if not hits.any():
            continue
        ranking = np.argsort(-similarity[q, others], kind="stable")
        for k, column in recall.items():
            column.append(hits[ranking[:k]].any())
        precision.append(average_precision_score(hits, similarity[q, others]))
    return {
        **{f"recall@{k}": 100 * np.mean(column) for k, column in recall.items()},
        "map": 100 * np.mean(precision),
        "queries": len(precision),
    }


def test_retrieval_is_scikit_learns(subject):
    found = retrieval(subject)
    assert list(found) == ["retrieval, by class"]  # nothing is known of tracks
    for name, judged in found["retrieval, by class"].items():
        asked = subject.features_of(name)[1]
        assert judged.figures == pytest.approx(expected_retrieval(asked.features, subject.queries.labels), abs=ROUNDING)
        assert within(judged) == set(judged.figures) - {"queries"}


def test_retrieval_by_class_leaves_the_own_track_out(encoder):
    """Where looks say nothing about the class, only frames of the own track would find it: chance is a quarter."""
    frames = film(60, 3)
    found = retrieval(Subject({"raw pixels": PIXELS, "encoder": encoder}, bank(), frames, PLACE))
    assert list(found) == ["retrieval, by class", "retrieval, by track"]
    asked = Subject({"encoder": encoder}, bank(), frames, PLACE).features_of("encoder")[1]
    by_class, by_track = (found[f"retrieval, by {what}"] for what in ("class", "track"))
    wanted = expected_retrieval(asked.features, frames.labels, frames.tracks)
    assert by_class["encoder"].figures == pytest.approx(wanted, abs=ROUNDING)
    wanted = expected_retrieval(asked.features, frames.tracks)
    assert by_track["encoder"].figures == pytest.approx(wanted, abs=ROUNDING)
    for row in (by_class, by_track):
        for judged in row.values():
            assert judged.figures["queries"] == 180
            assert within(judged) == {"recall@1", "recall@5", "recall@10", "map"}
    assert by_class["raw pixels"].figures["recall@1"] < 50
    assert by_track["raw pixels"].figures["recall@1"] == 100


def best_matching(labels, found):
    """The accuracy of the best one-to-one matching, by trying them all."""
    table = confusion_matrix(labels, found)
    return max(sum(table[c, p[c]] for c in range(len(p))) for p in permutations(range(len(table)))) / table.sum()


def test_clustering_is_scikit_learns(subject):
    for name, judged in clustering(subject)["clustering"].items():
        asked = subject.features_of(name)[1]
        directions = unit(asked.features).astype(np.float32)
        predicted = KMeans(3, n_init=5, random_state=0).fit_predict(directions)
        labels = subject.queries.labels.numpy()
        assert judged.figures["nmi"] == pytest.approx(
            100 * normalized_mutual_info_score(labels, predicted), abs=ROUNDING
        )
        assert judged.figures["ari"] == pytest.approx(100 * adjusted_rand_score(labels, predicted), abs=ROUNDING)
        assert judged.figures["accuracy"] == pytest.approx(100 * best_matching(labels, predicted), abs=ROUNDING)
        assert within(judged) == {"accuracy"}


@pytest.mark.parametrize("count", [2, 5])
def test_clusters_may_be_more_or_fewer_than_classes(subject, count):
    judged = clustering(subject, count)["clustering"]["raw pixels"]
    features = unit(subject.features_of("raw pixels")[1].features).astype(np.float32)
    predicted = KMeans(count, n_init=5, random_state=0).fit_predict(features)
    labels = subject.queries.labels.numpy()
    assert judged.figures["ari"] == pytest.approx(100 * adjusted_rand_score(labels, predicted), abs=ROUNDING)
    # confusion_matrix is square: what is missing of one side has a row or column of zeros
    assert judged.figures["accuracy"] == pytest.approx(100 * best_matching(labels, predicted), abs=ROUNDING)
    within(judged)
