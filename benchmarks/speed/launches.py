"""How many operations a GPU does for the views and for the groups of one step.

python benchmarks/speed/launches.py

Views are counted on meta tensors, which take a GPU's code path and compute nothing. CLD is counted on the CPU, where
its code path is the same; operations that move no numbers (views of a tensor, empty ones) are left out. On a GPU an
operation is one kernel to launch or a few; in a captured step all of them are one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosslevel.cld.loss import CrossLevel
from crosslevel.transforms import philox
from crosslevel.transforms.views import Views

FREE = {
    "view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "unbind", "expand", "t", "transpose",
    "permute", "as_strided", "detach", "alias", "unsqueeze", "squeeze", "empty", "empty_like", "lift_fresh",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts what happens on a kind of device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) and out else out
        on_device = isinstance(first, torch.Tensor) and first.device.type == self.device
        self.count += on_device and function.overloadpacket.__name__ not in FREE
        return out


def counted(call: Callable[[], object], device: str) -> int:
    """Operations of one call on this kind of device."""
    with Counted(device) as mode:
        call()
    return mode.count


def of_views(preset: str, size: int, count: int, batch: int = 256) -> int:
    """Operations of drawing ``count`` views."""
    views = Views(preset, size).to("meta")
    views.count = count
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8, device="meta")
    numbers = philox.Counted(0, 0, torch.arange(batch, device="meta"))  # as a training step draws
    return counted(lambda: views(images, numbers), "meta")


def of_cld(batch: int = 256) -> int:
    """Operations of CLD by k-means, forward and backward."""
    cld = CrossLevel(512)
    h = [torch.randn(batch, 512, requires_grad=True) for _ in range(2)]
    return counted(lambda: cld(*h).backward(), "cpu")


def main() -> None:
    print("operations a step, batch 256\n\n| | operations |\n|---|---|")
    for preset, size, most in (("cifar", 32, 3), ("simclr", 32, 2), ("mocov2", 224, 3), ("infomin", 224, 3)):
        for count in (1, most):
            operations = of_views(preset, size, count)
            print(f"| {count} view{'s' if count > 1 else ''} of {size}x{size}, preset {preset} | {operations} |")
    print(f"| CLD, k-means, forward and backward | {of_cld()} |")


if __name__ == "__main__":
    main()
