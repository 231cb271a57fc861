"""What the pictures show, against scikit-learn and searches in numpy."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_samples import clusters, random_images
from sklearn.decomposition import PCA

from crosslevel import report


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 9, 60])
@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_project_is_finite_and_repeats_itself(n, method):
    features = clusters(n)[0]
    first, second = (report.project(features, method, seed=3) for _ in range(2))
    assert first.shape == (n, 2)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("features", [torch.ones(30, 4), torch.zeros(30, 1), torch.eye(3).repeat(20, 1)])
def test_project_of_repeated_rows_keeps_them_together(features):
    points = report.project(features)
    assert torch.isfinite(points).all()
    for row in features.unique(dim=0):
        assert points[(features == row).all(1)].std(0).max() < 1e-5


def test_project_pca_agrees_with_scikit_learn():
    features = clusters(50)[0]
    want = PCA(2, svd_solver="full").fit_transform(features.double().numpy())
    assert np.allclose(np.abs(report.project(features, "pca").numpy()), np.abs(want), atol=1e-4)


def test_project_tsne_keeps_clusters_apart():
    features, labels = clusters(120)
    points = report.project(features)
    distance = torch.cdist(points, points).fill_diagonal_(math.inf)
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.95


def test_project_names_what_is_wrong():
    with pytest.raises(ValueError, match="1 of 3 rows are not finite, row 1 first"):
        report.project(torch.tensor([[1.0], [math.nan], [2.0]]))
    with pytest.raises(ValueError, match="method='umap'"):
        report.project(torch.ones(3, 2), "umap")


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_neighbours_equal_a_numpy_search(n, k, seed, tracks):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 5, generator=g)
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    labels, track = torch.randint(3, (n,), generator=g), torch.arange(n) // 3
    queries = [0, n - 1]
    exclude = track if tracks else None
    rows = report.neighbour_rows(images, features, queries, k, labels=labels, exclude=exclude)
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for query, row in zip(queries, rows, strict=True):
        allowed = [i for i in range(n) if (track[i] != track[query] if tracks else i != query)]
        want = sorted(allowed, key=lambda i: -(x[query] @ x[i]))[:k]
        got = [int(image[0, 0, 0]) for image in row.images]
        assert got == [query, *want]
        assert [float(m) for m in row.marks[1:]] == pytest.approx([x[query] @ x[i] for i in want], abs=0.0051)
        assert row.outlines[1:] == ["same" if labels[i] == labels[query] else "other" for i in want]


def test_groups_shown_are_the_largest_and_some_of_middle_size():
    sizes = list(range(40, 0, -1))
    assignment = torch.arange(40).repeat_interleave(torch.tensor(sizes))
    similarity = torch.rand(len(assignment), generator=torch.Generator().manual_seed(0))
    images = random_images(len(assignment), 4)
    rows = report.group_rows(images, assignment, similarity, most=12, per_row=5)
    groups = [int(re.match(r"Group (\d+): (\d+) image", row.caption)[1]) for row in rows]
    assert groups[:8] == list(range(8))
    assert len(set(groups)) == 12
    assert groups == sorted(groups)
    assert 8 <= groups[8] < groups[11] < 39
    for group, row in zip(groups, rows, strict=True):
        members = [i for i in range(len(assignment)) if assignment[i] == group]
        best = sorted(members, key=lambda i: -similarity[i])[:5]
        assert torch.equal(torch.stack(list(row.images)), images[best])
        assert f"{sizes[group]:,} image" in row.caption
        assert f"{similarity[members].mean():.2f}" in row.caption
    assert len(report.group_rows(images, assignment % 3)) == 3


def test_rows_name_and_link_the_files():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    files = [(f"cats/{i}.jpg", f"/photos/cats/{i}.jpg" if i != 1 else None) for i in range(4)]
    (row,) = report.neighbour_rows(images, features, [0], k=2, files=files)
    assert row.caption == "cats/0.jpg"
    pictures = report.image_rows("n", [row]).content["rows"][0]["pictures"]
    assert [(p["name"], p["link"]) for p in pictures] == [
        ("cats/0.jpg", "file:///photos/cats/0.jpg"), ("cats/1.jpg", ""), ("cats/3.jpg", "file:///photos/cats/3.jpg"),
    ]  # fmt: skip
