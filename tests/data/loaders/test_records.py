"""Records of images: one for each that can be read, whoever reads them."""

import hashlib
import os
from typing import NamedTuple

import pytest
import torch
from picture_samples import Numbered
from torch import Tensor

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.duplicates.scan import scan
from crosslevel.data.loaders.records import records
from crosslevel.utils.errors import SourceError


class Facts(NamedTuple):
    shape: Tensor
    total: Tensor


def facts(image):
    return Facts(torch.tensor(image.shape), image.sum())


class Growing(Numbered):
    """Image i is i + 1 pixels high."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0].repeat(1, i + 1, 1)[:, : i + 1], 7


@pytest.mark.parametrize("workers", [0, 2, os.cpu_count() + 1, None], ids=["none", "two", "more than cores", "auto"])
def test_each_readable_image_has_one_record_in_order(workers, recwarn):
    images, bad_files = Growing(11, bad=(0, 4, 5)), BadFiles()
    parts = list(records(images, facts, 3, bad_files=bad_files, workers=workers))
    readable = [1, 2, 3, 6, 7, 8, 9, 10]
    assert torch.cat([part.numbers for part in parts]).tolist() == readable
    columns = [Facts(*map(torch.cat, zip(*(part.columns for part in parts), strict=True)))][0]
    assert columns.shape.tolist() == [[3, i + 1, 5] for i in readable]
    assert columns.total.tolist() == [3 * (i + 1) * 5 * i for i in readable]
    assert all(isinstance(part.columns, Facts) for part in parts)
    assert sorted(bad_files.reasons) == ["n/0", "n/4", "n/5"]
    assert not [warning for warning in recwarn.list if "DataLoader" in str(warning.message)]


def test_a_part_without_any_readable_image_is_left_out():
    parts = list(records(Growing(6, bad=(0, 1, 2)), facts, 3, bad_files=BadFiles(), workers=0))
    assert [part.numbers.tolist() for part in parts] == [[3, 4, 5]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_has_sizes_and_checksums_and_reads_no_label(workers):
    images = Growing(9, bad=(3,))
    scanned = scan(images, BadFiles(), workers)
    readable = [i for i in range(9) if i != 3]
    assert scanned.numbers.tolist() == readable
    assert scanned.shape.tolist() == [[i + 1, 5] for i in readable]
    assert scanned.content.tolist() == [checksum(bytes([i]) * (3 * (i + 1) * 5), f"{i + 1}x5") for i in readable]
    assert scanned.pictures[:, 0, 0, 0].tolist() == readable
    with pytest.raises(SourceError, match="needs at least 2 images, only 1 of 2"):
        scan(Growing(2, bad=(1,)), BadFiles(), 0)


def checksum(pixels, shape):
    digest = hashlib.blake2b(pixels, digest_size=8, person=shape.encode()).digest()
    return int.from_bytes(digest, "little", signed=True)
