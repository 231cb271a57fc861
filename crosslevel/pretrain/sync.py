"""Batch normalization over the batches of all devices, for any backbone of timm's."""

from __future__ import annotations

from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crosslevel.distributed import SyncBatchNorm

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
    """Every batch normalization inside ``module`` becomes one over all ranks; weights, statistics and activation stay.

    Args:
        module: what contains them; it is changed in place.
        on_gpu: take torch's own, which needs a GPU and is faster there.

    Raises:
        ValueError: a batch normalization that is neither torch's nor timm's; nothing is changed then.

    """
    for place, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and type(norm) not in (*PLAIN, BatchNormAct2d, SyncBatchNorm, SyncBatchNormAct):
            raise ValueError(
                f"sync_batchnorm cannot convert {place}, a {type(norm).__name__}: leave it out, or take another encoder"
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
