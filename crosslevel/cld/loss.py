"""CLD, cross-level discrimination between instances and local instance groups, as an add-on.

Wang, Liu, Yu, "Unsupervised Feature Learning by Cross-Level Instance-Group Discrimination", CVPR 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslevel.cld.grouping import Groups, Init, normalized_cut, spherical_kmeans
from crosslevel.models.heads import Head, projection_head
from crosslevel.models.schedules.temperature import Temperature
from crosslevel.utils.distributed import gather as gather_rows
from crosslevel.utils.distributed import rank, world_size
from crosslevel.utils.errors import UserError

if TYPE_CHECKING:  # shapes are for readers: the add-on needs torch alone
    from jaxtyping import Float

Grouping = Literal["kmeans", "normalized-cut"]
On = Literal["own", "instance", "shared"]


class StepStats(NamedTuple):
    """The groups of the last step, detached, for logs and pictures.

    ``a``, ``b``: the groups of either view. ``agreement``: the share of instances, in [0, 1], whose most
    similar group in the other view is the one that the view's own grouping put them in.
    """

    a: Groups
    b: Groups
    agreement: Float[Tensor, ""]


@final
class CrossLevel(nn.Module):
    """The group branch: attract each instance to its other view's group, repel it from the rest.

    L_G = 1/2 [CE(z_a M_b^T / T, Γ_b) + CE(z_b M_a^T / T, Γ_a)], z = l2_normalize(head(h)), with groups Γ and
    centroids M found in each view's own batch (Wang, Liu, Yu 2021, eq. 5). Empty groups are no negatives.
    In any training loop, two lines::

        cld = crosslevel.CrossLevel(in_features=512, groups=128, temperature=0.2)
        loss = instance_loss + cld.weight * cld(h_a, h_b)

    The module returns L_G itself; the training loop adds it, as `crosslevel train` does: L = L_I + weight * L_G.

    ``last`` holds the groups of the last step (`StepStats`); None before the first.

    Examples:
        >>> cld = crosslevel.CrossLevel(in_features=512, groups=128)
        >>> h_a, h_b = torch.randn(2, 256, 512)  # in a training, features of two views of the same images
        >>> loss = cld.weight * cld(h_a, h_b)
        >>> loss.shape
        torch.Size([])

    """

    def __init__(
        self,
        in_features: int,
        groups: int | None = None,
        temperature: float = 0.2,
        weight: float = 0.25,
        head: Head = "norm-linear",
        out_features: int = 128,
        hidden: int | None = None,
        grouping: Grouping = "kmeans",
        iterations: int = 5,
        init: Init = "first",
        normalize_centroids: bool = True,
        gather: bool = False,
        on: On = "own",
        temperature_max: float | None = None,
        temperature_period: float | None = None,
    ) -> None:
        """Build the group branch.

        Args:
            in_features: D, the size of the shared features h.
            groups: k, the number of groups in a batch; three quarters of the batch unless given. Many small
                groups merge near-duplicates; few large ones merge what belongs apart. As many groups as
                images is cross-view instance discrimination.
            temperature: T, of the group branch.
            weight: λ, which the loop multiplies the loss by.
            head: linear, mlp, norm-linear or norm-mlp, the group branch's own.
            out_features: d, the size of the group features z.
            hidden: units of an MLP head's hidden layer; in_features unless given.
            grouping: kmeans (spherical k-means) or normalized-cut.
            iterations: rounds of k-means.
            init: first centroids of k-means: first, random or kmeans++.
            normalize_centroids: false gives the authors' code's plain means.
            gather: group the batches of all ranks of a distributed run together.
            on: where the group features come from. own, as published: a head of their own on the shared features.
                instance, an ablation: a head on the instance features. shared, another ablation: the instance features
                themselves. `crosslevel train` makes the connection.
            temperature_max: where a cosine schedule of T begins, from there to ``temperature`` and back (Kukleva et al.
                2023); constant unless given. Another loop calls `begin_step` with its epoch before each step.
            temperature_period: epochs of the schedule's period; a fifth of the run unless given.

        """
        super().__init__()
        if groups is not None and groups < 2:
            raise UserError(f"groups={groups} leaves nothing to tell apart: give at least 2")
        if grouping not in get_args(Grouping):
            raise UserError(f"grouping={grouping!r} is not one of {', '.join(get_args(Grouping))}")
        self.in_features, self.groups, self.temperature, self.weight = (
            in_features,
            groups,
            temperature,
            weight,
        )
        self.out_features, self.hidden, self.grouping, self.iterations = (
            out_features,
            hidden,
            grouping,
            iterations,
        )
        if on not in get_args(On):
            raise UserError(f"on={on!r} is not one of {', '.join(get_args(On))}")
        self.init, self.normalize_centroids, self.gather, self.on = init, normalize_centroids, gather, on
        self.temperature_max, self.temperature_period = temperature_max, temperature_period
        self.schedule = Temperature(temperature, temperature_max, temperature_period)
        self.branch = projection_head(head, in_features, out_features, hidden)
        self.head = head
        self.last: StepStats | None = None
        self.generator: torch.Generator | None = None

    def begin_step(self, epoch: float | Tensor) -> None:
        """Set the temperature of a point in time, in epochs, where it follows a schedule."""
        self.schedule.follow(epoch)

    def forward(self, h_a: Float[Tensor, "B D"], h_b: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """L_G of two views' shared features, float32 under any autocast.

        Raises:
            ValueError: the views differ in shape, or there are more groups than images.

        """
        if h_a.shape != h_b.shape:
            raise UserError(f"the views' features differ: {tuple(h_a.shape)} and {tuple(h_b.shape)}")
        with torch.autocast(h_a.device.type, enabled=False):
            # Both views at once: on a GPU the many small steps of grouping take as long for two as for one.
            z = self.project(torch.cat([h_a, h_b])).unflatten(0, (2, len(h_a)))
            groups = self.group(z)
            logits = (z @ groups.centroids.flip(0).mT / self.schedule.value).masked_fill(
                (groups.sizes == 0).flip(0).unsqueeze(1), -torch.inf
            )
            # The targets of each view's images are their groups in the other view.
            targets = self._assignment_of_rank(groups).flip(0).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets)
        with torch.no_grad():
            agreement = (logits.detach().flatten(0, 1).argmax(1) == targets).float().mean()
            a, b = groups.unbind()
            self.last = StepStats(_detached(a), _detached(b), agreement)
        return loss

    def project(self, h: Float[Tensor, "B D"]) -> Float[Tensor, "B d"]:
        """The group features z, unit length."""
        dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        z: Tensor = self.branch(h.to(dtype))
        return F.normalize(z, dim=1)

    def group(self, z: Float[Tensor, "*V B d"]) -> Groups:
        """The local groups of each view's batch (of all ranks' batches with ``gather``)."""
        points = gather_rows(z.movedim(-2, 0)).movedim(0, -2) if self.gather else z
        k = self.groups or max(2, round(0.75 * points.shape[-2]))
        method = spherical_kmeans if self.grouping == "kmeans" else normalized_cut
        return method(points, k, self.iterations, self.init, self.generator, self.normalize_centroids)

    def _assignment_of_rank(self, groups: Groups) -> Tensor:
        """This rank's part of a gathered assignment."""
        if not self.gather:
            return groups.assignment
        return groups.assignment.chunk(world_size(), dim=-1)[rank()]


def _detached(groups: Groups) -> Groups:
    return groups._replace(centroids=groups.centroids.detach())
