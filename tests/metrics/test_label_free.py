import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from crosslevel.metrics.label_free import alignment, clusterings, combine, partitions, retrieval, scores, uniformity


def views(seed=0, images=60, clusters=6, size=8, spread=0.3, noise=0.2):
    """Two views of images around cluster centres."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, size, generator=draws)
    x = centres[torch.arange(images) % clusters] + spread * torch.randn(images, size, generator=draws)
    return [x + noise * torch.randn(images, size, generator=draws) for _ in range(2)]


def unit(x):
    return np.array([row / np.linalg.norm(row) for row in x.double().numpy()])


def reciprocal_ranks(queries, keys, tracks):
    """One image after the other, in float64."""
    for i, query in enumerate(queries):
        others = [j for j in range(len(keys)) if tracks[j] != tracks[i]]
        yield 1 / (1 + sum(query @ keys[j] >= query @ keys[i] - 1e-6 for j in others))


@pytest.mark.parametrize("frames", [1, 5])
def test_retrieval_ranks_the_other_view_among_all_other_tracks(frames):
    a, b = views(noise=0.35)
    tracks = torch.arange(60) // frames
    found = retrieval(a, b, tracks if frames > 1 else None, chunk=17)
    x, y = unit(a), unit(b)
    ranks = [*reciprocal_ranks(x, y, tracks.tolist()), *reciprocal_ranks(y, x, tracks.tolist())]
    assert found["mrr"] == pytest.approx(np.mean(ranks))
    assert found["top1"] == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert 0.2 < found["top1"] < 0.95


def test_near_duplicates_fool_plain_retrieval_but_not_with_tracks():
    draws = torch.Generator().manual_seed(0)
    tracks, noise = torch.arange(400) // 10, 0.15
    objects = torch.randn(40, 32, generator=draws)[tracks]
    frames = torch.randn(400, 32, generator=draws)

    def two_views(x):
        return [x + noise * torch.randn(400, 32, generator=draws) for _ in range(2)]

    knows_objects, knows_noise = two_views(objects + 0.1 * frames), two_views(frames)
    plain = [retrieval(*pair)["top1"] for pair in (knows_objects, knows_noise)]
    aware = [retrieval(*pair, tracks)["top1"] for pair in (knows_objects, knows_noise)]
    assert plain[0] < 0.7 < 0.99 < plain[1]  # the better features have by far the worse score
    assert aware[0] > 0.99
    assert aware[1] > 0.99
    copied = [torch.cat([x, x]) for x in knows_noise]
    assert retrieval(*copied)["top1"] == 0  # a copy of every image ties with it
    assert retrieval(*copied, torch.arange(400).repeat(2))["top1"] == aware[1]


def test_where_nothing_is_left_to_rank_against_there_is_no_score():
    a, b = views()
    with pytest.raises(ValueError, match="all images are of one track"):
        retrieval(a, b, torch.zeros(60, dtype=torch.long))
    with pytest.raises(ValueError, match="20 tracks for 60 images"):
        scores(a, b, tracks=torch.arange(20))
    with pytest.raises(ValueError, match="group_a: 30 features of 60 images"):
        scores(a, b, a[:30], b[:30])


def mutual_information(table):
    total = table.sum()
    return sum(
        n / total * math.log(total * n / (table[i].sum() * table[:, j].sum()))
        for (i, j), n in np.ndenumerate(table)
        if n
    )


def expected_information(rows, columns):
    """The mean over all pairs of partitions with these sizes (Vinh, Epps, Bailey 2010)."""
    total = int(rows.sum())
    return sum(
        hypergeom.pmf(n, total, r, c) * n / total * math.log(total * n / (r * c))
        for r in map(int, rows)
        for c in map(int, columns)
        for n in range(max(1, r + c - total), min(r, c) + 1)
    )


def test_partitions_are_compared_by_information():
    draws = torch.Generator().manual_seed(0)
    a = torch.randint(5, (80,), generator=draws)
    b = torch.where(torch.rand(80, generator=draws) < 0.6, a, torch.randint(5, (80,), generator=draws))
    table = np.zeros((5, 5))
    for i, j in zip(a.tolist(), b.tolist(), strict=True):
        table[i, j] += 1
    information = mutual_information(table)
    mean = sum(-(p / 80) * math.log(p / 80) for size in (table.sum(0), table.sum(1)) for p in size if p) / 2
    chance = expected_information(table.sum(1), table.sum(0))
    found = partitions([a], [b])
    assert found["nmi"] == pytest.approx(information / mean)
    assert found["ami"] == pytest.approx((information - chance) / (mean - chance))
    assert partitions([a, a], [b, a])["ami"] == pytest.approx((found["ami"] + 1) / 2)


def test_information_grows_with_the_number_of_clusters_and_what_is_adjusted_does_not():
    draws = torch.Generator().manual_seed(0)
    pairs = {k: [torch.randint(k, (400,), generator=draws) for _ in range(2)] for k in (4, 100)}
    few, many = (partitions([a], [b]) for a, b in pairs.values())
    assert few["nmi"] < 0.05 < 0.4 < many["nmi"]
    for found in (few, many):
        assert abs(found["ami"]) < 0.05
        assert abs(found["ari"]) < 0.05


def test_alignment_and_uniformity_are_means_over_pairs():
    a, b = views()
    x, y = unit(a), unit(b)
    assert alignment(a, b) == pytest.approx(
        np.mean([((u - v) ** 2).sum() for u, v in zip(x, y, strict=True)]), rel=1e-5
    )
    potentials = [math.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    assert uniformity(a) == pytest.approx(math.log(np.mean(potentials)), rel=1e-5)
    some = torch.linspace(0, 59, 40).round().long()
    assert len(some.unique()) == 40
    assert uniformity(a, most=40) == pytest.approx(uniformity(a[some]))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_rotations_lengths_and_orders_change_nothing(seed):
    a, b = views(seed, noise=0.4)
    draws = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draws))[0]
    order = torch.randperm(60, generator=draws)
    u, v = (3 * x[order] @ rotation for x in (a, b))
    assert retrieval(u, v) == pytest.approx(retrieval(a, b), abs=0.02)  # ties aside
    assert alignment(u, v) == pytest.approx(alignment(a, b), abs=1e-4)
    assert uniformity(u) == pytest.approx(uniformity(a), abs=1e-4)


def test_the_better_features_have_the_better_combined_score():
    """Of those that tell images apart as well, what differs in more directions; of those that do not, neither."""
    good, blurred = views(spread=0.4, noise=0.1, size=16), views(spread=0.4, noise=3.0, size=16)
    flat = views(spread=0.4, noise=0.1, size=16)
    narrow = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    flat = [x @ narrow @ narrow.T for x in flat]
    noise = [torch.randn(60, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = [scores(*pair) for pair in (good, flat, blurred, noise)]
    assert found[0]["mrr"] > 0.9
    assert found[1]["mrr"] > 0.8
    values = [one["combined"] for one in found]
    assert values[0] > values[1] > values[2] > values[3]
    assert found[3]["effective_rank"] == max(one["effective_rank"] for one in found)


def test_groups_do_not_count_in_the_combined_score():
    """Its known price: of two that tell images apart as well, features without groups have more directions."""
    grouped, shapeless = views(spread=0.4, noise=0.1, size=16), views(clusters=60, spread=0.0, noise=0.3, size=16)
    found = [scores(*pair) for pair in (grouped, shapeless)]
    assert found[0]["mrr"] == found[1]["mrr"] == 1
    assert found[0]["ami"] > 2 * found[1]["ami"]
    assert found[0]["combined"] < found[1]["combined"]


def test_the_levels_agree_where_both_branches_see_the_same():
    a, b = views(images=200)
    unrelated = views(seed=9, images=200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    same, other = scores(a, b, a, b), scores(a, b, *(x[order] for x in unrelated))
    assert same["ami_levels"] > 0.5
    assert abs(other["ami_levels"]) < 0.1
    assert "ami_levels" not in scores(a, b)
    mixed = [x[order] for x in unrelated]
    instance = scores(*mixed, a, b, instance_a=a, instance_b=b)  # the instance branch's, not the features'
    assert instance["ami_levels"] == pytest.approx(same["ami_levels"], abs=0.05)
    assert abs(scores(*mixed, a, b)["ami_levels"]) < 0.1


def test_the_same_seed_gives_the_same_scores():
    a, b = views(images=200)
    assert scores(a, b) == scores(a, b)
    draws = [scores(a, b, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_collapsed_features_score_nothing():
    found = scores(torch.ones(50, 8), torch.ones(50, 8))
    assert found["combined"] == found["ami"] == found["top1"] == 0
    assert found["mrr"] == pytest.approx(1 / 50)
    assert found["effective_rank"] == pytest.approx(1)
    assert scores(torch.zeros(50, 8), torch.zeros(50, 8))["combined"] == 0


def test_few_images_are_clustered_into_few():
    a, b = views(images=10)
    assert all(int(c.max()) == 1 for c in clusterings(a, (8, 16), torch.Generator().manual_seed(0)))
    assert math.isfinite(scores(a, b)["combined"])


def test_what_cannot_be_scored_is_named():
    a, b = views()
    with pytest.raises(ValueError, match=r"\(60, 8\) and \(59, 8\)"):
        scores(a, b[:59])
    with pytest.raises(ValueError, match="4 images or more"):
        scores(a[:3], b[:3])
    b[7] = torch.inf
    with pytest.raises(ValueError, match="view b: 1 of 60 features are not finite"):
        scores(a, b)


def test_either_level_alone_is_not_enough():
    assert combine(1.0, 1.0, 64) == combine(0.0, 64.0, 64) == 0
    assert combine(1.0, 64.0, 64) == 1
    assert combine(0.5, 1 + 63 / 32, 64) == pytest.approx(0.5 / 4)
    assert combine(1.0, 1.0, 1) == 0
