"""The map of a collection: a layout of features in the plane that keeps neighbours together."""

from __future__ import annotations

import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from crosslevel import report
from crosslevel.metrics.nearest import Neighbours
from crosslevel.utils.errors import MissingExtra
from crosslevel.utils.rng import seeded

SMALL = 3000  # points that scikit-learn's t-SNE lays out in seconds; more need openTSNE, whose time grows with N alone
ATTRACTED = 15  # nearest neighbours, each alike: as good as perplexities, and faster (Böhm, Berens and Kobak 2022)
FEW = 2000  # up to this many points, a tree computes the repulsion faster than a grid
BOX = 1.5  # side of the grid's cells: half of the time that 1 takes, for less than a point of the neighbours kept
EARLY, LATE, EXAGGERATION = 250, 500, 12.0  # steps of t-SNE (van der Maaten 2014)


def lay_out(
    unit: Float[Tensor, "N D"], near: Neighbours, *, threads: int | None = None, seed: int = 0
) -> Float[Tensor, "N 2"]:
    """T-SNE of features by their nearest neighbours, starting from the two leading principal components.

    Args:
        unit: features of length 1.
        near: the nearest features of each, itself included; at least 16, if there are so many.
        threads: as many as PyTorch has unless given.
        seed: of the noise on the starting positions.

    Raises:
        MissingExtra: more than 3,000 features, and openTSNE is not installed.

    """
    if len(unit) < 4 * ATTRACTED:
        return report.project(unit, seed=seed)
    try:
        from openTSNE import TSNEEmbedding, affinity, nearest_neighbors  # noqa: PLC0415
    except ImportError as error:
        if len(unit) <= SMALL:
            return report.project(unit, seed=seed)
        raise MissingExtra(
            f"the map of {len(unit):,} images needs openTSNE: pip install 'crosslevel[explore]'; --sample {SMALL} does "
            "without"
        ) from error
    rows = torch.arange(len(unit)).unsqueeze(1)
    # Equal features may rank before the row itself: it is moved to the front, where it can be dropped.
    order = (near.indices != rows).int().argsort(dim=1, stable=True)[:, 1 : ATTRACTED + 1]
    indices, values = near.indices.gather(1, order), near.values.gather(1, order)
    neighbours = nearest_neighbors.PrecomputedNeighbors(indices.numpy(), (1 - values.double()).clamp(min=0).numpy())
    jobs = threads or torch.get_num_threads()
    attraction = affinity.Uniform(knn_index=neighbours, k_neighbors=ATTRACTED, symmetrize="mean", n_jobs=jobs)
    start = report.project(unit, "pca").double()
    start = start / start[:, 0].std().clamp(min=1e-12) * 1e-4
    start += 1e-6 * torch.randn(start.shape, generator=seeded(seed), dtype=torch.float64)
    embedding = TSNEEmbedding(
        start.numpy(),
        attraction,
        negative_gradient_method="bh" if len(unit) <= FEW else "fft",
        ints_in_interval=BOX,
        n_jobs=jobs,
        random_state=seed,
        learning_rate="auto",
    )
    with threadpool_limits(jobs):
        embedding.optimize(EARLY, exaggeration=EXAGGERATION, momentum=0.5, inplace=True)
        embedding.optimize(LATE, momentum=0.8, inplace=True)
    return torch.tensor(embedding[:]).float()
