"""Streams of tar shards: every image once, whatever the ranks, workers, buffers and damages."""

import itertools
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stream_samples import archive, batches, crops, same, seen, shards

from crosslevel.data.loaders import streams
from crosslevel.data.sources.containers.remote import Tape
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.rng import generator


@pytest.mark.filterwarnings("ignore:.*cannot be dealt out")
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(0, 2**40),
)
def test_a_pass_has_every_image_once_over_all_ranks(sizes, world, buffer, epoch, seed):
    place = f"memory://{uuid.uuid4()}"
    ends = np.cumsum([0, *sizes])
    for i, (first, last) in enumerate(itertools.pairwise(ends)):
        with fsspec.open(f"{place}/{i}.tar", "wb") as file:
            file.write(archive(range(first, last), others=False))
    stream, total = ImageStream.open(parse(f"{place}/*.tar")), int(ends[-1])
    parts, found = [], []
    for rank in range(world):
        rank_batches = batches(stream, 4, max(total, world), seed=seed, rank=rank, world=world, buffer=buffer)
        parts += rank_batches.parts(epoch)
        samples = list(streams._shuffled(stream.read(rank_batches.parts(epoch), []), buffer, generator(seed)))
        found += [path for path, _ in samples]
    assert len(found) == len(set(found)) == total
    # Shards that the ranks divide are read by one of them only.
    alone = [part.shard for part in parts if part.of == 1]
    assert len(alone) == len(set(alone)) == len(sizes) // world * world


@pytest.mark.parametrize("workers", [0, 2])
def test_two_shards_in_two_ranks_cover_every_image_once_an_epoch(tmp_path, workers):
    stream = shards(tmp_path, range(20), range(20, 40))
    orders = []
    for epoch in range(2):
        found, index = [], []
        for rank in range(2):
            half = batches(stream, 5, 40, rank=rank, world=2, workers=workers, buffer=7)
            half.epoch = epoch
            delivered = list(half)
            assert len(delivered) == len(half) == 4
            assert len({number // 20 for number in seen(delivered)}) == 1  # a shard is read by one rank
            found += seen(delivered)
            index += torch.cat([batch.index for batch in delivered]).tolist()
        assert sorted(found) == sorted(index) == list(range(40))
        orders.append(found)
    assert orders[0] != orders[1] != list(range(40))


def test_one_shard_in_two_ranks_is_split_by_image_and_said_so(tmp_path):
    stream = shards(tmp_path, range(20))
    with pytest.warns(UserWarning, match="1 of the shards, 1 in all, cannot be dealt out to 2 ranks: .* one in 2 of"):
        first = batches(stream, 5, 20, rank=0, world=2)
    one, other = seen(first), seen(batches(stream, 5, 20, rank=1, world=2))
    assert sorted(one + other) == list(range(20))
    assert {number % 2 for number in one} == {0}


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    stream = shards(tmp_path, range(9), range(9, 30), range(30, 44), bad=(3, 17))
    results = []
    for workers in (0, 1, 2):
        some = batches(stream, 4, 30, workers=workers, buffer=10)
        results.append([])
        for epoch in (0, 1, 5):
            some.epoch = epoch
            results[-1] += list(some)
        assert set(some.bad.reasons) <= {"s-0.tar/0003.png", "s-1.tar/0017.png"}
    assert results[0][0].images.shape == (4, 2, 3, 6, 8)
    assert results[0][0].labels.tolist() == [-1] * 4
    same(results[0], results[1])
    same(results[0], results[2])


def test_the_order_does_not_depend_on_the_speed_of_reading(tmp_path, monkeypatch):
    stream = shards(tmp_path, range(50), range(50, 60), range(60, 100))
    want = seen(batches(stream, 10, 100, buffer=16))
    read, calls = Tape.read, []

    def slow(tape, count):
        calls.append(tape.name)
        time.sleep(0.004 * (len(calls) % 3 == 0 and "s-0" in tape.name))
        return read(tape, count)

    monkeypatch.setattr(Tape, "read", slow)
    assert seen(batches(stream, 10, 100, buffer=16)) == want
    assert calls


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


def test_what_is_skipped_is_not_decoded(tmp_path, monkeypatch):
    decoded = []
    decode = streams.decode
    monkeypatch.setattr(
        streams, "decode", lambda data, path, **more: decoded.append(path) or decode(data, path, **more)
    )
    resumed = batches(shards(tmp_path, range(60)), 5, 60)
    resumed.start = 10
    assert len(list(resumed)) == 2
    assert len(decoded) == 10


def test_leaving_an_epoch_early_does_not_disturb_the_next(tmp_path):
    some = batches(shards(tmp_path, range(40), range(40, 80)), 5, 80, workers=2, buffer=16)
    want = list(some)
    for _ in range(3):
        for batch in some:
            assert torch.equal(batch.images, want[0].images)
            break
    same(want, list(some))
    assert not [t for t in threading.enumerate() if t.name.startswith("crosslevel-read")]
