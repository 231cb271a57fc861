"""Partners: another image of the same track, for some images, drawn alike whatever the batches."""

import pytest
import torch
from picture_samples import Numbered

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.partners import Partners
from crosslevel.utils.errors import UserError

TRACKS = torch.tensor([5, 2, 5, 9, 2, 5, 5, 7, 2])  # in no order; 9 and 7 are alone
EVERY = torch.arange(len(TRACKS))


def test_each_other_image_of_the_track_is_drawn_equally_often():
    partners = Partners(TRACKS, 1.0, seed=3)
    drawn = torch.stack([partners(epoch, EVERY) for epoch in range(3000)])
    for i in EVERY.tolist():
        others = [j for j in EVERY.tolist() if j != i and TRACKS[j] == TRACKS[i]] or [i]
        found, counts = drawn[:, i].unique(return_counts=True)
        assert found.tolist() == others
        assert (counts - 3000 / len(others)).abs().max() < 5 * (3000 / len(others)) ** 0.5


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_probability_is_that_of_another_image(probability):
    tracks = torch.arange(20_000) // 4
    partner = Partners(tracks, probability, seed=0)(0, torch.arange(20_000))
    share = float((partner != torch.arange(20_000)).double().mean())
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / 20_000) ** 0.5
    assert torch.equal(tracks[partner], tracks)


def test_it_depends_on_seed_epoch_and_image_alone():
    tracks, index = torch.arange(400) // 8, torch.arange(400)
    first = Partners(tracks, 0.5, seed=0)
    whole = first(2, index)
    again = Partners(tracks, 0.5, seed=0)
    assert torch.equal(torch.cat([again(2, part) for part in index.flip(0).split(7)]).flip(0), whole)
    assert not torch.equal(first(3, index), whole)
    assert not torch.equal(Partners(tracks, 0.5, seed=1)(2, index), whole)


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_no_probability(probability):
    with pytest.raises(UserError, match=f"track_positives={probability} must be from 0 to 1"):
        Partners(TRACKS, probability, seed=0)


def in_memory():
    pixels = EVERY.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return InMemoryImages(pixels, [str(i) for i in EVERY.tolist()])


def test_batches_in_memory_have_both():
    batches = TrainBatches(in_memory(), 3, seed=0, bad_files=BadFiles(), partners=Partners(TRACKS, 1.0, 0))
    for batch in batches:
        expected = Partners(TRACKS, 1.0, 0)(0, batch.index)
        assert batch.images[:, 0, 0, 0].tolist() == batch.index.tolist()
        assert batch.partners[:, 0, 0, 0].tolist() == expected.tolist()


def crops(image, draws):
    """Three crops that tell the image and the draws."""
    drawn = torch.randint(0, 200, (1,), generator=draws).to(torch.uint8)
    views = image[None, :, :2, :2].repeat(3, 1, 1, 1)
    views[:, 1] = drawn
    return views


@pytest.mark.parametrize("workers", [0, 2])
def test_every_second_crop_is_the_partners_by_the_same_draws(workers):
    images = Numbered(len(TRACKS), bad=(4,))
    how = {"seed": 0, "crops": crops, "workers": workers}
    bad_files = BadFiles()
    batches = TrainBatches(images, 3, bad_files=bad_files, partners=Partners(TRACKS, 1.0, 0), **how)
    asked = batches.order(0)
    wanted = Partners(TRACKS, 1.0, 0)(0, asked).split(3)
    plain = TrainBatches(images, 3, bad_files=BadFiles(), **how)
    for batch, without, first, second in zip(batches, plain, asked.split(3), wanted, strict=True):
        assert torch.equal(batch.images[:, ::2], without.images[:, ::2])
        assert torch.equal(batch.images[:, 1, 1], without.images[:, 1, 1])
        # Where one of the two is unreadable, the image that stands for it, or the image itself.
        expected = torch.where((first == 4) | (second == 4), batch.index, second)
        assert batch.images[:, 0, 0, 0, 0].tolist() == batch.index.tolist()
        assert batch.images[:, 1, 0, 0, 0].tolist() == expected.tolist()
    assert list(bad_files.reasons) == ["n/4"]


def test_partners_of_images_of_any_size_need_crops():
    with pytest.raises(UserError, match="need crops"):
        TrainBatches(Numbered(9), 3, seed=0, bad_files=BadFiles(), partners=Partners(TRACKS, 1.0, 0))
