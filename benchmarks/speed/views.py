"""Views per second: the batched generator beside per-image torchvision (and kornia where it is installed).

    python benchmarks/speed/views.py [--threads 2] [--rounds 9]

The contestants take turns in one process, so that a busy machine slows all of them; the program prints medians over the
rounds, and each contestant's share of ours. CPU time, with --threads 1, also holds on a busy machine (with more threads
it counts their waiting for each other).
"""

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torchvision.transforms import v2

from crosslevel.transforms.parameters import Augment
from crosslevel.transforms.views import Views

sys.path.append(str(Path(__file__).parents[1]))

from shared import records

CASES = [("cifar", 32, 256), ("simclr", 32, 256), ("mocov2", 224, 64)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def torchvision_views(augment: Augment, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same operations with the same probabilities, one image at a time, on bytes as its manual advises."""
    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, scale=augment.scale, antialias=True),
        v2.RandomHorizontalFlip(augment.flip),
        v2.RandomApply([v2.ColorJitter(*strengths)], augment.jitter),
        v2.RandomGrayscale(augment.grayscale),
    ]
    if augment.blur:
        taps = max(size // 10 | 1, 3)
        steps.append(v2.RandomApply([v2.GaussianBlur(taps, augment.blur_sigma)], augment.blur))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose(steps)
    return lambda images: torch.stack([transform(image) for image in images])


def kornia_views(augment: Augment, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same operations from kornia's batched augmentations."""
    import kornia.augmentation as K

    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps = [
        K.RandomResizedCrop((size, size), scale=augment.scale),
        K.RandomHorizontalFlip(p=augment.flip),
        K.ColorJitter(*strengths, p=augment.jitter),
        K.RandomGrayscale(p=augment.grayscale),
    ]
    if augment.blur:
        taps = max(size // 10 | 1, 3)
        steps.append(K.RandomGaussianBlur((taps, taps), augment.blur_sigma, p=augment.blur))
    steps.append(K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    transform = torch.nn.Sequential(*steps)
    return lambda images: transform(images.float() / 255)


def contestants(preset: str, size: int) -> dict[str, tuple[Callable[[torch.Tensor], object], float]]:
    """Each contestant as a function of a batch, and its share of the batch per turn (the slow ones get less)."""
    views = Views(preset, size)
    views.count = 1
    augment = views.augments[0]
    flow: dict[str, tuple[Callable[[torch.Tensor], object], float]] = {"crosslevel": (views, 1.0)}
    flow["torchvision"] = (torchvision_views(augment, size), 1 / 8)
    if find_spec("kornia"):
        flow["kornia"] = (kornia_views(augment, size), 1.0)
    return flow


def rates(preset: str, size: int, batch: int, rounds: int) -> dict[str, tuple[float, ...]]:
    """Median views per second and per second of CPU time of each contestant, in alternation."""
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    speeds: dict[str, list[tuple[float, float]]] = {}
    makers = contestants(preset, size)
    for turn in range(rounds + 1):
        for name, (make, share) in makers.items():
            batch_part = images[: max(1, int(batch * share))]
            repeats = 4 if name == "crosslevel" else 1
            start, used = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                make(batch_part)
            if turn:  # the first turn warms up
                wall, cpu = time.perf_counter() - start, time.process_time() - used
                speeds.setdefault(name, []).append((repeats * len(batch_part) / wall, repeats * len(batch_part) / cpu))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in speeds.items()}


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    for preset, size, batch in CASES:
        results = rates(preset, size, batch, settings.rounds)
        for name, (rate, per_cpu) in results.items():
            share = rate / results["crosslevel"][0]
            print(
                f"{preset} {size}x{size} batch {batch}  {name:11} {rate:9,.0f} views/s, {share:.3f} of ours;"
                f" {per_cpu:9,.0f} a second of CPU time"
            )


if __name__ == "__main__":
    main()
