"""Collective operations for losses in a distributed run: the number of ranks, and every rank's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (B, ...) -> (world * B, ...), with gradients to every rank.

    Each rank must have the same number of rows. The backward pass sums the gradients of all ranks, so that a loss
    averaged over ranks has the gradient of the same loss on one process.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


@torch.no_grad()
def add(values: Tensor) -> Tensor:
    """The sum over all ranks; no gradient passes."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def mean(values: Tensor) -> Tensor:
    """The mean over all ranks; no gradient passes."""
    return add(values) / world_size()


@torch.no_grad()
def broadcast(values: Tensor) -> Tensor:
    """Rank 0's values."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values


@torch.no_grad()
def draw_share(draw: Callable[[int], Tensor], rows: int, dim: int) -> Tensor:
    """This rank's ``rows`` along ``dim`` of rank 0's draw for all ranks, which a single process would draw as well."""
    return broadcast(draw(rows * world_size())).chunk(world_size(), dim)[rank()]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds only a part of the tensor (FSDP2)."""
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes a second to import


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; another tensor as it is."""
    parted: Any = tensor
    return parted.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (all ranks must call this together); another tensor as it is."""
    parted: Any = tensor
    return parted.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill_part(tensor: Tensor, values: Tensor) -> None:
    """Copy this rank's rows of the full ``values`` into its part of ``tensor``, divided as by FSDP2."""
    shard = local(tensor)
    if shard.numel():
        shard.copy_(values.chunk(world_size())[rank()])


def wait() -> None:
    """Return when all ranks have called it."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def shuffled(rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Shuffle rows across all ranks; return this rank's share, and a function that undoes it for results.

    The function takes results computed from the shuffled rows (B, ...), and returns the results of this rank's own rows
    in their order. No gradient passes. Rank 0 draws the permutation.
    """
    order = broadcast(torch.randperm(len(rows) * world_size(), device=rows.device))

    @torch.no_grad()
    def unshuffle(results: Tensor) -> Tensor:
        return gather(results)[order.argsort().chunk(world_size())[rank()]]

    return gather(rows)[order.chunk(world_size())[rank()]], unshuffle


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # A copy, as other terms of the loss may have received the same gradient.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
