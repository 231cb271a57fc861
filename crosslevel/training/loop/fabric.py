"""Devices, precision and distribution of a training, by Lightning Fabric."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import ModelParallelStrategy

from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.module import Pretrain
from crosslevel.training.loop.sharding import Sharding
from crosslevel.utils.device import Hardware
from crosslevel.utils.errors import CrosslevelError, MachineError, UserError
from crosslevel.utils.processes import World, by_torchrun, shares_store

PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}
_CLOSED = re.compile(r"[Cc]onnection (closed|reset|refused)|[Rr]emote process|[Tt]imed out|EOF|NCCL|peer")


def fabric_of(hardware: Hardware, ranks: World, callbacks: Sequence[Any], sharding: Sharding | None = None) -> Fabric:
    """Build the Fabric; it starts its own processes unless torchrun did, and ignores a cluster's variables."""
    on_gpu = hardware.device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    # Lightning's banners are for its own users; ours get one line about device and precision.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if by_torchrun():
        _meet_again("nccl" if on_gpu else "gloo")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
    strategy: Any = "ddp" if ranks.size > 1 else "auto"
    if sharding is not None:
        strategy = ModelParallelStrategy(sharding.shard, data_parallel_size=ranks.size, tensor_parallel_size=1)
    return Fabric(
        accelerator="gpu" if on_gpu else hardware.device.type,
        devices=ranks.devices,
        num_nodes=ranks.nodes,
        strategy=strategy,
        precision=PRECISIONS[hardware.precision],
        plugins=[TorchElasticEnvironment() if by_torchrun() else LightningEnvironment()],
        callbacks=list(callbacks),
    )


def set_up(fabric: Fabric, module: Pretrain, sharding: Sharding | None) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Move module and optimizer to the device; return the wrapped module, the optimizer, and the wrapped optimizer."""
    if sharding is None:
        optimizer = module.configure_optimizer()
        called, stepped = fabric.setup(module, optimizer)
        return called, optimizer, stepped
    called = fabric.setup_module(module)
    optimizer = module.configure_optimizer()  # of the sharded parameters, which exist only now
    return called, optimizer, fabric.setup_optimizers(optimizer)


def _meet_again(backend: str) -> None:
    """After a restart by torchrun, connect the processes under this attempt's name.

    torchrun may keep one store for all attempts, in which gloo would find the addresses of dead processes. Each of
    several agents counts its own attempts: then torchrun must have a separate store for each attempt.
    """
    attempt, shared = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), shares_store()
    if attempt == 0 or not shared or dist.is_initialized():
        return
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)


MEMORY_SHARE = 0.25
_STATE = {"sgd": 1, "lars": 1, "adamw": 2}  # numbers that an optimizer stores for each weight


def check_memory(module: Pretrain, memory: int | None, shards: int = 1) -> None:
    """Refuse a model that is too large for a device: all of it, or its part with sharding.

    Args:
        module: the training step.
        memory: bytes of a device; None if unknown.
        shards: the number of parts that its encoders are divided into.

    Raises:
        UserError: weights, gradients, the optimizer's state and memories need more, even without activations.

    """
    copies = {True: 2 + _STATE[module.optimizer_name], False: 1}  # trained ones with gradients and optimizer state
    encoders = [part for part in module.modules() if isinstance(part, Encoder)]
    divided = {id(p) for encoder in encoders for p in encoder.parameters()}
    needed = sum(t.numel() * t.element_size() for t in module.buffers())
    needed += sum(
        p.numel() * p.element_size() * copies[p.requires_grad] // (shards if id(p) in divided else 1)
        for p in module.parameters()
    )
    if memory is not None and needed > memory:
        more = "more --devices" if shards > 1 else "several --devices with --strategy fsdp"
        raise UserError(
            f"the training keeps {needed / 1e9:.3g} GB on each device (weights, gradients, optimizer, memories) of "
            f"{memory / 1e9:.3g} GB: give {more}, take a smaller --encoder.name, or --optimizer sgd"
        )


def memory_of(device: torch.device) -> int | None:
    """The bytes of a GPU; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def hold_images(batches: Any, device: torch.device) -> None:
    """Move images in memory to the GPU, if they take at most the share `MEMORY_SHARE` of its free memory."""
    images = batches.images if isinstance(batches, TrainBatches) else None
    if device.type == "cuda" and isinstance(images, InMemoryImages):
        free, _ = torch.cuda.mem_get_info(device)
        if images.data.numel() <= MEMORY_SHARE * free:
            batches.images = images.on(device)


def check_step(fabric: Fabric, step: int) -> None:
    """Refuse to train if some processes continue and others begin, or if they continue from different steps.

    Raises:
        MachineError: the processes disagree.

    """
    if fabric.world_size == 1:
        return
    ends = torch.tensor([-step, step], device=fabric.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    first, last = -int(ends[0]), int(ends[1])
    if first != last:
        raise MachineError(
            f"the processes would continue from different checkpoints (of step {first} and of step {last}): give all "
            "of them the same --run, on a disk that they share"
        )


@contextmanager
def all_ranks_end(fabric: Fabric) -> Iterator[None]:
    """End all processes when the first rank fails: those that it started would wait for it for ever.

    Raises:
        MachineError: another process has died; the others only notice a closed connection.

    """
    try:
        yield
    except BaseException as error:
        processes = list(getattr(fabric.strategy.launcher, "procs", ()))
        dead = [(n, process.poll()) for n, process in enumerate(processes, 1) if process.poll() not in (None, 0)]
        for process in processes:
            process.kill()
        lost = isinstance(error, RuntimeError) and not isinstance(error, CrosslevelError)
        if lost and (dead or (fabric.world_size > 1 and _CLOSED.search(str(error)))):
            which = f"process {dead[0][0]} ended with status {dead[0][1]}" if dead else "a process is gone"
            raise MachineError(f"{which}, and the {fabric.world_size} of this training need each other") from error
        raise
