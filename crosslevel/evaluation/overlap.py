"""A check whether test images are among the training images, which would make figures too good."""

from __future__ import annotations

import shlex

import torch
from jaxtyping import UInt8
from rich.console import Console
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.across import matches
from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.duplicates.detect import Kind
from crosslevel.data.duplicates.scan import ScanResult, content_of, scan
from crosslevel.data.images import Images
from crosslevel.data.sources.annotated.annotations import Annotated
from crosslevel.data.sources.folder import Files
from crosslevel.data.subsets.select import take
from crosslevel.evaluation.protocols import Subject
from crosslevel.utils.errors import SourceError
from crosslevel.utils.tensors import as_rgb

COMPARED = 2000  # test images: a few seconds
LEARNED = 100_000  # training images, if they have to be decoded for this check alone


def warn(console: Console, subject: Subject) -> None:
    """Say in one line whether test images are copies or near-duplicates of training images.

    If a protocol made the small pictures of the raw-pixel baseline, these are compared, without decoding any image
    again; otherwise the images are read. At most `COMPARED` test images, evenly spaced, are compared, and if images
    are read, at most `LEARNED` training images.
    """
    if console.quiet:
        return
    pictures, sources = subject.small_pictures(), (subject.bank, subject.queries)
    if pictures is None:
        message = _by_pass(*sources, subject.runtime.workers)
    else:
        bank, queries = pictures
        sampled = slice(None, None, _step(len(queries.paths), COMPARED))
        message = _message(_scan(bank.data), bank.paths, _scan(queries.data[sampled]), queries.paths[sampled])
    if message:
        train_name, test_name = (shlex.quote(source.name) for source in sources)
        message += f": crosslevel inspect {train_name} --beside {test_name} -o FOLDER names them"
        console.print(message, highlight=False, markup=False)


def warn_of_annotated(console: Console, train: Annotated, test: Annotated, workers: int | None) -> None:
    """The warning for images with objects."""
    if console.quiet:
        return
    bank, queries = (Files("", part.files, name=part.name) for part in (train, test))
    if message := _by_pass(bank, queries, workers):
        console.print(message, highlight=False, markup=False)


def _by_pass(bank: Images, queries: Images, workers: int | None) -> str:
    """Compare the images themselves; empty if fewer than two of either source can be read."""
    subsets = [
        take(images, torch.arange(0, len(images), _step(len(images), limit)))
        for images, limit in ((bank, LEARNED), (queries, COMPARED))
    ]
    try:
        # Unreadable images are reported by the protocols, which read all images.
        train_scan, test_scan = (scan(part, BadFiles(), workers) for part in subsets)
    except SourceError:
        return ""
    train_paths, test_paths = (
        [part.paths[i] for i in result.numbers.tolist()]
        for part, result in zip(subsets, (train_scan, test_scan), strict=True)
    )
    return _message(train_scan, train_paths, test_scan, test_paths)


def _message(train_scan: ScanResult, train_paths: list[str], test_scan: ScanResult, test_paths: list[str]) -> str:
    pairs = matches(train_scan, test_scan)
    if not pairs:
        return ""
    copies, first = sum(match.kind <= Kind.EDITED for match in pairs), min(pairs, key=lambda match: match.kind)
    near = len(pairs) - copies
    return (
        f"{copies:,} of {len(test_paths):,} test images are copies of images to learn from, {near:,} nearly "
        f"({test_paths[first.second]} and {train_paths[first.first]}), so the figures are too good"
    )


def _step(count: int, limit: int) -> int:
    return max(1, -(-count // limit))


def _scan(data: UInt8[Tensor, "M 3 s s"]) -> ScanResult:
    content = torch.tensor([content_of(picture) for picture in data])
    rgb = as_rgb(data)
    small = rgb if rgb.shape[-1] == SIDE else tvf.resize(rgb, [SIDE, SIDE], antialias=True)
    return ScanResult(small, torch.full((len(data), 2), data.shape[-1]), content, torch.arange(len(data)))
