"""Whether images to test on are among those to learn from: then figures are too good."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from crosslevel.data.duplicates.across import matches
from crosslevel.data.duplicates.descriptor import SIDE
from crosslevel.data.duplicates.detect import Kind
from crosslevel.data.duplicates.scan import ScanResult, content_of
from crosslevel.evaluation.protocols import Subject

LOOKED_AT = 2000  # test images: a few seconds


def in_training(subject: Subject) -> str | None:
    """One line where test images are copies of, or nearly, images to learn from; None where there are none.

    By the small pictures that raw pixels were judged by: no image is decoded for it. None as well where no protocol
    judged them. Of more than `LOOKED_AT` test images, some at even steps are looked at.
    """
    pictures = subject.small_pictures()
    if pictures is None:
        return None
    bank, queries = pictures
    asked = slice(None, None, -(-len(queries.paths) // LOOKED_AT))
    found = matches(_scan(bank.data), _scan(queries.data[asked]))
    if not found:
        return None
    copies, paths = sum(match.kind <= Kind.EDITED for match in found), queries.paths[asked]
    first = min(found, key=lambda match: match.kind)
    return (
        f"{copies:,} of {len(paths):,} test images are copies of images to learn from, {len(found) - copies:,} nearly "
        f"({paths[first.other]} and {bank.paths[first.own]}), so the figures are too good: crosslevel inspect "
        f"{subject.bank.name} --beside {subject.queries.name} -o FOLDER names them"
    )


def _scan(data: UInt8[Tensor, "M 3 s s"]) -> ScanResult:
    content = torch.tensor([content_of(picture) for picture in data])
    small = data if data.shape[-1] == SIDE else tvf.resize(data, [SIDE, SIDE], antialias=True)
    return ScanResult(small, torch.full((len(data), 2), data.shape[-1]), content, torch.arange(len(data)))
