"""What label-free scores cost: python benchmarks/speed/scores.py [-o FILE]

All scores of two views of 10,000 images by features of 128 numbers, both branches, and the time of each part. The
features are generated: 100 classes, two noisy views. Speed alone; the parts are timed in alternation, three rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from crosslevel.metrics import label_free
from crosslevel.metrics.spectrum import alpha_req, effective_rank, lidar, rankme

sys.path.append(str(Path(__file__).parents[1]))

from shared import records
from shared.beside import dated, median

IMAGES, FEATURES, CLASSES, ROUNDS = 10_000, 128, 100, 3
LIMIT = 20.0
"""Seconds, beyond the extraction of the features."""


def main() -> None:
    parser = records.options(__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(IMAGES) % CLASSES
    images = torch.randn(CLASSES, FEATURES, generator=generator)[owner]
    images += 0.7 * torch.randn(IMAGES, FEATURES, generator=generator)
    a, b, group_a, group_b, instance_a, instance_b = (
        images + 0.5 * torch.randn(IMAGES, FEATURES, generator=generator) for _ in range(6)
    )
    tracks = torch.arange(IMAGES) // 5

    def clustered(x: torch.Tensor) -> list[torch.Tensor]:
        return label_free.clusterings(x, label_free.CLUSTERS, torch.Generator().manual_seed(0))

    sets = clustered(a), clustered(b)
    parts: dict[str, Callable[[], object]] = {
        "all scores, both branches": lambda: label_free.scores(
            a, b, group_a, group_b, tracks, instance_a=instance_a, instance_b=instance_b
        ),
        "all scores, no group branch": lambda: label_free.scores(a, b, tracks=tracks),
        "retrieval": lambda: label_free.retrieval(a, b, tracks),
        "clustering one view, 5 counts": lambda: clustered(a),
        "NMI, AMI and ARI of two views, 5 counts": lambda: label_free.partitions(*sets),
        "alignment and uniformity": lambda: (label_free.alignment(a, b), label_free.uniformity(a)),
        "RankMe, effective rank, alpha-ReQ, LiDAR": lambda: (rankme(a), effective_rank(a), alpha_req(a), lidar(a, b)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - began)
    lines = [f"{dated()}; {IMAGES:,} images, {FEATURES} features; seconds, the median of {ROUNDS} rounds"]
    lines += [f"{name:42}{median(times):8.2f}" for name, times in seconds.items()]
    lines.append(f"{'wanted of all scores: at most':42}{LIMIT:8.2f}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
