"""The moving average of a network, and how its momentum rises."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from crosslevel.models.schedules import half_cosine
from crosslevel.utils.distributed import local
from crosslevel.utils.errors import UserError

FORMER_EMA = "twin"  # the name of `MomentumCopy.ema` in checkpoints of former versions


class MomentumCopy(nn.Module):
    """An exponential moving average of a module, without gradients (He et al., CVPR 2020, eq. 2).

    ``momentum`` m may change between steps, and is a tensor if the step is captured. ``ema`` is the averaged module.
    Its parameters follow ema <- m * ema + (1 - m) * module; its buffers (batch statistics) are its own, updated by
    its own forward passes.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise UserError(f"momentum={momentum} must be in [0, 1]")
        self.momentum: float | Tensor = momentum
        self.ema = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The output of the averaged module."""
        out: Tensor = self.ema(x)
        return out

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step of the average towards ``module``."""
        # If both are sharded in the same way, each part of the average follows its counterpart.
        averages: list[Tensor] = [local(p) for p in self.ema.parameters()]
        parameters = [local(p.detach()) for p in module.parameters()]
        if isinstance(self.momentum, Tensor):
            way = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(way, 1 - self.momentum)
            torch._foreach_add_(averages, way)
        else:
            torch._foreach_lerp_(averages, parameters, 1 - self.momentum)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # The children are loaded after this, from the same dict.
        for name in [name for name in state_dict if name.startswith(f"{prefix}{FORMER_EMA}.")]:
            state_dict[f"{prefix}ema{name.removeprefix(f'{prefix}{FORMER_EMA}')}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def rising(start: float, progress: float | Tensor) -> float | Tensor:
    """A momentum that rises to 1: 1 - (1 - start) (cos(pi progress) + 1) / 2 (Grill et al. 2020, app. A)."""
    return 1 - (1 - start) * half_cosine(progress)
