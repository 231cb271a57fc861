"""What CLD adds to a training step of every method: time and memory, with k-means and with normalized cuts.

python benchmarks/speed/overhead.py [--batch_size 256] [--backbone resnet18] [--width 0.25] [--size 32]

All variants of a method see the same number of views and take their steps in turn, in an order that rotates; what CLD
adds is the median over rounds of the ratio within a round, so that a machine whose speed drifts spoils little. Groups
are as many as by default, three quarters of the batch. Memory is the peak of a process of its own that takes three
steps: on a GPU what torch has allocated there, elsewhere the process's resident memory beyond what it had before it
built anything, the median of three processes, because the allocator's whims are tens of MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crosslevel.cld.loss import CrossLevel, Grouping
from crosslevel.methods import METHODS
from crosslevel.models.encoder import Encoder
from crosslevel.training.loop.module import parameter_groups
from crosslevel.transforms.views import Views
from crosslevel.utils.device import choose

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated, median, noise, two_query_method, wait

VARIANTS: dict[str, Grouping | None] = {"": None, "CLD, k-means": "kmeans", "CLD, normalized cuts": "normalized-cut"}
IMAGES = 12_800
LIMITS = {"CLD, k-means": 3.0, "CLD, normalized cuts": 8.0}


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(peak(arguments, *json.loads(arguments.memory))))
        return
    print(dated())
    print(
        f"batch {arguments.batch_size}, {arguments.size}x{arguments.size}, {arguments.backbone} x {arguments.width:g}\n"
    )
    print("| method | | ms a step | CLD adds, % | at most, % | peak memory, MB |\n|---|---|---|---|---|---|")
    for name in arguments.methods:
        steps = {variant: build(arguments, name, kind) for variant, kind in VARIANTS.items()}
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for turn in range(arguments.rounds + 2):
            names = list(VARIANTS)
            order = names[turn % 3 :] + names[: turn % 3]
            for variant in order:
                elapsed = timed(steps[variant])
                if turn >= 2:
                    seconds[variant].append(elapsed)
        for variant, kind in VARIANTS.items():
            ratios = [with_cld / without for with_cld, without in zip(seconds[variant], seconds[""], strict=True)]
            added = f"{100 * (median(ratios) - 1):.1f}" if variant else ""
            line = [__file__, *sys.argv[1:], "--memory", json.dumps([name, kind])]
            times = 1 if torch.cuda.is_available() else 3
            outputs = [records.again(*line) for _ in range(times)]
            peaks = [float(text) for text in outputs]
            megabytes = median(peaks) / 1e6
            figures = f"{1000 * median(seconds[variant]):.1f} | {added} | {LIMITS.get(variant, '')} | {megabytes:,.0f}"
            print(f"| {METHODS[name].__name__} | {variant} | {figures} |", flush=True)


def build(arguments: argparse.Namespace, name: str, grouping: Grouping | None) -> Callable[[], None]:
    """One whole training step: views, both branches, backward, optimizer, memories."""
    torch.manual_seed(0)
    hardware = choose()
    encoder = Encoder(arguments.backbone, arguments.size <= 64, arguments.width)
    method = two_query_method(name, encoder, IMAGES)
    cld = CrossLevel(encoder.num_features, grouping=grouping) if grouping else None
    modules = torch.nn.ModuleList([encoder, method, *([cld] if cld else [])]).to(hardware.device)
    modules.to(memory_format=torch.channels_last)
    views = Views("cifar", arguments.size).to(hardware.device)
    views.count, views.small, views.plain = method.views, method.small_views, method.plain_views
    optimizer = torch.optim.SGD(parameter_groups(modules, 5e-4, decay_all=True), lr=0.01, momentum=0.9)
    images = noise(arguments.batch_size, arguments.size).data.to(hardware.device)
    index = torch.arange(arguments.batch_size, device=hardware.device)

    def step() -> None:
        view_list = [view.contiguous(memory_format=torch.channels_last) for view in views(images)]
        with hardware.autocast():
            h = [encoder(view) for view in view_list[: method.online]]
            loss, update = method(view_list, h, index)
            loss = loss + cld(h[0], h[1]) if cld else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(0.5, update)

    return step


def timed(step: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def peak(arguments: argparse.Namespace, name: str, grouping: Grouping | None) -> int:
    """Bytes."""
    before = resident_peak()
    step = build(arguments, name, grouping)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak() - before


def resident_peak() -> int:
    """Bytes. Not getrusage's figure, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
