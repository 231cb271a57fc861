"""Projection heads, plain and normalized (Wang, Liu, Yu, CVPR 2021, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslevel.utils.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

Head = Literal["linear", "mlp", "norm-linear", "norm-mlp"]


def projection_head(
    kind: Head,
    in_features: int,
    out_features: int = 128,
    hidden: int | None = None,
    batch_norm: bool = False,
    hidden_layers: int = 1,
    norm_output: bool = False,
) -> nn.Sequential:
    """A head (B, in_features) -> (B, out_features).

    Args:
        kind: ``linear``; ``mlp`` (Linear, ReLU, Linear); ``norm-linear`` and ``norm-mlp``, whose last layer
            is a `NormLinear`.
        in_features: D, the encoder's features.
        out_features: d, the features that are compared.
        hidden: units of the hidden layer; as many as ``in_features`` unless given.
        batch_norm: normalize the hidden layer's batch before the ReLU, as BYOL's heads do.
        hidden_layers: how many of them an MLP has.
        norm_output: normalize the batch of the outputs, without weights of its own, as SimSiam's projector does.

    Raises:
        ValueError: an unknown kind.

    """
    if kind not in get_args(Head):
        raise UserError(f"head={kind!r} is not one of {', '.join(get_args(Head))}")
    width = hidden or in_features
    first: list[nn.Module] = []
    for layer in range(hidden_layers if kind.endswith("mlp") else 0):
        norm = [nn.BatchNorm1d(width)] if batch_norm else []
        first += [nn.Linear(width if layer else in_features, width), *norm, nn.ReLU()]
    fan_in = width if first else in_features
    last = NormLinear(fan_in, out_features) if kind.startswith("norm") else nn.Linear(fan_in, out_features)
    return nn.Sequential(*first, last, *([nn.BatchNorm1d(out_features, affine=False)] if norm_output else []))


def rebuilt_head(kind: Head, state: Mapping[str, Tensor]) -> nn.Sequential:
    """The head of ``kind`` that has these weights, in evaluation mode."""
    matrices = {int(name.split(".")[0]): value for name, value in state.items() if value.ndim == 2}
    norms = [int(name.split(".")[0]) for name in state if name.endswith("running_mean")]
    first, last, hidden_layers = matrices[min(matrices)], max(matrices), len(matrices) - 1
    head = projection_head(
        kind, first.shape[1], matrices[last].shape[0], first.shape[0] if hidden_layers else None,
        any(layer < last for layer in norms), hidden_layers, any(layer > last for layer in norms),
    )  # fmt: skip
    head.load_state_dict(dict(state))
    return head.eval()


def load_head(file: Path) -> nn.Sequential:
    """The instance branch's head that a run left, in evaluation mode.

    Raises:
        UserError: the file is damaged, or of something else.

    """
    from crosslevel.utils.tensors import load_safetensors  # noqa: PLC0415  # a plain loop's two lines need torch alone

    state, metadata = load_safetensors(file)
    kind = next((head for head in get_args(Head) if head == metadata.get("head")), None)
    if kind is None:
        raise UserError(f"{file} does not say which head it holds: Crosslevel did not write it")
    return rebuilt_head(kind, state)


def stacked(instance: nn.Sequential, group: nn.Sequential) -> nn.Sequential:
    """The group head on the unit features of the instance head."""
    return nn.Sequential(*instance, Unit(), *group)


class Unit(nn.Module):
    """Rows at unit length."""

    def forward(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        """Divided by their length."""
        return F.normalize(x, dim=-1)


class NormLinear(nn.Module):
    """Cosine of the input and each weight vector: both are L2-normalized, and there is no bias.

    (B, in_features) -> (B, out_features), each value in [-1, 1].
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        # Directions uniform on the sphere; the length is irrelevant to the output but scales the gradient.
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, x: Float[Tensor, "B in_features"]) -> Float[Tensor, "B out_features"]:
        """The cosines."""
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
