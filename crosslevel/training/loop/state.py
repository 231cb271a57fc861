"""The state of a training in a checkpoint: collected and restored, sharded or not, on any number of processes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosslevel.methods.memory import FORMER_EMA
from crosslevel.training.loop import graph
from crosslevel.training.loop.module import Pretrain
from crosslevel.utils.distributed import fill_part, is_sharded
from crosslevel.utils.errors import UserError

if TYPE_CHECKING:
    from crosslevel.training.loop.shards import Shards

NAMED = "named"  # key of the optimizer's state by the parameters' names, if some of it is sharded
_MODEL, _OPTIMIZER = "model", "optimizer"


def collect(module: Pretrain, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trees of module and optimizer and, separately and by name, the sharded tensors.

    All processes must call it, since memories may be sharded.
    """
    weights = module.state_dict()
    sharded = {f"{_MODEL}.{name}": tensor for name, tensor in weights.items() if is_sharded(tensor)}
    tree: dict[str, Any] = {"state_dict": {name: t for name, t in weights.items() if not is_sharded(t)}}
    if not sharded:
        return tree | {"optimizer_states": [optimizer.state_dict()]}, sharded
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and is_sharded(value):
                sharded[f"{_OPTIMIZER}.{key}.{name}"] = value
            else:
                by_parameter.setdefault(name, {})[key] = value
    return tree | {"optimizer_states": [{NAMED: by_parameter}]}, sharded


def restore(
    module: Pretrain, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], shards: Shards | None, file: Path
) -> None:
    """Restore module and optimizer from a checkpoint.

    Args:
        module: the training step.
        optimizer: the optimizer of its parameters.
        state: the checkpoint's tree.
        shards: its sharded tensors.
        file: the checkpoint, for messages.

    Raises:
        UserError: its components or sizes differ; the message names the first difference.

    """
    targets = _restore_weights(module, state["state_dict"], shards, file)
    saved = state["optimizer_states"][0]
    if shards is None and NAMED not in saved and not any(map(is_sharded, module.parameters())):
        flags = graph.flags(optimizer)
        optimizer.load_state_dict(saved)
        for group, saved_flags in zip(optimizer.param_groups, flags, strict=True):
            group.update(saved_flags)
        return
    by_parameter = saved.get(NAMED)
    if by_parameter is None:
        by_parameter = {name: saved["state"].get(i, {}) for i, name in enumerate(module.trained_names())}
    in_parts = _keys(shards)
    for name, parameter in module.named_parameters():
        values = {key: _placed(value, parameter, key) for key, value in by_parameter.get(name, {}).items()}
        for key in in_parts.get(name, ()):
            values[key] = targets[f"{_OPTIMIZER}.{key}.{name}"] = torch.zeros_like(parameter)
        if values:
            optimizer.state[parameter] = values
    if shards is not None:
        shards.fill(targets)


def present_name(name: str, current: Container[str]) -> str:
    """The name now of a tensor of a checkpoint, which may be of a former version; ``current`` has all names of now."""
    renamed = name.replace(f".{FORMER_EMA}.", ".ema.")
    return renamed if name not in current and renamed in current else name


def _restore_weights(
    module: Pretrain, weights: Mapping[str, Tensor], shards: Shards | None, file: Path
) -> dict[str, Tensor]:
    """Restore the unsharded tensors; return the tensors to be filled from shards, by their names there."""
    current = module.state_dict()
    stored_names = {present_name(name, current): name for name in weights}
    weights = {present: weights[name] for present, name in stored_names.items()}
    sizes = {name: list(tensor.shape) for name, tensor in weights.items()}
    for full, size in ({} if shards is None else shards.sizes).items():
        if full.startswith(f"{_MODEL}."):
            name = full.removeprefix(f"{_MODEL}.")
            stored_names[present_name(name, current)] = name
            sizes[present_name(name, current)] = size
    for name in sorted(current.keys() | sizes.keys()):
        stored, present = sizes.get(name, "missing"), list(current[name].shape) if name in current else "missing"
        if stored != present:
            raise UserError(
                f"{file} does not fit: {name} is {stored} in it and {present} here: it was begun with other images or "
                "settings; take those again, or start a new run"
            )
    filled, targets = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in current.items():
        if name not in weights:
            targets[f"{_MODEL}.{stored_names[name]}"] = filled[name] = tensor
        elif is_sharded(tensor):
            fill_part(tensor, weights[name])
            filled[name] = tensor
        else:
            filled[name] = weights[name]
    module.load_state_dict(filled)
    return targets


def _keys(shards: Shards | None) -> dict[str, list[str]]:
    """The sharded tensors of the optimizer's state, by the parameters' names."""
    keys_by_name: dict[str, list[str]] = {}
    for full in () if shards is None else shards.sizes:
        kind, _, path = full.partition(".")
        if kind == _OPTIMIZER:
            key, _, name = path.partition(".")
            keys_by_name.setdefault(name, []).append(key)
    return keys_by_name


def _placed(value: Any, parameter: Tensor, key: str) -> Any:
    """A value of the optimizer's state with the parameter's device and type."""
    if not isinstance(value, Tensor) or key == "step":
        return value
    if not is_sharded(parameter):
        return value.to(parameter.device)
    part = torch.zeros_like(parameter)
    fill_part(part, value)
    return part
