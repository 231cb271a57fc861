"""``crosslevel subset``: a part of a source as a file that any verb reads."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from crosslevel.data.images import Images
from crosslevel.data.open import open_images
from crosslevel.data.sources.annotated.object_crops import Crops
from crosslevel.data.subsets.lists import write_list
from crosslevel.data.uri import parse
from crosslevel.utils.console import printer
from crosslevel.utils.errors import UserError
from crosslevel.utils.marks import verb

MOST_LISTED = 20  # up to this many classes, each one's count is printed


@verb()
def subset(
    images: str,
    output: str = "subset.txt",
    data_root: str | None = None,
    crops: Crops | None = None,
    quiet: bool = False,
) -> Path:
    """Write which images a source and its suffixes name: a path, a tab and a label a line.

    Args:
        images: a source with suffixes; each suffix selects from the result of the one before: @imbalance=100[,seed=0]
            (classes decay exponentially), @pareto=6[,most=1280,least=5,seed=0], @list=FILE (lines of path and label),
            @classes=FILE (names of classes), @frames=5 (the first of each track), @tracks=50[,seed=0],
            @unique[=duplicates.csv] (one of each set of copies), @repeat=10[,shift=2,seed=0] (copies shifted by some
            pixels) and @bursts[=duplicates.csv] (the images of one folder, or of one set, are a track).
        output: the file to write.
        data_root: folder with the official files of cifar10, cifar100 and stl10.
        crops: objects cut out of annotated images, such as VOC2007:trainval; --crops alone takes its usual settings.
        quiet: print nothing.

    Returns:
        the file.

    """
    console, file = printer(quiet), Path(output)
    parsed = parse(images)
    for read in (parsed.base_text, *(suffix.value for suffix in parsed.subset)):
        if file.exists() and os.path.exists(read) and file.samefile(read):
            raise UserError(f"--output {output} is what {images} is read from: give another file")
    source = open_images(parsed, data_root=data_root, crops=crops)
    write_list(source, file)
    for line in [f"{len(source):,} images of {images} in {file}", *_counts(source)]:
        console.print(line, highlight=False, markup=False)
    use, options = (
        parsed.with_list(str(file)).text,
        "" if data_root is None else f" --data-root {shlex.quote(data_root)}",
    )
    options += "" if crops is None else f" {crops.options()}"
    console.print(f"next: crosslevel train {shlex.quote(use)}{options}", highlight=False, markup=False)
    return file


def _counts(source: Images) -> list[str]:
    """Images a class, for the user; nothing without labels."""
    if source.labels is None:
        return []
    classes = source.classes or [str(c) for c in range(int(source.labels.max()) + 1)]
    counts = dict(zip(classes, source.labels.bincount(minlength=len(classes)).tolist(), strict=True))
    present = {name: count for name, count in counts.items() if count}
    largest, smallest = max(present, key=present.__getitem__), min(reversed(present), key=present.__getitem__)
    absent = f"; {len(counts) - len(present):,} without images" if len(present) < len(counts) else ""
    summary = (
        f"{len(present):,} classes: largest {largest} {present[largest]:,}, smallest {smallest} {present[smallest]:,}, "
        f"imbalance {present[largest] / present[smallest]:.4g}{absent}"
    )
    each = [", ".join(f"{name} {count:,}" for name, count in counts.items())] if len(counts) <= MOST_LISTED else []
    return [summary, *each]
