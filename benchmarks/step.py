"""Step efficiency: the encoder alone on ready tensors / the whole training step; and CLD's share of that step.

SimCLR on packed 32x32 images, batch 256, ResNet-18 at a quarter of its width.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from beside import beside, machine, median, noise
from torch import nn

from crosslevel import CrossLevel, Encoder
from crosslevel.hardware import choose
from crosslevel.methods import SimCLR

BATCH, STEPS = 256, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="rounds of 24 steps each; the first is not counted")
    parser.add_argument("--width", type=float, default=0.25)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, arguments.width).to(memory_format=torch.channels_last)
    method = SimCLR(encoder)
    alone, cld = copy.deepcopy(encoder), CrossLevel(encoder.num_features, groups=128)
    cld_seconds: list[float] = []

    def encoder_alone() -> float:
        cld_seconds.append(time_cld(cld, encoder.num_features))
        return time_encoder(alone)

    whole, bare = beside(encoder, method, noise(BATCH * STEPS), encoder_alone, epochs=arguments.epochs)
    step, forward_backward, branch = median(whole), median(bare), median(cld_seconds[1:])
    ratios = [b / w for b, w in zip(bare, whole, strict=True)]
    print(machine())
    print(f"whole training step         {1e3 * step:8.1f} ms  {BATCH / step:8,.0f} images/s")
    print(f"encoder alone, same views   {1e3 * forward_backward:8.1f} ms")
    print(f"CrossLevel, k = 128         {1e3 * branch:8.1f} ms")
    print(f"step efficiency             {median(ratios):8.3f}     (rounds: {' '.join(f'{r:.3f}' for r in ratios)})")
    print(f"CLD's share of the step     {100 * branch / step:8.2f} %")


def time_encoder(encoder: nn.Module, repeats: int = 12) -> float:
    """Seconds of forward and backward of two ready views."""
    place = choose()
    views = [torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    began = time.perf_counter()
    for _ in range(repeats):
        with place.autocast():
            features = [encoder(view) for view in views]
        torch.stack(features).float().mean().backward()
        encoder.zero_grad()
    return (time.perf_counter() - began) / repeats


def time_cld(cld: CrossLevel, features: int, repeats: int = 20) -> float:
    """Seconds of the group branch, forward and backward, head included."""
    place = choose()
    h = [torch.randn(BATCH, features, requires_grad=True) for _ in range(2)]
    began = time.perf_counter()
    for _ in range(repeats):
        with place.autocast():
            loss = cld(*h)
        loss.backward()
        cld.zero_grad()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
