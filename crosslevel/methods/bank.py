"""A memory bank that the ranks of a distributed run share out among themselves."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from crosslevel.distributed import add, broadcast, gather, rank, world_size
from crosslevel.memory import InstanceBank


class ShardedBank(nn.Module):
    """An `InstanceBank` of which rank r of w keeps every w-th row, from the r-th on.

    At 1,281,167 images, d = 128 and float16, the whole bank is 328 MB; of it each rank holds a w-th part. Ranks ask
    each other only for the rows of a step, so that time and traffic a step do not grow with the number of images.
    Saved, it is the whole bank again, for any number of ranks.
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
        """The rows of ``index``, which is this rank's own, of the same length on all."""
        return self.common(gather(index)).chunk(world_size())[rank()]

    def common(self, index: Int64[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """The rows of indices that are the same on all ranks."""
        self._share_out()
        mine = index % self.shards == self._place
        rows = self.bank.rows.new_zeros(len(index), self.bank.rows.shape[1])
        rows[mine] = self.bank.rows[index[mine] // self.shards]
        return add(rows)

    def draw(self, count: int) -> Int64[Tensor, " m"]:
        """``count`` indices, uniformly and with repetition, the same on all ranks."""
        return broadcast(torch.randint(self.images, (count,), device=self.bank.rows.device))

    @torch.no_grad()
    def update(self, index: Int64[Tensor, " B"], z: Float[Tensor, "B d"]) -> None:
        """Move this rank's rows among ``index``, the indices of all ranks, towards ``z``."""
        self._share_out()
        mine = index % self.shards == self._place
        self.bank.update(index[mine] // self.shards, z[mine])

    @property
    def _place(self) -> int:
        return rank() if self.shards > 1 else 0

    def _share_out(self) -> None:
        # The bank is built, and read from a checkpoint, before the ranks know each other.
        if self.shards == 1 and world_size() > 1:
            self.shards = world_size()
            self.bank.rows = self.bank.rows[rank() :: self.shards].clone()

    def _whole(self) -> Tensor:
        if self.shards == 1:
            return self.bank.rows
        longest = -(-self.images // self.shards)
        rows = self.bank.rows
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
        # (w, longest, d): row i of shard r is image i * w + r.
        by_shard: Tensor = gather(padded).unflatten(0, (self.shards, longest))
        return by_shard.transpose(0, 1).flatten(0, 1)[: self.images]

    def state_dict(self, *arguments: Any, prefix: str = "", **options: Any) -> Any:
        """The whole bank; all ranks must ask for it together."""
        state = super().state_dict(*arguments, prefix=prefix, **options)
        state[f"{prefix}bank.rows"] = self._whole()
        return state

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # The children are loaded after this: they find room for the whole bank.
        if self.shards > 1:
            self.shards = 1
            self.bank.rows = self.bank.rows.new_empty(self.images, self.bank.rows.shape[1])
        super()._load_from_state_dict(*arguments)
