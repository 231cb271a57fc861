"""Batch normalization over the batches of all devices, for any backbone of timm's."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crosslevel.utils.distributed import add, world_size
from crosslevel.utils.errors import UserError


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization by the mean and variance of all ranks' batches, of any shape (B, C, ...), on any device.

    torch's own needs a GPU, and is faster there. Every rank's batch must have the same size.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalized; the gradient reaches all ranks' inputs."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = input.numel() / input.shape[1] * world_size()
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean: Tensor = _Sum.apply(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance: Tensor = _Sum.apply(centred.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise UserError(f"batch normalization needs (B, C, ...), not {tuple(input.shape)}")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return add(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return add(gradients[0])


PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNormAct(SyncBatchNorm):
    """A `SyncBatchNorm` with the dropout and the activation that timm's ``BatchNormAct2d`` has after it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalized, then through dropout and activation."""
        out: Tensor = self.act(self.drop(super().forward(input)))
        return out


def synchronize(module: nn.Module, on_gpu: bool = False) -> None:
    """Replace each batch normalization in ``module`` by one over all ranks; weights, statistics and activation stay.

    Args:
        module: the module to change, in place.
        on_gpu: take torch's own, which needs a GPU and is faster there.

    Raises:
        ValueError: a batch normalization that is neither torch's nor timm's; the module is then unchanged.

    """
    for name, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and type(norm) not in (*PLAIN, BatchNormAct2d, SyncBatchNorm, SyncBatchNormAct):
            raise UserError(
                f"sync_batchnorm cannot convert {name}, a {type(norm).__name__}: leave it out, or take another encoder"
            )
    if on_gpu:
        convert_sync_batchnorm(module)
    else:
        _convert(module)


def _convert(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, SyncBatchNorm):
            continue
        if isinstance(child, _BatchNorm):
            setattr(module, name, _synchronized(child))
        else:
            _convert(child)


def _synchronized(norm: _BatchNorm) -> SyncBatchNorm:
    kind = SyncBatchNormAct if isinstance(norm, BatchNormAct2d) else SyncBatchNorm
    built = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    built.weight, built.bias = norm.weight, norm.bias
    built.running_mean, built.running_var = norm.running_mean, norm.running_var
    built.num_batches_tracked = norm.num_batches_tracked
    if isinstance(norm, BatchNormAct2d) and isinstance(built, SyncBatchNormAct):
        built.drop, built.act = norm.drop, norm.act
    return built.train(norm.training)
