"""Selects the trained parameters of a network: all, the last blocks, the normalizations, or small additions.

``lora`` is Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: W + (s / r) B A in place of W.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crosslevel.utils.errors import UserError

RANK, SCALE = 8, 16  # r and s, as in the paper's code for its smaller models


class LoRA(nn.Module):
    """W (o, i) -> W + (s / r) B A, which starts as W: A (r, i) is random, B (o, r) is zero."""

    def __init__(self, weight: Float[Tensor, "o i"], rank: int) -> None:
        super().__init__()
        self.scale = SCALE / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The weight that is used."""
        return weight + self.scale * (self.b @ self.a)


def restrict(network: nn.Module, spec: str) -> None:
    """Train only a part of the network.

    Args:
        network: a timm model.
        spec: ``all``; ``last:N``, the last N blocks and what follows them; ``norm``, weights and biases of the
            normalizations; ``lora`` or ``lora:R``, additions of rank R (8) to the linear layers' weights.

    Raises:
        UserError: none of these, or a network that has no such part.

    """
    kind, _, number = spec.partition(":")
    if kind not in ("all", "last", "norm", "lora") or (number and kind in ("all", "norm")):
        raise UserError(f"encoder.train={spec!r}: give all, last:N, norm or lora")
    if (number or kind == "last") and not re.fullmatch(r"[1-9]\d*", number):
        raise UserError(f"encoder.train={spec!r}: give a whole number of at least 1 after the colon, such as {kind}:4")
    if kind == "all":
        return
    parameters = (
        _last(network, int(number)) if kind == "last" else _of_normalizations(network) if kind == "norm" else []
    )
    if kind == "norm" and not parameters:
        raise UserError("encoder.train=norm: the network has no normalization with weights: give all or last:N")
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    if kind == "lora":
        _add(network, int(number or RANK))


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state of the plain network, with every addition merged into its weight."""
    state = network.state_dict()
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            before = f"{name}.parametrizations.weight."
            state = {key: value for key, value in state.items() if not key.startswith(before)}
            state[f"{name}.weight"] = module.weight.detach()
    return state


def _last(network: nn.Module, count: int) -> list[nn.Parameter]:
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise UserError("encoder.train=last:N: timm does not know this network's blocks: give all or norm")
    layer_of: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    parameters = dict(network.named_parameters())
    top = max(layer_of.values())
    # In some networks the last normalization is a separate layer: it belongs to the last block.
    while top > 1 and all(parameters[name].ndim <= 1 for name, layer in layer_of.items() if layer == top):
        top -= 1
    if count > top:
        raise UserError(f"encoder.train=last:{count}: the network has {top} blocks: give at most last:{top}")
    return [parameters[name] for name, layer in layer_of.items() if layer > top - count]


def _of_normalizations(network: nn.Module) -> list[nn.Parameter]:
    norms = (m for m in network.modules() if "norm" in type(m).__name__.lower())
    return [parameter for module in norms for parameter in module.parameters(recurse=False)]


def _add(network: nn.Module, rank: int) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError("encoder.train=lora: the network has no linear layers: give all, last:N or norm")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))


@torch.no_grad()
def still(network: nn.Module) -> None:
    """Freeze the statistics of batch normalizations that are not trained."""
    for module in network.modules():
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch and module.weight is not None and not module.weight.requires_grad:
            module.eval()
