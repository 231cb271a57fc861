"""Step efficiency: the encoder alone on ready tensors / the whole training step; and CLD's share of that step.

python benchmarks/step.py [--method SimCLR] [--cld] [--backbone resnet18] [--width 0.25] [--size 32]

SimCLR, or another method, on packed images, on the device and in the precision that `crosslevel train` would take;
with --cld the whole step has the group branch in it. On a GPU both are compiled and each is one CUDA graph
(--compile on), as is CLD alone; --compile off compares what is neither. The compiled comparison has not been run on a
GPU yet: benchmarks/results/step_gpu.txt is of the step before.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from shared import records
from shared.beside import beside, dated, median, noise, two_query_method, wait
from torch import nn

from crosslevel import CrossLevel, Encoder
from crosslevel.transforms.views import Views
from crosslevel.utils.device import Hardware, choose


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="rounds; the first is not counted")
    parser.add_argument("--steps", type=int, default=24, help="of a round, with a checkpoint in it")
    parser.add_argument("--method", default="SimCLR")
    parser.add_argument("--cld", action="store_true")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--compile", choices=["on", "off"], default="on" if torch.cuda.is_available() else "off")
    arguments = parser.parse_args()
    batch, size, device = arguments.batch_size, arguments.size, choose().device
    torch.manual_seed(0)
    encoder = Encoder(arguments.backbone, size <= 64, arguments.width).to(memory_format=torch.channels_last)
    method = two_query_method(arguments.method, encoder, batch * arguments.steps)
    alone = copy.deepcopy(encoder).to(device)
    cld = CrossLevel(encoder.num_features, groups=batch // 2).to(device)
    captured = arguments.compile == "on" and device.type == "cuda"
    if arguments.compile == "on":
        alone.compile(dynamic=False)
    cld_seconds: list[float] = []

    def encoder_alone() -> float:
        cld_seconds.append(time_cld(cld, batch, encoder.num_features, captured=captured))
        return time_encoder(alone, batch, size, captured=captured)

    views = Views("cifar" if size <= 64 else "mocov2", size)
    images = noise(batch * arguments.steps, size)
    options: dict[str, Any] = {
        "epochs": arguments.epochs,
        "batch_size": batch,
        "views": views,
        "compile": arguments.compile,
        "cld": CrossLevel(encoder.num_features, groups=batch // 2) if arguments.cld else None,
    }
    full, bare = beside(encoder, method, images, encoder_alone, **options)
    step, forward_backward, branch = median(full), median(bare), median(cld_seconds[1:])
    ratios = [b / w for b, w in zip(bare, full, strict=True)]
    print(dated())
    print(
        f"{arguments.backbone} x {arguments.width:g}, {arguments.method}{' + CLD' * arguments.cld}, batch {batch} of "
        f"{size}x{size}, preset {views.preset}, compile {arguments.compile}"
    )
    print(f"whole training step         {1e3 * step:8.1f} ms  {batch / step:8,.0f} images/s")
    print(f"encoder alone, same views   {1e3 * forward_backward:8.1f} ms")
    print(f"CrossLevel, k = {batch // 2:<4}        {1e3 * branch:8.1f} ms")
    print(f"step efficiency             {median(ratios):8.3f}     (rounds: {' '.join(f'{r:.3f}' for r in ratios)})")
    print(f"CLD's share of the step     {100 * branch / step:8.2f} %")


def time_encoder(encoder: nn.Module, batch: int, size: int, repeats: int = 12, captured: bool = False) -> float:
    """Seconds of forward and backward of two ready views; ``captured``: as one CUDA graph."""
    hardware = choose()
    views = [torch.randn(batch, 3, size, size, device=hardware.device) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def step() -> None:
        with autocast(hardware):
            features = [encoder(view) for view in views]
        torch.stack(features).float().mean().backward()
        encoder.zero_grad()

    return seconds_of(as_graph(step) if captured else step, repeats)


def as_graph(step: Callable[[], None]) -> Callable[[], None]:
    """A function that replays a step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_cld(cld: CrossLevel, batch: int, features: int, repeats: int = 20, captured: bool = False) -> float:
    """Seconds of the group branch, forward and backward, head included."""
    hardware = choose()
    h = [torch.randn(batch, features, device=hardware.device, requires_grad=True) for _ in range(2)]

    def step() -> None:
        with autocast(hardware):
            loss = cld(*h)
        loss.backward()
        cld.zero_grad()
        for one in h:
            one.grad = None

    return seconds_of(as_graph(step) if captured else step, repeats)


def autocast(hardware: Hardware) -> torch.autocast:
    """The precision of a training; cached casts would outlive the graph that they belong to."""
    kind, bf16 = hardware.device.type, hardware.precision == "bf16"
    return torch.autocast(kind, torch.bfloat16, enabled=bf16, cache_enabled=kind != "cuda")


def seconds_of(step: Callable[[], None], repeats: int) -> float:
    """Seconds of one of ``repeats`` steps, after one that is not counted."""
    step()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
