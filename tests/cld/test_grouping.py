"""Grouping against Lloyd's loop in NumPy, exact eigenvectors and scikit-learn, and its degenerate inputs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grouping_samples import BOTH, EVERY_INIT, generator
from hypothesis import given
from hypothesis import strategies as st
from reference import gradient, lloyd, means, normal, numpy, plus_plus, unit
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from crosslevel.cld.grouping import EXACT_UP_TO, normalized_cut, spherical_kmeans
from crosslevel.data.open import open_images

seeds = st.integers(0, 2**31 - 1)


@st.composite
def problems(draw, largest=40):
    """Points (B, d) in float64, and k of at most B."""
    batch = draw(st.integers(1, largest))
    return normal(draw(seeds), batch, draw(st.integers(2, 9))), draw(st.integers(1, batch))


def first_seeds(z, k, init, seed):
    """The seeds that ``init`` has to choose."""
    if init == "first":
        return list(range(k))
    if init == "random":
        return torch.randperm(len(z), generator=generator(seed))[:k].tolist()
    return plus_plus(numpy(z), k, torch.rand(k, generator=generator(seed), dtype=torch.float64).tolist())


def clusters(seed, centers, each, spread, d=16, dtype=torch.float64):
    """``centers`` orthogonal directions with ``each`` noisy points; the first points are one of each."""
    truth = torch.arange(centers).repeat(each)
    return torch.eye(d, dtype=dtype)[truth] + spread * normal(seed, centers * each, d, dtype=dtype), truth


@EVERY_INIT
@given(problem=problems(), iterations=st.integers(1, 8), seed=seeds)
def test_kmeans_is_lloyds_loop(init, problem, iterations, seed):
    z, k = problem
    found = spherical_kmeans(z, k, iterations, init, generator(seed))
    expected = lloyd(numpy(z), first_seeds(z, k, init, seed), iterations)
    assert found.assignment.tolist() == expected.tolist()
    assert found.sizes.tolist() == np.bincount(expected, minlength=k).tolist()
    assert found.solver == f"spherical k-means, {iterations} iterations"


@BOTH
@pytest.mark.parametrize("normalize", [True, False])
@given(problem=problems(largest=20))
def test_centroids_and_their_gradient(group, normalize, problem):
    """Means of the members, zero where there are none; the gradient is that of a fixed assignment."""
    z, k = problem
    z.requires_grad_()
    found = group(z, k, normalize_centroids=normalize)
    probe = normal(1, *found.centroids.shape)

    def probed(x):
        centroids = means(x, found.assignment.tolist(), k, normalize)
        return sum((numpy(p) * c).sum() for p, c in zip(probe, centroids, strict=True) if c is not None) + 0j

    for j, expected in enumerate(means(numpy(z), found.assignment.tolist(), k, normalize)):
        np.testing.assert_allclose(
            numpy(found.centroids[j]), 0 if expected is None else expected, rtol=1e-9, atol=1e-12
        )
    (found.centroids * probe).sum().backward()
    expected = gradient(probed, numpy(z))
    np.testing.assert_allclose(numpy(z.grad), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max() + 1e-12)
    assert not found.assignment.requires_grad
    assert not found.sizes.requires_grad


@given(problem=problems(), lengths=seeds)
def test_length_of_a_point_does_not_change_its_group(problem, lengths):
    z, k = problem
    longer = z * (0.1 + normal(lengths, len(z), 1).abs())
    assert torch.equal(spherical_kmeans(z, k).assignment, spherical_kmeans(longer, k).assignment)


@EVERY_INIT
@given(problem=problems(), seed=seeds)
def test_more_iterations_are_never_worse(init, problem, seed):
    z, k = problem
    z = torch.nn.functional.normalize(z, dim=1)
    quality = []
    for iterations in range(1, 9):
        found = spherical_kmeans(z, k, iterations, init, generator(seed))
        quality.append(float((z * found.centroids[found.assignment]).sum()))
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(quality))


@BOTH
@given(seed=seeds, centers=st.integers(2, 8), each=st.integers(2, 12))
def test_separated_clusters_are_found(group, seed, centers, each):
    z, truth = clusters(seed, centers, each, spread=0.03)
    assert adjusted_rand_score(truth, group(z, centers).assignment) == 1
    # Close enough that k-means++ all but surely takes one of each, wherever they stand.
    z, truth = clusters(seed, centers, each, spread=0.001)
    shuffled = torch.randperm(len(z), generator=generator(seed))
    found = group(z[shuffled], centers, init="kmeans++", generator=generator(seed))
    assert adjusted_rand_score(truth[shuffled], found.assignment) == 1


def test_kmeans_agrees_with_scikit_learn():
    """Clusters that touch: both end in the same best partition, which is not quite the true one."""
    z, truth = clusters(4, centers=5, each=60, spread=0.25)
    theirs = KMeans(5, n_init=5, random_state=0).fit_predict(unit(numpy(z)))
    assert adjusted_rand_score(theirs, spherical_kmeans(z, 5, iterations=40).assignment) > 0.97
    assert 0.8 < adjusted_rand_score(truth, theirs) < 1


@given(seed=seeds, distinct=st.integers(2, 10), copies=st.integers(1, 9))
def test_plus_plus_never_takes_a_point_twice(seed, distinct, copies):
    z = torch.eye(12)[torch.arange(distinct).repeat(copies)]
    found = spherical_kmeans(z, distinct, init="kmeans++", generator=generator(seed))
    assert found.sizes.tolist() == [copies] * distinct


def exact_cut(z, k, iterations, bandwidth):
    """The partition of the exact eigenvectors, from the definition."""
    points = unit(z)
    affinity = np.array([[np.exp((p @ q - 1) / bandwidth) for q in points] for p in points])
    degree = affinity.sum(1)
    _, vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degree, degree)))
    return lloyd(vectors[:, -k:], range(k), iterations)


@given(problem=problems(largest=30), iterations=st.integers(1, 6), bandwidth=st.sampled_from([0.05, 0.1, 0.5]))
def test_normalized_cut_is_its_definition(problem, iterations, bandwidth):
    z, k = problem
    found = normalized_cut(z, k, iterations, bandwidth=bandwidth)
    assert found.solver == "normalized cut, exact eigenvectors"
    assert adjusted_rand_score(exact_cut(numpy(z), k, iterations, bandwidth), found.assignment) == 1


def test_normalized_cut_agrees_with_scikit_learn():
    z, _ = clusters(3, centers=6, each=40, spread=0.12)
    points = unit(numpy(z))
    theirs = SpectralClustering(6, affinity="precomputed", assign_labels="kmeans", random_state=0, n_init=20)
    theirs.fit(np.exp((points @ points.T - 1) / 0.1))
    assert adjusted_rand_score(theirs.labels_, normalized_cut(z, 6, iterations=20).assignment) == 1


def test_solver_is_named_on_both_sides_of_the_limit():
    z = normal(0, EXACT_UP_TO + 1, 8, dtype=torch.float32)
    assert normalized_cut(z[:-1], 4).solver == "normalized cut, exact eigenvectors"
    assert normalized_cut(z, 4).solver == "normalized cut, subspace iteration, 12 rounds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterative_eigenvectors_find_the_exact_partition(dtype):
    """Clusters that overlap (their affinities reach over), so that the partition is not given away."""
    z, truth = clusters(5, centers=10, each=100, spread=0.2, dtype=dtype)
    found = normalized_cut(z, 10, iterations=10)
    points = unit(numpy(z).astype(np.float64))
    affinity = np.exp((points @ points.T - 1) / 0.1)
    degree = affinity.sum(1)
    vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degree, degree)))[1][:, -10:]
    exact = spherical_kmeans(torch.from_numpy(vectors), 10, iterations=10)
    assert "subspace iteration" in found.solver
    assert adjusted_rand_score(exact.assignment, found.assignment) == 1
    assert adjusted_rand_score(truth, found.assignment) > 0.9


def test_iterative_cut_is_as_good_as_the_exact_one_without_clusters():
    """Without an eigengap the vectors differ, but the cut's value may not."""
    z = torch.nn.functional.normalize(normal(6, 640, 32), dim=1)
    affinity = ((z @ z.T - 1) / 0.1).exp()
    vectors = torch.linalg.eigh(affinity / torch.outer(affinity.sum(1), affinity.sum(1)).sqrt()).eigenvectors[:, -40:]

    def value(assignment):
        member = torch.nn.functional.one_hot(assignment, 40).double()
        kept, volume = (member.T @ affinity @ member).diagonal(), member.T @ affinity.sum(1)
        return float((kept / volume.clamp(min=1e-12)).sum())

    found = normalized_cut(z, 40, iterations=20)
    assert "subspace iteration" in found.solver
    assert value(found.assignment) > 0.98 * value(spherical_kmeans(vectors, 40, iterations=20).assignment)


def test_normalized_cut_follows_shapes_that_kmeans_cannot():
    """Two noisy rings on the sphere, one above the other."""
    angle = torch.linspace(0, 2 * torch.pi, 161, dtype=torch.float64)[:-1].repeat(2)
    ring = torch.arange(2).repeat_interleave(160)
    height = 0.25 * (2 * ring - 1) + 0.02 * normal(0, 320)
    z = torch.stack([angle.cos(), angle.sin(), height], dim=1)
    cut = normalized_cut(z, 2, iterations=20, init="kmeans++", generator=generator(0), bandwidth=0.005)
    plain = spherical_kmeans(z, 2, iterations=20, init="kmeans++", generator=generator(0))
    assert adjusted_rand_score(ring, cut.assignment) == 1
    assert adjusted_rand_score(ring, plain.assignment) < 0.1


@st.composite
def repeated(draw):
    """Points with copies: on a coarse grid, where cosines tie, or anywhere; and which are the same."""
    batch, d = draw(st.integers(2, 70)), draw(st.integers(1, 17))
    distinct = draw(st.integers(1, batch))
    points = normal(draw(seeds), distinct, d)
    if draw(st.booleans()):
        points = points.round()
    points = points[points.abs().sum(1) > 0]
    points = points if len(points) else torch.ones(1, d, dtype=torch.float64)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    which = torch.randint(len(points), (batch,), generator=generator(draw(seeds)))
    return points[which].to(dtype), draw(st.integers(1, batch))


@BOTH
@EVERY_INIT
@given(problem=repeated(), seed=seeds)
def test_repeated_points_share_a_group(group, init, problem, seed):
    z, k = problem
    found = group(z, k, init=init, generator=generator(seed))
    _, which = z.unique(dim=0, return_inverse=True)
    for point in range(int(which.max()) + 1):
        assert len(found.assignment[which == point].unique()) == 1
    assert found.sizes.tolist() == found.assignment.bincount(minlength=k).tolist()
    assert (found.centroids[found.sizes == 0] == 0).all()
    assert found.centroids.isfinite().all()


@BOTH
@EVERY_INIT
@given(
    seed=seeds,
    distinct=st.integers(1, 6),
    batch=st.integers(2, 60),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_copies_that_differ_by_rounding_share_a_group(group, init, seed, distinct, batch, dtype):
    """One direction at many lengths: unit vectors that are not bit for bit the same."""
    which = torch.arange(batch) % distinct
    z = (normal(seed, distinct, 24)[which] * (0.1 + normal(seed + 1, batch, 1).abs())).to(dtype)
    found = group(z, batch, init=init, generator=generator(seed))
    assert adjusted_rand_score(which, found.assignment) == 1


@BOTH
@EVERY_INIT
def test_fewer_distinct_points_than_groups(group, init):
    """Three directions, ten groups: never more than three groups, never one that mixes two directions."""
    z = torch.eye(8)[torch.arange(3).repeat(8)]
    found = group(z, 10, init=init, generator=generator(0))
    used = int((found.sizes > 0).sum())
    assert used <= 3
    if init != "random":
        assert used == 3
        assert adjusted_rand_score(torch.arange(3).repeat(8), found.assignment) == 1


@BOTH
@EVERY_INIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_points_are_one_group(group, init, dtype):
    z = normal(2, 1, 128, dtype=dtype).repeat(300, 1)
    found = group(z, 128, init=init, generator=generator(0))
    assert sorted(found.sizes.tolist()) == [0] * 127 + [300]


@BOTH
@EVERY_INIT
@given(problem=problems(), row=seeds)
def test_one_bad_number_spoils_every_centroid(group, init, problem, row):
    z, k = problem
    for bad in (float("inf"), float("nan")):
        z[row % len(z), 0] = bad
        found = group(z, k, init=init, generator=generator(0)).centroids
        plain = group(z, k, init=init, generator=generator(0), normalize_centroids=False).centroids
        assert found.isnan().any(1).all()
        assert not plain.isfinite().all(1).any()
    assert found.isnan().all()


@BOTH
@pytest.mark.parametrize("init", ["first", "random", "kmeans++"])
def test_views_are_grouped_by_themselves(group, init):
    z = torch.stack([normal(seed, 40, 8) for seed in (3, 4, 5)])
    together, same = group(z, 9, 3, init, generator(2)), generator(2)
    for view, found in zip(z, together.unbind(), strict=True):
        alone = group(view, 9, 3, init, same)
        assert torch.equal(found.assignment, alone.assignment)
        assert torch.equal(found.sizes, alone.sizes)
        torch.testing.assert_close(found.centroids, alone.centroids)
        assert found.solver == alone.solver


@BOTH
def test_errors_name_the_value_and_the_remedy(group):
    z = normal(0, 6, 4)
    with pytest.raises(ValueError, match=r"groups=7 exceeds the batch of 6 images: lower groups or raise batch_size"):
        group(z, 7)
    with pytest.raises(ValueError, match=r"groups=0 and iterations=5 must be at least 1"):
        group(z, 0)
    with pytest.raises(ValueError, match=r"groups=2 and iterations=0 must be at least 1"):
        group(z, 2, iterations=0)
    with pytest.raises(ValueError, match=r"z has shape \(6, 1, 2, 2\): it must be \(images, features\) or \(views, i"):
        group(z.view(6, 1, 2, 2), 2)
    with pytest.raises(ValueError, match=r"init='last' is not one of first, random, kmeans\+\+"):
        group(z, 2, init="last")


def test_bandwidth_must_be_positive():
    with pytest.raises(ValueError, match=r"bandwidth=0 must be positive"):
        normalized_cut(normal(0, 6, 4), 2, bandwidth=0)


@BOTH
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_randomness_is_the_generators(group, init):
    z = normal(0, 60, 8)
    one, same = group(z, 12, 1, init, generator(1)), group(z, 12, 1, init, generator(1))
    assert torch.equal(one.assignment, same.assignment)
    assert torch.equal(one.centroids, same.centroids)
    others = [group(z, 12, 1, init, generator(seed)).assignment for seed in range(2, 6)]
    assert all(adjusted_rand_score(one.assignment, other) < 1 for other in others)


def test_few_groups_in_natural_order_join_fewer_objects_from_random_first_centroids():
    """The share of the pairs in a group that are frames of one object; with many groups either way all are."""
    frames = open_images("turntable:train,classes=4,objects=64,size=16")
    order = torch.arange(8 * 128)  # object after object

    def purity(groups, init):
        pairs, same, generator = 0, 0, torch.Generator().manual_seed(0)
        for rows in order.split(128):
            points = torch.stack([frames[i][0] for i in rows.tolist()]).flatten(1).float() / 127.5 - 1
            found = spherical_kmeans(F.normalize(points, dim=1), groups, 5, init, generator)
            together = found.assignment[:, None] == found.assignment
            own = frames.tracks[rows]
            pairs += int(together.sum()) - len(rows)
            same += int((together & (own[:, None] == own)).sum()) - len(rows)
        return same / pairs

    assert purity(16, "first") < 0.75
    assert purity(16, "random") > 0.85
    assert min(purity(96, init) for init in ("first", "random")) > 0.95
