"""The counter-based generator against its published test vectors, and what follows from having no state."""

import pytest
import torch

from crosslevel.transforms.philox import Counted, fine_unit, philox, unit

CPU = torch.device("cpu")
# Random123's known answers for philox4x32-10 (Salmon et al. 2011): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_an_images_numbers_do_not_depend_on_its_batch():
    """Nor on whether the step is a number or a tensor; other seeds, steps, images and streams have others."""
    whole = Counted(7, 3, torch.arange(40)).words(range(2), 10, CPU)
    part = Counted(7, torch.tensor(3), torch.tensor([39, 5])).words([1], 10, CPU)
    assert torch.equal(part[0], whole[1, [39, 5]])
    far = 2**32
    asked = [
        (7, 3, 5, 1),
        (8, 3, 5, 1),
        (7 + far, 3, 5, 1),
        (7, 4, 5, 1),
        (7, 3, 6, 1),
        (7, 3, 5 + far, 1),
        (7, 3, 5, 0),
    ]
    others = [Counted(s, n, torch.tensor([i])).words([v], 10, CPU) for s, n, i, v in asked]
    assert len(torch.cat(others).flatten().unique()) == 70
    assert torch.equal(others[0][0, 0], whole[1, 5])


def test_numbers_are_uniform():
    """Chi-squared in 64 cells: beyond 120 with a chance below 1e-5; neighbouring images are uncorrelated."""
    words = Counted(1, 2, torch.arange(4000)).words([0], 16, CPU)[0]
    for values in (unit(words), fine_unit(words)):
        assert float(values.min()) >= 0
        assert float(values.max()) < 1
        counts = (values * 64).long().flatten().bincount(minlength=64).double()
        assert ((counts - 1000) ** 2 / 1000).sum() < 120
        centred = values.double() - 0.5
        assert abs(float((centred[1:] * centred[:-1]).mean()) * 12) < 0.02
