"""Figures that are logged during training and never influence it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from crosslevel.encoder import Encoder
from crosslevel.features import extract
from crosslevel.hardware import Hardware
from crosslevel.images import Images
from crosslevel.images.subsets import take
from crosslevel.metrics.knn import weighted_knn


def knn_monitor(
    encoder: Encoder, source: Images, hardware: Hardware, seed: int
) -> Callable[[], dict[str, float]] | None:
    """KNN accuracy of 1,000 images among 5,000 others, no track on both sides; None where that cannot be."""
    if source.labels is None or len(source) < 20:
        return None
    draws = torch.Generator().manual_seed(seed)
    tracks = getattr(source, "tracks", None)
    queries, others = _apart(torch.arange(len(source)) if tracks is None else tracks, draws)
    if not len(queries):
        return None
    part, classes = take(source, torch.cat([queries, others])), int(source.labels.max()) + 1

    def measure() -> dict[str, float]:
        found = extract(encoder, part, hardware=hardware)
        asked = found.places < len(queries)
        votes = weighted_knn(
            found.features[~asked],
            found.labels[~asked],
            found.features[asked],
            classes,
            k=min(200, len(part) // 10),
        )
        return {"knn": 100 * float((votes.argmax(1) == found.labels[asked]).float().mean())}

    return measure


def _apart(tracks: Int64[Tensor, " N"], draws: torch.Generator) -> tuple[Int64[Tensor, " Q"], Int64[Tensor, " M"]]:
    """Some images of every sixth track, and some of the others: at most 1,000 and 5,000."""
    names, owner = tracks.unique(return_inverse=True)
    place = torch.randperm(len(names), generator=draws)[owner]
    order = torch.randperm(len(tracks), generator=draws)
    asked = place[order] < len(names) // 6
    return order[asked][:1000], order[~asked][:5000]
