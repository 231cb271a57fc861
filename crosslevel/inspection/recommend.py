"""Recommended settings for a collection, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int64
from torch import Tensor

from crosslevel.metrics import long_tail

CROWDED = 0.25  # share of near-duplicates in a batch above which a smaller batch is recommended
CORRELATED = 0.05  # share above which the images count as correlated


@dataclass(frozen=True)
class Advice:
    """A setting, its recommended value (None: no change), and the reason."""

    setting: str
    value: float | int | str
    reason: str


def advise(tracks: Int64[Tensor, " T"], copies: Int64[Tensor, " E"], batch_size: int) -> list[Advice]:
    """Recommend settings by the sizes of tracks.

    Every reason names the source of the rule, and our own measurements if they contradict it.

    Args:
        tracks: images in each track.
        copies: images in each set of copies, edited ones too.
        batch_size: of the training.

    """
    batch = _batch_size(tracks, batch_size)
    return [
        batch,
        _groups(tracks, int(batch.value)),
        Advice(
            "cld.weight", 0.25,
            "The default, as published for CIFAR-100 and ImageNet: nothing found here speaks for more or less.",
        ),
        _de_duplicate(tracks, copies),
    ]  # fmt: skip


def _batch_size(tracks: Int64[Tensor, " T"], batch_size: int) -> Advice:
    """The largest batch with few near-duplicates, at most as large as requested and as the collection."""
    count = int(tracks.sum())
    batch = min(batch_size, 2 ** (count.bit_length() - 1) if count < batch_size else batch_size)
    shares = {b: long_tail.duplicate_share(tracks, b) for b in (batch, 512, 256, 128, 64, 32) if b <= batch}
    fitting = [b for b, share in shares.items() if share <= CROWDED]
    reason = f"{100 * shares[batch]:.1f} % of a random batch of {batch} have a near-duplicate in it"
    if batch < batch_size:
        reason = f"{count} images were compared, so no batch of {batch_size}; {reason}"
    ours = "The limit of a quarter is ours, and not measured."
    if batch in fitting:
        return Advice("batch_size", batch, f"{reason}: few enough to distinguish instances.")
    if not fitting:
        explanation = f"{reason}; only smaller batches would avoid it, which are too small to learn from. {ours}"
        return Advice("batch_size", batch, explanation)
    explanation = f"{reason}, which an instance loss pushes apart; of {fitting[0]} at most a quarter have. {ours}"
    return Advice("batch_size", fitting[0], explanation)


def _groups(tracks: Int64[Tensor, " T"], batch: int) -> Advice:
    different, share = long_tail.distinct_tracks(tracks, batch), long_tail.duplicate_share(tracks, batch)
    few, many = max(2, batch // 8), max(2, 3 * batch // 4)
    suggested = max(2, round(0.75 * different))
    reason = f"Three quarters, as by default, of the {different:.0f} different tracks that a batch of {batch} holds."
    if share <= CORRELATED:
        rule = (
            "CLD's authors advise many groups for many classes and little correlation; as many as the batch has "
            "images would make CLD plain discrimination between views."
        )
        return Advice("cld.groups", suggested, f"{reason} {rule}")
    rule = (
        "The evidence conflicts: CLD's authors advise fewer groups the more correlated the images are (in their issue "
        "tracker: Kitchen-HC was best near 10, its number of classes). In our short runs on turntable frames, as "
        "correlated as can be, few groups were worse than many, in shuffled and in natural order "
        '(docs/results.md, "Correlated batches"). With few groups in natural order, --cld.init random keeps apart what '
        "the default would join: the first images of such a batch, its first centroids, are of a few objects."
    )
    advice = (
        f"Compare both on your images: crosslevel tune IMAGES --batch_size {batch} --search cld.groups={few}:{many}:log"
    )
    return Advice("cld.groups", suggested, f"{reason} {rule} {advice}")


def _de_duplicate(tracks: Int64[Tensor, " T"], copies: Int64[Tensor, " E"]) -> Advice:
    count, different = int(tracks.sum()), len(tracks)
    superfluous, near = int((copies - 1).clamp(min=0).sum()), count - different
    drop: Literal["no", "copies", "one image a track"] = "no"
    reason = "There is next to nothing to remove."
    if near > count / 2 and different >= 10_000:
        drop, reason = (
            "one image a track",
            f"{different:,} different tracks are enough (from 10,000 on: our rule, not measured).",
        )
    elif superfluous > count / 100:
        drop, reason = (
            "copies",
            f"{superfluous:,} images teach nothing that their copies do not: 'IMAGES@unique' leaves them out.",
        )
    elif near > count / 100:
        reason = f"Near-duplicates are views that no augmentation makes, and {different:,} tracks alone would be few."
    return Advice("de-duplicate", drop, reason)
