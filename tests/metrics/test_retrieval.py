"""Retrieval against a loop in NumPy, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.metrics.retrieval import retrieval


def expected(features, labels, tracks, queries, ranks):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    recall, precision = {k: [] for k in ranks}, []
    for q in queries:
        others = [i for i in range(len(unit)) if i != q and (tracks is None or tracks[i] != tracks[q])]
        others.sort(key=lambda i: (-round(float(unit[q] @ unit[i]), 12), i))
        hits = [labels[i] == labels[q] for i in others]
        if not any(hits):
            continue
        for k in ranks:
            recall[k].append(any(hits[:k]))
        precision.append(np.mean([sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]))
    return {**{f"recall@{k}": 100 * np.mean(recall[k]) for k in ranks}, "map": 100 * np.mean(precision),
            "queries": len(precision)}  # fmt: skip


@given(
    seed=st.integers(0, 10_000),
    images=st.integers(4, 40),
    classes=st.integers(1, 4),
    with_tracks=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_it_is_the_loop(seed, images, classes, with_tracks, chunk):
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(images, 5)), rng.integers(0, classes, images)
    tracks = rng.integers(0, max(2, images // 3), images) if with_tracks else None
    queries = np.sort(rng.choice(images, max(2, images // 2), replace=False))
    arguments = [torch.from_numpy(features), torch.from_numpy(labels)]
    given_tracks = None if tracks is None else torch.from_numpy(tracks)
    wanted = expected(features, labels, tracks, queries, (1, 3))
    if not wanted["queries"]:
        with pytest.raises(ValueError, match="no query"):
            retrieval(*arguments, given_tracks, torch.from_numpy(queries), (1, 3), chunk)
        return
    found = retrieval(*arguments, given_tracks, torch.from_numpy(queries), (1, 3), chunk)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_frames_of_the_own_track_make_it_trivial_and_are_left_out():
    """Pairs of near-duplicates of random classes: with them recall is perfect, without them it is chance."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 8))
    features = torch.from_numpy(np.repeat(base, 2, axis=0) + 1e-3 * rng.normal(size=(1000, 8)))
    labels = torch.from_numpy(np.repeat(rng.integers(0, 4, 500), 2))
    tracks = torch.arange(1000) // 2
    assert retrieval(features, labels)["recall@1"] == 100
    assert retrieval(features, labels, tracks)["recall@1"] == pytest.approx(25, abs=6)
    assert retrieval(features, tracks)["recall@1"] == 100


def test_wrong_use():
    with pytest.raises(ValueError, match="5 features, 4 labels"):
        retrieval(torch.eye(5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="no query has another image"):
        retrieval(torch.eye(5), torch.arange(5))
