"""The memory of one vector an image, on one rank or spread over all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.utils.distributed import add, broadcast, gather, rank, world_size
from crosslevel.utils.errors import UserError


class InstanceBank(nn.Module):
    """One unit vector for every image (Wu et al., CVPR 2018, section 3.2).

    ``rows`` (N, d). An update moves a row towards the new feature, row <- l2(momentum * row + (1 - momentum) * z).

    Args:
        images: N.
        features: d.
        momentum: the weight of the old row, in [0, 1).
        dtype: of the rows; float16 halves the memory.

    """

    rows: Tensor

    def __init__(
        self, images: int, features: int = 128, momentum: float = 0.5, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum} must be in [0, 1)")
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(images, features), dim=1).to(dtype))

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def forward(self, index: Int64[Tensor, " B"]) -> Float[Tensor, "B d"]:
        """The rows of ``index``."""
        return self.rows[index]

    def common(self, index: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The rows of indices that are the same on all ranks."""
        return self.rows[index]

    def draw(self, count: int) -> Int64[Tensor, " m"]:
        """``count`` indices, uniformly and with repetition, from torch's own generator."""
        return torch.randint(len(self.rows), (count,), device=self.rows.device)

    @torch.no_grad()
    def update(self, index: Int64[Tensor, " B"], z: Float[Tensor, "B d"]) -> None:
        """Move the rows of ``index`` towards ``z``; an index must not repeat."""
        mixed = torch.lerp(z.detach().float(), self.rows[index].float(), self.momentum)
        self.rows[index] = F.normalize(mixed, dim=1).to(self.rows.dtype)


class ShardedBank(nn.Module):
    """An `InstanceBank` whose rows are spread over the ranks: rank r of w keeps every w-th row, from the r-th on.

    At 1,281,167 images, d = 128 and float16, the whole bank is 328 MB; each rank holds a w-th part of it. Ranks
    exchange only the rows of a step, so that time and traffic of a step do not grow with the number of images. A
    checkpoint has the whole bank, for any number of ranks.
    """

    def __init__(self, bank: InstanceBank) -> None:
        super().__init__()
        self.images, self.shards = len(bank), 1
        self.bank = bank

    def __len__(self) -> int:
        """N, of all ranks."""
        return self.images

    @property
    def rows(self) -> Tensor:
        """This rank's rows."""
        return self.bank.rows

    def forward(self, index: Int64[Tensor, " B"]) -> Float[Tensor, "B d"]:
        """The rows of ``index``; each rank has its own indices, the same number on all."""
        return self.common(gather(index)).chunk(world_size())[rank()]

    def common(self, index: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The rows of indices that are the same on all ranks."""
        self._share_out()
        local = index % self.shards == self._shard
        rows = self.bank.rows.new_zeros(len(index), self.bank.rows.shape[1])
        rows[local] = self.bank.rows[index[local] // self.shards]
        return add(rows)

    def draw(self, count: int) -> Int64[Tensor, " m"]:
        """``count`` indices, uniformly and with repetition, the same on all ranks."""
        return broadcast(torch.randint(self.images, (count,), device=self.bank.rows.device))

    @torch.no_grad()
    def update(self, index: Int64[Tensor, " B"], z: Float[Tensor, "B d"]) -> None:
        """Move this rank's rows among ``index``, the indices of all ranks, towards ``z``."""
        self._share_out()
        local = index % self.shards == self._shard
        self.bank.update(index[local] // self.shards, z[local])

    @property
    def _shard(self) -> int:
        return rank() if self.shards > 1 else 0

    def _share_out(self) -> None:
        # The bank is built, and read from a checkpoint, before the ranks are connected.
        if self.shards == 1 and world_size() > 1:
            self.shards = world_size()
            self.bank.rows = self.bank.rows[rank() :: self.shards].clone()

    def _full(self) -> Tensor:
        if self.shards == 1:
            return self.bank.rows
        longest = -(-self.images // self.shards)
        rows = self.bank.rows
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        # (w, longest, d): row i of shard r is image i * w + r.
        by_shard: Tensor = gather(padded).unflatten(0, (self.shards, longest))
        return by_shard.transpose(0, 1).flatten(0, 1)[: self.images]

    def state_dict(self, *arguments: Any, prefix: str = "", **options: Any) -> Any:
        """The whole bank; all ranks must call this together."""
        state = super().state_dict(*arguments, prefix=prefix, **options)
        state[f"{prefix}bank.rows"] = self._full()
        return state

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # The children are loaded after this, and need room for the whole bank.
        if self.shards > 1:
            self.shards = 1
            self.bank.rows = self.bank.rows.new_empty(self.images, self.bank.rows.shape[1])
        super()._load_from_state_dict(*arguments)
