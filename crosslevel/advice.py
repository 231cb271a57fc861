"""Settings that a collection suggests, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int64
from torch import Tensor

from crosslevel.metrics import long_tail


@dataclass(frozen=True)
class Advice:
    """A setting, the value that this collection suggests (None: none), and why."""

    setting: str
    value: float | int | str
    reason: str


def advise(tracks: Int64[Tensor, " T"], exact: Int64[Tensor, " E"], batch_size: int) -> list[Advice]:
    """Settings that the sizes of tracks suggest.

    Args:
        tracks: images in each track.
        exact: images in each set of equal ones.
        batch_size: of the training.

    """
    count, share = int(tracks.sum()), long_tail.duplicate_share(tracks, batch_size)
    fitting = [b for b in (512, 256, 128, 64, 32) if b <= batch_size and long_tail.duplicate_share(tracks, b) <= 0.25]
    best = batch_size if share <= 0.25 or not fitting else fitting[0]
    different = long_tail.distinct_tracks(tracks, min(best, count))
    said = f"{100 * share:.1f} % of a random batch of {batch_size} have a near-duplicate in it"
    size_reason = f"{said}: few enough for instances to be told apart."
    if best < batch_size:
        size_reason = f"{said}, which an instance loss pushes apart; of {best} at most a quarter have."
    elif share > 0.25:
        size_reason = f"{said}; only batches below 32 would avoid it, which are too small to learn from."
    superfluous, near = int((exact - 1).clamp(min=0).sum()), count - len(tracks)
    drop: Literal["no", "exact copies", "one image a track"] = "no"
    why = "There is next to nothing to remove."
    if near > count / 2 and len(tracks) >= 10_000:
        drop, why = "one image a track", f"{len(tracks):,} different tracks are enough, and an epoch becomes shorter."
    elif superfluous > count / 100:
        drop, why = "exact copies", f"{superfluous:,} images teach nothing that their copies do not."
    elif near > count / 100:
        why = f"Near-duplicates are views that no augmentation makes, and {len(tracks):,} tracks alone would be few."
    return [
        Advice("batch_size", best, size_reason),
        Advice(
            "cld.groups", max(2, round(0.75 * different)),
            f"Three quarters, as by default, of the {different:.0f} different tracks that a batch of {best} holds: "
            "fewer groups the more correlated the images are.",
        ),
        Advice(
            "cld.weight", 0.25,
            "The default, as published for CIFAR-100 and ImageNet: nothing found here speaks for more or less.",
        ),
        Advice("de-duplicate", drop, why),
    ]  # fmt: skip
