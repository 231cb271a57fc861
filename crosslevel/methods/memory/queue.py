"""The memory of the newest keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from crosslevel.utils.errors import UserError, counted


class KeyQueue(nn.Module):
    """The newest ``size`` keys, first in, first out (He et al., CVPR 2020, section 3.2).

    ``keys`` (size, d), random unit vectors at first, as in the paper's code. Batches may have any size; if one is
    larger than the queue, its last ``size`` keys stay.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, features: int = 128) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"queue={size} must hold at least one key")
        self.size = size
        self.register_buffer("keys", F.normalize(torch.randn(size, features), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def early_rise(self, batch: int) -> str:
        """Why the loss rises while the queue fills, with ``batch`` keys a step (facebookresearch/moco issue 146)."""
        steps = -(-self.size // batch)
        return (
            f"the loss rises for about {counted(steps, 'step')}, until the queue's {self.size:,} random keys are "
            "replaced by images' keys, which are harder to tell apart"
        )

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "B d"]) -> None:
        """Replace the oldest keys by ``keys``."""
        newest = keys.detach()[-self.size :]
        skipped = len(keys) - len(newest)
        # Index arithmetic on the device: no step waits for the position to reach the host.
        slots = (self.position + skipped + torch.arange(len(newest), device=keys.device)) % self.size
        self.keys[slots] = newest.to(self.keys.dtype)
        self.position.copy_((self.position + len(keys)) % self.size)
