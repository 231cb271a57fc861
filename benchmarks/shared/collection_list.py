"""The collections that the defaults are tried on, from two sets of photographs and from generated images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from quality import plates

from crosslevel.data.open import open_images

IMAGES_SEEN = 40_000  # of the smallest budget


class Collection(NamedTuple):
    """Images to train on, labelled images as bank and test, and options that the collection itself needs.

    ``seen``: images of the smallest budget.
    """

    train: str
    bank: str
    test: str
    options: tuple[str, ...] = ()
    seen: int = IMAGES_SEEN


def collections(
    data: Path, runs_dir: Path, only: Sequence[str] | None, voc: str | None, voc_test: str | None
) -> dict[str, Collection]:
    """The collections that this machine has data for."""
    cifar, cifar_test = (str(data / "cifar10-jpeg" / part) for part in ("train", "test"))
    clothing, clothing_test = (str(data / "clothing" / part) for part in ("train", "test"))
    repeated = f"{cifar}@imbalance=100@repeat=8,shift=2@tracks=1500"
    signs = runs_dir / "plates"
    if not only or "plates" in only:
        plates.write(signs)
    photographs, table = (clothing, clothing, clothing_test), ("turntable", "turntable:test")
    makers: dict[str, Callable[[], Collection]] = {
        "CIFAR-10 (JPEG)": lambda: Collection(cifar, cifar, cifar_test),
        "long-tailed": lambda: Collection(f"{cifar}@imbalance=100", f"{cifar}@imbalance=100", cifar_test),
        "clothing, 64 pixels": lambda: Collection(*photographs, ("--views.size=64",)),
        "clothing": lambda: Collection(*photographs, seen=IMAGES_SEEN // 4),  # views of 128 pixels
        "turntable": lambda: Collection("turntable", *table),
        "turntable, natural order": lambda: Collection("turntable", *table, ("--order=natural",)),
        "repeated images": lambda: Collection(repeated, repeated, cifar_test),
        "plates": lambda: Collection(*2 * (f"{signs}/train",), f"{signs}/test"),
        "films": lambda: Collection(f"{films(runs_dir / 'films')},stride=1", *table),
        "500 images": lambda: Collection(*2 * (few(cifar, runs_dir / "few.txt", 500),), cifar_test),
    }
    if voc is not None and voc_test is not None:
        makers["VOC crops"] = lambda: Collection(voc, voc, voc_test, ("--crops",))
    return {name: make() for name, make in makers.items() if not only or name in only}


def films(folder: Path, rate: int = 10) -> Path:
    """The turntable's objects as a film each, compressed as cameras do."""
    import av

    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        frames = open_images("turntable")
        assert frames.tracks is not None
        for track in frames.tracks.unique().tolist():
            with av.open(str(folder / f"{track:04}.mp4"), "w") as target:
                stream = target.add_stream("mpeg4", rate=rate)
                stream.width = stream.height = 32
                stream.bit_rate = 200_000
                for i in (frames.tracks == track).nonzero()[:, 0].tolist():
                    frame = av.VideoFrame.from_ndarray(frames[i][0].permute(1, 2, 0).contiguous().numpy())
                    target.mux(stream.encode(frame))
                target.mux(stream.encode())
        (folder / "done").touch()
    return folder


def few(source: str, file: Path, count: int) -> str:
    """A list of ``count`` of a folder's images, drawn from seed 0."""
    paths = open_images(source).paths
    rows = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))[:count].sort().values
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{Path(source).resolve() / paths[i]}\n" for i in rows.tolist()))
    return str(file)
