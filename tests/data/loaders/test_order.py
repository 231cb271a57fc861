"""Natural order and block shuffle: every image once, reproducible, each rank with a run of its own."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import Numbered

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import TrainBatches
from crosslevel.data.loaders.order import WINDOW, permuted


def in_memory(count):
    data = torch.arange(count)[:, None, None, None].remainder(251).to(torch.uint8).expand(count, 3, 2, 2)
    return InMemoryImages(data.contiguous(), [f"p/{i}" for i in range(count)])


def batches_of(images, size, epoch, start=0, **options):
    batches = TrainBatches(images, size, **{"seed": 0, "bad_files": BadFiles(), **options})
    batches.epoch, batches.start = epoch, start
    return batches


def indices(*arguments, **options):
    return [batch.index.tolist() for batch in batches_of(*arguments, **options)]


@st.composite
def cuts(draw):
    """Blocks that cover all images in order, as sources state them."""
    ends = torch.tensor(draw(st.lists(st.integers(1, 9), min_size=2, max_size=40))).cumsum(0).tolist()
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


@given(st.integers(4, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**40))
def test_natural_batches_follow_each_other_as_in_the_source(count, size, world, epoch, seed):
    images, seen = in_memory(count), []
    for rank in range(world):
        got = indices(images, size, epoch, seed=seed, order="natural", rank=rank, world=world)
        run = list(chain(*got))
        assert all(later == (earlier + 1) % count for earlier, later in pairwise(run))
        assert len(got) == len(batches_of(images, size, 0, world=world))
        assert {len(batch) for batch in got} == {min(size, count // world)}
        assert got == indices(images, size, epoch, seed=seed, order="natural", rank=rank, world=world)
        seen += run
    assert len(set(seen)) == len(seen)
    if count % world == 0 and (count // world) % size == 0:
        assert sorted(seen) == list(range(count))


def test_an_order_that_there_is_not():
    with pytest.raises(ValueError, match="order='natrual': use shuffled or natural"):
        batches_of(in_memory(8), 2, 0, order="natrual")


def test_ranks_have_neighbouring_runs():
    orders = [batches_of(in_memory(30), 5, 2, order="natural", rank=r, world=3).order(2) for r in range(3)]
    whole = torch.cat(orders)
    assert torch.equal(whole, (torch.arange(30) + whole[0]) % 30)


def test_epochs_and_seeds_start_elsewhere():
    starts = {
        (s, e): indices(in_memory(500), 500, e, seed=s, order="natural")[0][0] for s in range(4) for e in range(5)
    }
    assert len(set(starts.values())) > 15


def views(image, generator):
    noise = torch.randint(0, 256, (2, *image.shape), generator=generator, dtype=torch.uint8)
    return noise // 2 + image // 2


@pytest.mark.parametrize("order", ["natural", "shuffled"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_equals_the_rest_in_any_order(order, workers):
    images = Numbered(30, bad=(2, 17))
    images.blocks = [range(0, 7), range(7, 20), range(20, 30)]
    options = {"crops": views, "workers": workers, "order": order}
    whole = list(batches_of(images, 7, 3, **options))
    rest = list(batches_of(images, 7, 3, start=2, **options))
    assert len(whole) == 4
    assert len(rest) == 2
    for one, other in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


@given(cuts(), st.integers(0, 2**40))
def test_block_shuffle_is_a_permutation_of_windows_of_blocks(blocks, seed):
    order = permuted(blocks, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(blocks[-1].stop))
    assert torch.equal(order, permuted(blocks, torch.Generator().manual_seed(seed)))
    owner = torch.cat([torch.full((len(block),), b) for b, block in enumerate(blocks)])[order].tolist()
    # No more than a window's blocks are open at a time: a block is not met again once its window is over.
    left = owner
    while left:
        window = list(dict.fromkeys(left))
        chosen = set(window[: min(WINDOW, len(window))])
        size = sum(len(blocks[b]) for b in set(left[: max(i for i, b in enumerate(left) if b in chosen) + 1]))
        assert len(set(left[:size])) <= WINDOW
        assert not set(left[:size]) & set(left[size:])
        left = left[size:]


@given(cuts(), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3))
def test_ranks_share_the_blocks(blocks, world, size, epoch):
    images = in_memory(blocks[-1].stop)
    images.blocks = blocks
    if len(images) < world:
        return
    orders = [batches_of(images, size, epoch, rank=rank, world=world).order(epoch) for rank in range(world)]
    whole = torch.cat(orders)
    assert len(whole.unique()) == len(whole) == len(images) // world * world
    assert {len(order) for order in orders} == {len(images) // world}


def test_two_ranks_read_different_blocks():
    images = in_memory(64 * 10)
    images.blocks = [range(i, i + 10) for i in range(0, 640, 10)]
    read = [set((batches_of(images, 8, 0, rank=r, world=2).order(0) // 10).tolist()) for r in range(2)]
    assert not read[0] & read[1]


def test_images_of_a_window_are_mixed_and_epochs_differ():
    images = in_memory(WINDOW * 3 * 100)
    images.blocks = [range(i, i + 100) for i in range(0, len(images), 100)]
    first, second = (indices(images, 64, epoch) for epoch in (0, 1))
    assert first != second
    # 64 draws from 8 blocks of 100 miss one with a chance of 8 * (7 / 8)^64 = 0.2 %.
    assert all(len({i // 100 for i in batch}) >= WINDOW - 1 for batch in first)


def test_without_blocks_the_order_is_the_permutation_that_it_was():
    """The order of seed 3, epoch 2 before there were blocks; of each batch of all ranks, a rank has its part."""
    import numpy as np

    state = np.random.SeedSequence((3, 2)).generate_state(1, np.uint64)
    want = torch.randperm(50, generator=torch.Generator().manual_seed(int(state[0])))
    for rank in range(3):
        got = batches_of(in_memory(50), 4, 2, seed=3, rank=rank, world=3).order(2)
        assert torch.equal(got, want[:48].view(4, 3, 4)[:, rank].flatten())
