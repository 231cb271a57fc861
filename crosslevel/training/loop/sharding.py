"""Sharded encoders: FSDP2 (Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023).

Every device keeps a part of each weight of an encoder (the trained one, and its moving average), with that part's
gradient and optimizer state. A block's weights are gathered when it is computed, and freed at once. A moving average is
updated part by part. Heads, banks and queues are small beside an encoder, and are not sharded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.module import Pretrain
from crosslevel.utils.distributed import full_tensor, is_sharded, mean
from crosslevel.utils.errors import UserError

Strategy = Literal["ddp", "fsdp"]
LOW = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
"""Weights are sent and multiplied in bfloat16; autocast's own copies would all be kept until the backward pass."""
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # these classes themselves: subclasses may compute otherwise


def check_strategy(strategy: Strategy, optimizer: str, precision: str) -> None:
    """Refuse settings that would be wrong with sharded weights.

    Raises:
        UserError: an optimizer that needs norms of whole layers; float16, whose scale all processes must agree on.

    """
    if strategy == "fsdp" and optimizer == "lars":
        raise UserError("--strategy fsdp: lars takes norms of whole layers: give --optimizer sgd or adamw")
    if strategy == "fsdp" and precision == "fp16":
        raise UserError("--strategy fsdp: give --precision bf16 or fp32: float16's scale is one process's own")


class Sharding:
    """A training with a sharded encoder, and an unsharded copy for everything outside of the step.

    Attributes:
        unsharded: the unsharded encoder, on the host of the first process; `gather` updates it. On other processes it
            holds no weights.

    """

    def __init__(self, module: Pretrain, precision: str) -> None:
        self.module, self.precision, self.unsharded = module, precision, module.encoder
        module.train_on(copy.deepcopy(module.encoder))

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Divide all encoders among the processes of ``mesh``, move everything to its device, and return the module."""
        on_gpu = mesh.device_type == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
        data = mesh["data_parallel"]
        with _without_encoders(module) as encoders:
            module.to(device)
        for encoder in encoders:
            for block in blocks(encoder.backbone):
                if self.precision == "bf16" and (layers := _multiplying(block)):
                    fully_shard(layers, mesh=data, reshard_after_forward=True, mp_policy=LOW)
                fully_shard(block, mesh=data, reshard_after_forward=True)
            encoder.register_forward_hook(_copied)
            fully_shard(encoder, mesh=data, reshard_after_forward=True)
        if self.module.rank:
            self.unsharded.to("meta")
        return module

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients of unsharded parameters over all ranks; FSDP2 averages those of sharded ones itself."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None and not is_sharded(p)]
        if gradients:
            flat = mean(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
            for gradient, averaged in zip(gradients, flat, strict=True):
                gradient.copy_(averaged.view_as(gradient))

    @torch.no_grad()
    def gather(self) -> None:
        """Update the unsharded encoder, one tensor after the other; all processes must call it."""
        targets = self.unsharded.state_dict()
        for name, tensor in self.module.encoder.state_dict().items():
            gathered = full_tensor(tensor)
            if self.module.rank == 0:
                targets[name].copy_(gathered)

    def end(self) -> None:
        """Put the unsharded encoder into the module, on the host; a moving average stays sharded."""
        self.module.train_on(self.unsharded)
        with _without_encoders(self.module):
            self.module.cpu()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, inner ones first; each is gathered at a time."""
    by_id: dict[int, nn.Module] = {}
    for part in network.modules():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            kinds = Counter(type(child) for child in part)
            for child in part:
                has_weights = any(True for _ in child.children()) and any(True for _ in child.parameters())
                if kinds[type(child)] > 1 and has_weights and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    by_id[id(child)] = child
    return list(by_id.values())[::-1]


def _copied(module: nn.Module, images: Any, features: Tensor) -> Tensor:
    """Features in their own memory: FSDP2's hooks on a view would not survive an in-place operation."""
    return features.clone()


def _multiplying(block: nn.Module) -> list[nn.Module]:
    """The layers of a block whose weights autocast would turn into bfloat16, without those of blocks within it."""
    within = {id(part) for inner in block.modules() if isinstance(inner, FSDPModule) for part in inner.modules()}
    return [
        part
        for part in block.modules()
        # A layer with a replaced forward pass is computed in float32 (`numerics.avoid_faults`).
        if type(part) in _CAST and id(part) not in within and "forward" not in vars(part)
    ]


@contextmanager
def _without_encoders(module: nn.Module) -> Iterator[list[Encoder]]:
    """While the block runs, all encoders are taken out of ``module``; they are yielded."""
    slots = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Encoder)
    ]
    for parent, name, _ in slots:
        setattr(parent, name, nn.Identity())
    try:
        yield [child for _, _, child in slots]
    finally:
        for parent, name, child in slots:
            setattr(parent, name, child)
