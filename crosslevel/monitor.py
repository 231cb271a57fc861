"""Figures that are logged during training and never influence it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from crosslevel.encoder import Encoder
from crosslevel.features import extract
from crosslevel.hardware import Hardware
from crosslevel.images import Images
from crosslevel.images.subsets import take
from crosslevel.metrics.knn import weighted_knn


def knn_monitor(
    encoder: Encoder, source: Images, hardware: Hardware, seed: int
) -> Callable[[], dict[str, float]] | None:
    """KNN accuracy of 1,000 images among 5,000 others; None without labels."""
    if source.labels is None or len(source) < 20:
        return None
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source), generator=draws)[:6000]
    queries = len(chosen) // 6
    part, classes = take(source, chosen), int(source.labels.max()) + 1

    def measure() -> dict[str, float]:
        found = extract(encoder, part, hardware=hardware)
        asked = found.places < queries
        votes = weighted_knn(
            found.features[~asked],
            found.labels[~asked],
            found.features[asked],
            classes,
            k=min(200, len(part) // 10),
        )
        return {"knn": 100 * float((votes.argmax(1) == found.labels[asked]).float().mean())}

    return measure
