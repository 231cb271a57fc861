"""Local grouping of one batch: cosine k-means and k-way normalized cuts.

Both return `Groups`. No gradient flows through the assignment; it does flow through the centroids
(Wang, Liu, Yu, CVPR 2021, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crosslevel.utils.errors import UserError
from crosslevel.utils.rng import seeded

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

Init = Literal["first", "random", "kmeans++"]

EXACT_UP_TO = 512  # images: beyond, a full eigendecomposition costs more than the iterations
_SAME = 1e-6  # 1 - cosine at which two float32 unit vectors are one point


class Groups(NamedTuple):
    """k groups of B points, of each of V views where there are several.

    ``assignment`` Γ: the group of each point. ``centroids`` M: the mean of each group's points, on the
    unit sphere unless asked otherwise; zero for an empty group. ``sizes``: how many points each group
    has. ``solver``: the algorithm that found the groups.
    """

    assignment: Int64[Tensor, "*V B"]
    centroids: Float[Tensor, "*V k d"]
    sizes: Int64[Tensor, "*V k"]
    solver: str

    def unbind(self) -> list[Groups]:
        """The groups of each view."""
        fields = zip(self.assignment, self.centroids, self.sizes, strict=True)
        return [Groups(assignment, centroids, sizes, self.solver) for assignment, centroids, sizes in fields]


def spherical_kmeans(
    z: Float[Tensor, "*V B d"],
    groups: int,
    iterations: int = 5,
    init: Init = "first",
    generator: torch.Generator | None = None,
    normalize_centroids: bool = True,
) -> Groups:
    """Cosine k-means: few iterations of matrix products, never a (B, k, d) tensor.

    Points that coincide always share a group. With fewer distinct initial points than ``groups``, the
    surplus groups stay empty; all-equal points therefore form one group. A NaN in ``z`` makes
    every centroid NaN, so that no loss computed from it can look healthy.

    Args:
        z: the points, unit length (of other rows only the direction counts). Given (V, B, d), the points of each view
            are grouped separately, in one call: a GPU takes as long for all views as for one.
        groups: k, at most B.
        iterations: rounds of assignment and mean, at least 1.
        init: the first centroids: the ``first`` k points (the authors' choice, random in a shuffled
            batch), k ``random`` points, or ``kmeans++`` (Arthur and Vassilvitskii 2007).
        generator: the source of randomness of ``random`` and ``kmeans++``, on the CPU.
        normalize_centroids: False leaves the plain means (the authors' code).

    Raises:
        ValueError: more groups than points, or no iterations.

    """
    _check(z, groups, iterations)
    views = z if z.ndim == 3 else z.unsqueeze(0)
    with torch.no_grad():
        unit = F.normalize(views.detach(), dim=2)
        assignment = _lloyd(unit, _initial(unit, groups, init, generator), iterations)
    groupings = _groups(views, assignment, groups, normalize_centroids, f"spherical k-means, {iterations} iterations")
    return groupings if z.ndim == 3 else groupings.unbind()[0]


def normalized_cut(
    z: Float[Tensor, "*V B d"],
    groups: int,
    iterations: int = 5,
    init: Init = "first",
    generator: torch.Generator | None = None,
    normalize_centroids: bool = True,
    bandwidth: float = 0.1,
) -> Groups:
    """k-way normalized cut on the cosine affinity exp((cos - 1) / bandwidth) (Yu and Shi, ICCV 2003).

    The points are embedded by the k leading eigenvectors of D^-1/2 W D^-1/2, and cosine k-means groups
    the rows of that embedding. Up to `EXACT_UP_TO` points the eigenvectors are exact; beyond, they come
    from subspace iteration, and ``solver`` says so. Degenerate inputs end as in `spherical_kmeans`.

    Args:
        z: the points, unit length; given (V, B, d), the points of each view are grouped separately.
        groups: k, at most B.
        iterations: rounds of k-means on the embedding.
        init: as in `spherical_kmeans`, on the embedding.
        generator: the source of randomness, on the CPU.
        normalize_centroids: False leaves the plain means.
        bandwidth: the cosine distance at which the affinity falls to 1/e.

    Raises:
        ValueError: more groups than points, no iterations, or a bandwidth that is not positive.

    """
    _check(z, groups, iterations)
    if bandwidth <= 0:
        raise UserError(f"bandwidth={bandwidth} must be positive")
    views = z if z.ndim == 3 else z.unsqueeze(0)
    with torch.no_grad():
        groupings = [_cut(view, groups, iterations, init, generator, bandwidth) for view in views.detach()]
    solver = "; ".join(dict.fromkeys(solver for _, solver in groupings))
    assignment = torch.stack([assignment for assignment, _ in groupings])
    cut = _groups(views, assignment, groups, normalize_centroids, f"normalized cut, {solver}")
    return cut if z.ndim == 3 else cut.unbind()[0]


def _cut(
    z: Tensor, groups: int, iterations: int, init: Init, generator: torch.Generator | None, bandwidth: float
) -> tuple[Tensor, str]:
    """The assignment (B,) of points (B, d), and what found it."""
    unit = F.normalize(z, dim=1)
    affinity = (unit @ unit.T).sub_(1).div_(bandwidth).exp_()
    scale = affinity.sum(1).rsqrt()
    affinity.mul_(scale[:, None]).mul_(scale)
    if not bool(affinity.isfinite().all()):
        return torch.zeros(len(z), dtype=torch.long, device=z.device), "none: z has a NaN"
    representative = _first_equal(unit)
    vectors, solver = _leading_eigenvectors(affinity, groups)
    # Eigenvectors of the null space differ between copies of a point; their seeds and groups must not.
    rows = F.normalize(vectors, dim=1)[representative]
    seeds = _initial(rows[None], groups, init, generator, distinct=unit[None])
    return _lloyd(rows[None], seeds, iterations)[0, representative], solver


def _check(z: Tensor, groups: int, iterations: int) -> None:
    if z.ndim not in {2, 3}:
        raise UserError(f"z has shape {tuple(z.shape)}: it must be (images, features) or (views, images, features)")
    if groups < 1 or iterations < 1:
        raise UserError(f"groups={groups} and iterations={iterations} must be at least 1")
    if groups > z.shape[-2]:
        raise UserError(f"groups={groups} exceeds the batch of {z.shape[-2]} images: lower groups or raise batch_size")


def _groups(z: Tensor, assignment: Tensor, groups: int, normalize: bool, solver: str) -> Groups:
    # A product with the one-hot matrix is deterministic on every device; scatter-adds on a GPU are not.
    member = _one_hot(assignment, groups, z.dtype)
    sizes = member.sum(1)
    sums = member.mT @ z
    centroids = F.normalize(sums, dim=2) if normalize else sums / sizes.clamp(min=1)[..., None]
    return Groups(assignment, centroids, sizes.long(), solver)


def _one_hot(assignment: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    return (assignment[..., None] == torch.arange(groups, device=assignment.device)).to(dtype)


class _Seeds(NamedTuple):
    centroids: Float[Tensor, "V k d"]
    alive: Bool[Tensor, "V k"]


def _initial(
    points: Tensor, groups: int, init: Init, generator: torch.Generator | None, distinct: Tensor | None = None
) -> _Seeds:
    """The first centroids of each view, and which of them are not repetitions of an earlier one.

    Without ``alive``, repeated centroids would tie, and rounding would split identical points.
    """
    distinct = points if distinct is None else distinct
    match init:
        case "first":
            first, compared = points[:, :groups], distinct[:, :groups]
        case "random" | "kmeans++":
            if init == "random":
                indices = [torch.randperm(points.shape[1], generator=generator)[:groups] for _ in points]
            else:
                indices = [_plus_plus(view, groups, generator) for view in points]
            index = torch.stack(indices).to(points.device)[..., None]
            first, compared = points.take_along_dim(index, 1), distinct.take_along_dim(index, 1)
        case _:
            raise UserError(f"init={init!r} is not one of first, random, kmeans++")
    if compared.device.type != "mps":  # which has no float64
        # Reduced-precision matrix products on a GPU would make neighbours look the same.
        compared = compared.double()
    repeated = (compared @ compared.mT > 1 - _SAME).tril(-1).any(2)
    return _Seeds(first, ~repeated)


def _plus_plus(points: Tensor, groups: int, generator: torch.Generator | None) -> Tensor:
    # The random numbers are drawn at once on the CPU: the same seed gives the same groups on every device.
    uniform = torch.rand(groups, generator=generator, dtype=torch.float64).to(points.dtype).to(points.device)
    indices = torch.empty(groups, dtype=torch.long, device=points.device)
    indices[0] = (uniform[0] * len(points)).long().clamp(max=len(points) - 1)
    distance = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    for j in range(1, groups):
        newest = points.index_select(0, indices[j - 1 : j]).squeeze(0)
        distance = torch.minimum(distance, (1 - points @ newest).clamp(min=0))
        mass = torch.where(distance > _SAME, distance, 0).cumsum(0)
        indices[j] = torch.searchsorted(mass, uniform[j : j + 1] * mass[-1], right=True).clamp(max=len(points) - 1)[0]
    return indices


def _lloyd(points: Tensor, seeds: _Seeds, iterations: int) -> Tensor:
    centroids, alive = seeds
    dead = torch.where(alive, 0.0, -torch.inf).to(points.dtype).unsqueeze(1)
    assignment = torch.empty(0)
    for step in range(iterations):
        assignment = torch.baddbmm(dead, points, centroids.mT).argmax(2)
        if step + 1 < iterations:
            sums = _one_hot(assignment, centroids.shape[1], points.dtype).mT @ points
            length = torch.linalg.vector_norm(sums, dim=2, keepdim=True)
            # A group that lost all its points keeps its centroid, and may win some back.
            centroids = torch.where(length == 0, centroids, sums / length)
    return assignment


def _first_equal(unit: Tensor) -> Tensor:
    """For each point the first point that coincides with it."""
    cosine = unit @ unit.T
    # Against its own, not against 1: a copy's product is rounded the same way, however coarse the product is.
    same = cosine > cosine.diagonal()[:, None] - _SAME
    order = torch.arange(len(unit), 0, -1, device=unit.device)
    return (same * order).argmax(1)


def _leading_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, str]:
    """The k leading eigenvectors (B, k) of a symmetric positive semi-definite (B, B) matrix."""
    size = len(matrix)
    block = k + max(8, k // 4)
    if size <= EXACT_UP_TO or block * 2 > size:
        return torch.linalg.eigh(matrix).eigenvectors[:, -k:], "exact eigenvectors"
    # A fixed start keeps the result a function of the data alone.
    start = torch.randn(size, block, generator=seeded(0), dtype=torch.float32)
    basis = torch.linalg.qr(matrix @ start.to(matrix)).Q
    rounds = 12
    for _ in range(rounds):
        # Two products between orthogonalizations: half the QRs, still far from losing the small directions.
        basis = torch.linalg.qr(matrix @ (matrix @ basis)).Q
    ritz = torch.linalg.eigh(basis.T @ matrix @ basis).eigenvectors[:, -k:]
    return basis @ ritz, f"subspace iteration, {rounds} rounds"
