"""InfoMin: Tian, Sun, Poole, Krishnan, Schmid, Isola, "What Makes for Good Views for Contrastive Learning?",
NeurIPS 2020.

The views share less irrelevant information: stronger augmentation (the preset ``infomin``) in MoCo's contrast at T =
0.15, and a jigsaw branch after PIRL (Misra and van der Maaten, CVPR 2020). The features of nine patches of a view, in
random order, are joined to one feature that has to match the same key::

    L = (1 - β) L_MoCo(q, k+) + β L_MoCo(jigsaw(patches), k+)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.methods.base import check_splits, encode_in_parts, feature_size, in_float32
from crosslevel.methods.moco import Queued
from crosslevel.models.heads import Head, projection_head
from crosslevel.utils.distributed import draw_share
from crosslevel.utils.errors import UserError

GRID = 3  # patches a side


class InfoMin(Queued):
    """Query views and a jigsaw of another view against one key view and a queue of earlier keys."""

    def __init__(
        self,
        encoder: nn.Module,
        images: int | None = None,
        *,
        temperature: float = 0.15,
        temperature_max: float | None = None,
        temperature_period: float | None = None,
        queue: int | None = None,
        momentum: float | None = None,
        jigsaw: float = 0.5,
        head: Head = "mlp",
        out_features: int = 128,
        hidden: int | None = None,
        online: int = 1,
        shuffle: bool = True,
        splits: int = 1,
    ) -> None:
        """Build the instance branch, the jigsaw branch, the momentum network and the queue.

        Args:
            queue: K, the number of negative keys; 65,536 in the paper. 4,096 unless given; `train` chooses it by the
                number of images.
            momentum: m of the key network's moving average. 0.999 unless given; `train` chooses it by the number of
                steps.
            jigsaw: β, the jigsaw branch's share of the loss, in [0, 1); 0 leaves the branch out.
            head: of the instance and the jigsaw branch: linear, mlp, norm-linear or norm-mlp.
            online: number of query views; raised to 2 where another branch compares two trained views.
            shuffle: compute a key on another device than its query (ShuffleBN).
            splits: parts of each device's batch that both networks normalize separately, queries and patches in the
                batch's order and keys at random: on one device this equals ShuffleBN on that many devices.

        """
        super().__init__(encoder, head, out_features, hidden)
        self.set_temperature(temperature, temperature_max, temperature_period)
        if not 0 <= jigsaw < 1:
            raise UserError(f"jigsaw={jigsaw} must be in [0, 1): it is the jigsaw branch's share of the loss")
        check_splits(splits)
        self.queue, self.momentum, self.jigsaw = queue, momentum, jigsaw
        self.online, self.shuffle, self.splits = online, shuffle, splits
        self.plain_views = int(jigsaw > 0)
        self.extra_views = 1 + self.plain_views
        if jigsaw:
            self.jigsaw_branch = JigsawHead(head, feature_size(encoder), out_features, hidden)
        self._remember(encoder)

    def forward(
        self,
        views: Sequence[Float[Tensor, "B 3 h w"]],
        features: Sequence[Float[Tensor, "B D"]],
        index: Int64[Tensor, " B"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B d"]]:
        """The loss of queries and jigsaw; the keys are returned for the queue.

        The views are the queries, the key, and the one that is cut into patches.
        """
        positive = self.encode_key(views[self.online])
        queries = [self.project(h) for h in features[: self.online]]
        instance = torch.stack([self.contrast(query, positive) for query in queries]).mean()
        if not self.jigsaw:
            return instance, positive
        h = encode_in_parts(lambda part: self.encoder(patches(part)), views[self.online + 1], self.splits)
        with torch.autocast(h.device.type, enabled=False):
            joined = in_float32(self.jigsaw_branch, h)
        return (1 - self.jigsaw) * instance + self.jigsaw * self.contrast(joined, positive), positive

    def piece_size(self, view: int) -> int | None:
        """The patches' size; None without a jigsaw."""
        return patch_size(view) if self.jigsaw else None


class JigsawHead(nn.Module):
    """The features of nine patches an image, in a random order for each image, joined to one unit feature."""

    def __init__(self, head: Head, in_features: int, out_features: int, hidden: int | None = None) -> None:
        super().__init__()
        self.patch = projection_head(head, in_features, out_features, hidden)
        last: Head = "norm-linear" if head.startswith("norm") else "linear"
        self.join = projection_head(last, GRID**2 * out_features, out_features)

    def forward(self, h: Float[Tensor, "9B D"]) -> Float[Tensor, "B d"]:
        """(9B, D), an image's nine patches one after the other, -> (B, d)."""
        z = self.patch(h).unflatten(0, (-1, GRID**2))
        order = draw_share(lambda images: torch.rand(images, GRID**2, device=z.device), len(z), 0).argsort(1)
        shuffled = z.gather(1, order.unsqueeze(2).expand_as(z))
        return F.normalize(self.join(shuffled.flatten(1)), dim=1)


def patch_size(view: int) -> int:
    """Height and width of a patch: 2 / 7 of the view's, but within a third of it.

    At 224 pixels that is 64, as in PIRL. PIRL and InfoMin divide a crop of 255 pixels into 3 x 3 cells and cut one
    patch from each, so that a cell has 85 pixels. Here the jigsaw's crop has the size of the other views, and its cells
    have 74 pixels: patches can move by 10 pixels instead of 21, and show a larger share of the image.
    """
    return max(1, min(view // GRID, round(view * 2 / 7)))


def patches(view: Float[Tensor, "B 3 s s"]) -> Float[Tensor, "9B 3 p p"]:
    """A patch at a random position in each of the 3 x 3 cells of every view, row by row, an image's nine in sequence.

    A cell is a third of the view, 74 pixels at 224.
    """
    images, side = len(view), view.shape[-1]
    cell, size = side // GRID, patch_size(side)
    corner = torch.arange(GRID, device=view.device) * cell
    rows = corner.unsqueeze(1).expand(-1, GRID).flatten()
    first = torch.stack([rows, corner.repeat(GRID)])  # (2, 9): top and left
    room = draw_share(lambda count: torch.randint(cell - size + 1, (2, count, GRID**2), device=view.device), images, 1)
    pixels = (first.unsqueeze(1) + room).unsqueeze(3) + torch.arange(size, device=view.device)  # (2, B, 9, p)
    image = torch.arange(images, device=view.device).view(-1, 1, 1, 1)
    cut = view[image, :, pixels[0].unsqueeze(3), pixels[1].unsqueeze(2)]  # (B, 9, p, p, 3)
    return cut.permute(0, 1, 4, 2, 3).flatten(0, 1)
