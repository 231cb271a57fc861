"""Streams of tar shards: every image once, whatever the ranks, workers, buffers and damages."""

import itertools
import os
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_samples import archive, batches, crops, same, seen, shards

from crosslevel.data.loaders import lanes, streams
from crosslevel.data.loaders.batches import Batch
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.rng import generator


def whole(stream, world, size, epoch_size, start=0, epoch=0, **how):
    """What each of ``world`` ranks gets, and its batches put together to those of all."""
    ranks = [batches(stream, size // world, epoch_size, rank=rank, world=world, **how) for rank in range(world)]
    for one in ranks:
        one.epoch, one.start = epoch, start
    delivered = [list(one) for one in ranks]
    together = [
        Batch(*(torch.cat(column) for column in list(zip(*parts, strict=True))[:3]))
        for parts in zip(*delivered, strict=True)
    ]
    return delivered, together


UNEVEN = [range(0, 31), range(31, 44), range(44, 90), range(90, 95), range(95, 120), range(120, 160), range(160, 161)]


@pytest.mark.parametrize("rows", [3, 12, 16])
def test_the_batches_of_all_are_the_same_on_any_number_of_ranks(tmp_path, rows):
    stream = shards(tmp_path, *UNEVEN, others=False, bad=(3, 100))
    how = {"size": 48, "epoch_size": 240, "rows": rows, "buffer": 24, "epoch": 2}  # a pass and a half
    _, alone = whole(stream, 1, **how)
    assert len(alone) == 5
    assert set(seen(alone)) == set(range(161)) - {3, 100}
    for world in (2, 3, 4, 8):
        same(alone, whole(stream, world, **how)[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_with_the_same_images_on_another_number_of_ranks(tmp_path, workers):
    stream = shards(tmp_path, *UNEVEN, others=False)
    how = {"size": 32, "epoch_size": 160, "rows": 8, "buffer": 40, "epoch": 1}
    _, begun = whole(stream, 2, **how)
    for world in (1, 4):
        same(begun[3:], whole(stream, world, start=3, workers=workers, **how)[1])


def test_ranks_read_shards_of_their_own_which_are_even(tmp_path):
    counts = [20] * 4 + [15] * 8
    ends = np.cumsum([0, *counts])
    stream = shards(tmp_path, *itertools.starmap(range, itertools.pairwise(ends)), others=False)
    for world in (2, 4):
        delivered, together = whole(stream, world, 32, 192, rows=8)
        read = [set(np.searchsorted(ends, seen(one), "right")) for one in delivered]
        assert sum(map(len, read)) == 12
        assert len(set(seen(together))) == 192  # no lane was at its end before


def test_more_ranks_than_lanes_share_them(tmp_path):
    delivered, together = whole(shards(tmp_path, range(20)), 2, 10, 20)
    assert sorted(seen(together)) == list(range(20))
    assert not set(seen(delivered[0])) & set(seen(delivered[1]))


@given(
    st.lists(st.integers(0, 10**10), min_size=1, max_size=40),
    st.integers(1, 300),
    st.integers(1, 20),
    st.integers(0, 2**40),
)
def test_lanes_have_all_rows_and_all_shards_once_and_are_even(sizes, batch, rows, seed):
    spans = lanes.rows_of(sizes, batch, rows)
    assert [row for span in spans for row in span] == list(range(batch))
    assert len(spans) == 1 or min(map(len, spans)) >= rows
    for rng in (torch.Generator(), generator(seed)):
        dealt = lanes.dealt(sizes, spans, rng)
        assert sorted(shard for lane in dealt for shard in lane) == list(range(len(sizes)))
    loads = [sum(sizes[shard] for shard in lane) for lane in lanes.dealt(sizes, spans, torch.Generator())]
    assert len(spans) == 1 or all(
        load / len(span) <= 1.1001 * sum(sizes) / batch for load, span in zip(loads, spans, strict=True)
    )


def test_as_many_lanes_as_ranks_with_batches_of_their_own_rows():
    assert len(lanes.rows_of([1] * 10_000, 64 * 32)) == 128
    assert len(lanes.rows_of([1] * 10_000, 256)) == 16
    assert len(lanes.rows_of([1] * 20, 256)) == 10
    assert len(lanes.rows_of([1], 256)) == 1
    assert len(lanes.rows_of([100] + [1] * 99, 256)) == 2  # half of all is one shard


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**40)
)
@settings(max_examples=20)
def test_a_pass_has_every_image_once_over_all_lanes(sizes, rows, buffer, seed):
    place = f"memory://{uuid.uuid4()}"
    ends = np.cumsum([0, *sizes])
    for i, (first, last) in enumerate(itertools.pairwise(ends)):
        with fsspec.open(f"{place}/{i}.tar", "wb") as file:
            file.write(archive(range(first, last), others=False))
    stream, total = ImageStream.open(parse(f"{place}/*.tar")), int(ends[-1])
    found = []
    for lane in batches(stream, 16, max(total, 16), seed=seed, rows=rows).dealt(3):
        found += [path for path, _ in streams.shuffled(stream.read(lane, []), buffer, generator(seed))]
    assert len(found) == len(set(found)) == total


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    stream = shards(tmp_path, range(9), range(9, 30), range(30, 44), bad=(3, 17))
    results = []
    for workers in (0, 1, 2):
        some = batches(stream, 4, 30, workers=workers, buffer=10)
        results.append([])
        for epoch in (0, 1, 5):
            some.epoch = epoch
            results[-1] += list(some)
        assert set(some.bad_files.reasons) <= {"s-0.tar/0003.png", "s-1.tar/0017.png"}
    assert results[0][0].images.shape == (4, 2, 3, 6, 8)
    assert results[0][0].labels.tolist() == [-1] * 4
    same(results[0], results[1])
    same(results[0], results[2])


def test_the_order_does_not_depend_on_the_speed_of_reading(tmp_path):
    """Nor on what a shard comes from: here the first is a pipe, filled slowly."""
    stream, shard = shards(tmp_path, range(50), range(50, 60), range(60, 100)), tmp_path / "s-0.tar"
    want, content = seen(batches(stream, 10, 100, buffer=16)), shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)

    def fill():
        with shard.open("wb", buffering=0) as pipe:
            for first in range(0, len(content), 4096):
                pipe.write(content[first : first + 4096])
                time.sleep(0.004)

    def release():
        if not ended.wait(60):  # whoever opens the pipe once more finds its end, and the test fails
            os.close(os.open(shard, os.O_WRONLY | os.O_NONBLOCK))

    writer, ended = threading.Thread(target=fill, daemon=True), threading.Event()
    writer.start()
    threading.Thread(target=release, daemon=True).start()
    found = seen(batches(stream, 10, 100, buffer=16))
    ended.set()
    assert found == want
    writer.join(10)
    assert not writer.is_alive()


def test_crops_are_drawn_by_seed_epoch_and_number(tmp_path):
    stream = shards(tmp_path, range(12))
    some = batches(stream, 4, 12, seed=5)
    some.epoch = 3
    for batch in some:
        for number, views in zip(batch.index.tolist(), batch.images, strict=True):
            assert torch.equal(views, crops(views[0], generator(5, 3, number)))


def test_a_stream_that_ends_early_begins_again_in_another_order(tmp_path):
    found = seen(batches(shards(tmp_path, range(10)), 5, 40))
    passes = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(part) == list(range(10)) for part in passes)
    assert len({tuple(part) for part in passes}) == 4


def test_an_epoch_leaves_out_what_is_beyond_it(tmp_path):
    found = seen(batches(shards(tmp_path, range(100)), 8, 20, buffer=100))
    assert len(found) == len(set(found)) == 16  # the last, smaller batch is left out
    assert max(found) > 50


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_a_resumed_epoch_equals_the_rest_of_the_whole_one(tmp_path, start, workers):
    stream = shards(tmp_path, range(11), range(11, 25), bad=(2, 20))
    whole = batches(stream, 5, 30, buffer=6)
    whole.epoch = 4
    resumed = batches(stream, 5, 30, buffer=6, workers=workers)
    resumed.epoch, resumed.start = 4, start
    rest = iter(resumed)
    assert resumed.start == 0
    want = list(whole)
    same(want[start:], list(rest))
    same(want, list(resumed))


def test_what_is_skipped_is_not_decoded(tmp_path):
    order = seen(batches(shards(tmp_path, range(60)), 5, 60))
    resumed = batches(shards(tmp_path, range(60), bad=order[:50]), 5, 60)
    resumed.start = 10
    assert seen(resumed) == order[50:]
    assert not len(resumed.bad_files)


def test_leaving_an_epoch_early_does_not_disturb_the_next(tmp_path):
    some = batches(shards(tmp_path, range(40), range(40, 80)), 5, 80, workers=2, buffer=16)
    want = list(some)
    for _ in range(3):
        for batch in some:
            assert torch.equal(batch.images, want[0].images)
            break
    same(want, list(some))
    assert not [t for t in threading.enumerate() if t.name.startswith("crosslevel-read")]
