"""Factors in the course of a training: of a learning rate, of a momentum; temperature.py has a temperature's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def half_cosine(done: float | Tensor) -> float | Tensor:
    """From 1 at the start to 0 at the end along half a cosine; a tensor if ``done`` is one."""
    angle = math.pi * done
    return 0.5 * (1 + (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)))


def warmed_up(step: int, steps: int, warmup: int) -> float:
    """Linear from 1/100 to 1 over ``warmup`` steps, then half a cosine to 0."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return float(half_cosine(min(1.0, (step - warmup) / max(1, steps - warmup))))


def tenfold_lower(done: float) -> float:
    """1, a tenth of it after 60 % and a hundredth after 80 %."""
    return 1.0 if done < 0.6 else 0.1 if done < 0.8 else 0.01


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: float(half_cosine(done)),
    "step": tenfold_lower,
}
"""The schedules by name, as functions of the share of the training that is done."""
