"""Training batches and evaluation batches, on files and on images in memory."""

import os
import signal
import sys
import time

import pytest
import torch
from forks import started, waited_for
from hypothesis import given
from hypothesis import strategies as st
from picture_samples import Numbered, is_bad

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.images import InMemoryImages
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches, fit
from crosslevel.data.loaders.workers import leave_interrupts
from crosslevel.data.sources.folder import Files
from crosslevel.utils.errors import SourceError


def views(image, generator):
    """Two noisy versions: shows which generator was used."""
    noise = torch.randint(0, 256, (2, *image.shape), generator=generator, dtype=torch.uint8)
    return noise // 2 + image // 2


def in_memory(count, size=4):
    data = torch.arange(count * 3 * size * size).remainder(251).view(count, 3, size, size).to(torch.uint8)
    return InMemoryImages(data, [f"p/{i}" for i in range(count)], torch.arange(count) % 3, ["a", "b", "c"])


def run(batches):
    return list(batches)


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


# TrainBatches


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**40))
def test_an_epoch_is_a_permutation_shared_by_the_ranks(count, size, world, epoch, seed):
    images = in_memory(count)
    if count < world:
        with pytest.raises(SourceError, match="use fewer ranks"):
            TrainBatches(images, size, seed=seed, bad_files=BadFiles(), world=world)
        return
    seen, orders = [], []
    for rank in range(world):
        batches = TrainBatches(images, size, seed=seed, bad_files=BadFiles(), rank=rank, world=world)
        batches.epoch = epoch
        got = run(batches)
        share = count // world
        assert len(got) == len(batches) == max(1, share // size)
        assert {len(batch.index) for batch in got} == {min(size, share)}
        orders.append(batches.order(epoch))
        seen.append(torch.cat([batch.index for batch in got]))
        assert torch.equal(seen[-1], orders[-1][: len(seen[-1])])
        for batch in got:
            assert torch.equal(batch.images, images.data[batch.index])
            assert torch.equal(batch.labels, images.labels[batch.index])
    whole = torch.cat(orders)
    assert len(whole.unique()) == len(whole) == count // world * world
    assert len(torch.cat(seen).unique()) == sum(map(len, seen))


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return tuple(TrainBatches(in_memory(50), 10, seed=seed, bad_files=BadFiles()).order(epoch).tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(order(*key) == value for key, value in orders.items())
    # Over many epochs each image comes first about equally often: 2,000 draws of 50, standard deviation 6.
    batches = TrainBatches(in_memory(50), 10, seed=0, bad_files=BadFiles())
    first = torch.stack([batches.order(epoch)[0] for epoch in range(2000)]).bincount(minlength=50)
    assert first.min() > 15
    assert first.max() < 70


def test_any_number_of_workers_gives_the_same_batches():
    results = []
    for workers in (0, 1, 2):
        batches = TrainBatches(Numbered(40, bad=(3, 8)), 7, seed=1, bad_files=BadFiles(), crops=views, workers=workers)
        epochs = []
        for epoch in (0, 1, 5):
            batches.epoch = epoch
            epochs += run(batches)
        assert sorted(batches.bad_files.reasons) == ["n/3", "n/8"]
        results.append(epochs)
    assert results[0][0].images.shape == (7, 2, 3, 4, 5)
    assert len({tuple(batch.index.tolist()) for batch in results[0]}) == 15
    same(results[0], results[1])
    same(results[0], results[2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_a_resumed_epoch_equals_the_rest_of_the_whole_one(start, workers):
    images = Numbered(30, bad=(2, 17))
    batches = TrainBatches(images, 7, seed=3, bad_files=BadFiles(), crops=views, workers=workers)
    batches.epoch = 6
    whole = run(batches)
    resumed = TrainBatches(images, 7, seed=3, bad_files=BadFiles(), crops=views, workers=workers)
    resumed.epoch, resumed.start = 6, start
    images.decoded.clear()
    rest = iter(resumed)
    assert resumed.start == 0
    same(whole[start:], list(rest))
    if not workers:
        assert len(images.decoded) <= 7 * (4 - start) + 4
    same(whole, run(resumed))


def test_leaving_an_epoch_early_does_not_disturb_the_next():
    batches = TrainBatches(Numbered(60), 5, seed=0, bad_files=BadFiles(), crops=views, workers=2)
    want = run(batches)
    for _ in range(3):
        for batch in batches:
            assert torch.equal(batch.images, want[0].images)
            break
    same(want, run(batches))


def test_crops_depend_on_seed_epoch_and_image_only():
    def crops(seed, epoch, size):
        batches = TrainBatches(Numbered(12), size, seed=seed, bad_files=BadFiles(), crops=views)
        batches.epoch = epoch
        return {int(i): image for batch in run(batches) for i, image in zip(batch.index, batch.images, strict=True)}

    base = crops(0, 0, 4)
    for other, equal in ((crops(0, 0, 3), True), (crops(0, 1, 4), False), (crops(1, 0, 4), False)):
        for i in base:
            assert torch.equal(base[i], other[i]) == equal
    assert len({tuple((image - i // 2).flatten().tolist()) for i, image in base.items()}) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_and_recorded(photos, workers):
    bad_files = BadFiles()
    batches = TrainBatches(photos, 4, seed=0, bad_files=bad_files, resize=16, workers=workers)
    for epoch in range(3):
        batches.epoch = epoch
        got = run(batches)
        assert [len(batch.index) for batch in got] == [4, 4, 4]
        order = batches.order(epoch)
        for want, j, image, label in zip(
            order,
            *(torch.cat(column) for column in zip(*((b.index, b.images, b.labels) for b in got), strict=True)),
            strict=True,
        ):
            assert not is_bad(photos, j)
            assert j == want or is_bad(photos, want)
            assert torch.equal(image, fit(photos[int(j)][0], 16))
            assert label == photos.labels[j]
    assert set(bad_files.reasons) == {photos.paths[i] for i in range(12) if is_bad(photos, i)}
    assert set(bad_files.reasons.values()) == {"empty file", "not an image, or the beginning of one is damaged"}


def test_replacements_vary():
    batches = TrainBatches(Numbered(100, bad=[7]), 100, seed=0, bad_files=BadFiles(), resize=4)
    replacements = set()
    for epoch in range(20):
        batches.epoch = epoch
        index = next(iter(batches)).index
        replacements.add(int(index[batches.order(epoch) == 7]))
    assert len(replacements) > 12


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_readable_image_is_found(workers):
    images = Numbered(300, bad=set(range(300)) - {211})
    batches = TrainBatches(images, 20, seed=0, bad_files=BadFiles(), workers=workers)
    batch = next(iter(batches))
    assert batch.index.tolist() == [211] * 20
    assert (batch.labels == 2110).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_the_run(workers):
    bad_files = BadFiles()
    with pytest.raises(SourceError, match=r"^numbered: none of its 9 images can be read"):
        run(TrainBatches(Numbered(9, bad=range(9)), 4, seed=0, bad_files=bad_files, workers=workers))
    assert len(bad_files) == 9


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_need_crops(photos, workers):
    with pytest.raises(SourceError, match="differ in size: give resize or crops"):
        run(TrainBatches(photos, 4, seed=0, bad_files=BadFiles(), workers=workers))


def test_wrong_arguments():
    images = in_memory(10)
    for wrong, says in (
        ({"rank": 2, "world": 2}, "rank=2 is not one of the 2 ranks"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"crops": views}, "for streamed images"),
        ({"resize": 8}, "for streamed images"),
    ):
        with pytest.raises(ValueError, match=says):
            TrainBatches(images, **{"batch_size": 4, "seed": 0, "bad_files": BadFiles(), **wrong})


def test_no_labels_are_minus_one():
    assert (next(iter(TrainBatches(Numbered(8, labels=False), 8, seed=0, bad_files=BadFiles()))).labels == -1).all()
    images = InMemoryImages(torch.zeros(5, 3, 2, 2, dtype=torch.uint8), list("abcde"))
    assert (next(iter(TrainBatches(images, 3, seed=0, bad_files=BadFiles()))).labels == -1).all()


# EvalBatches


@pytest.mark.parametrize(
    ("workers", "start", "size"),
    [
        *((0, start, size) for start in (0, 5, 11, 12) for size in (1, 5, 12, 50)),
        *((2, start, 5) for start in (0, 5, 11, 12)),
        *((2, 5, size) for size in (1, 12, 50)),
    ],
)
def test_each_image_once_in_order(photos, workers, start, size):
    bad_files = BadFiles()
    batches = EvalBatches(photos, size, 24, bad_files=bad_files, workers=workers, start=start)
    got = run(batches)
    good = [i for i in range(start, 12) if not is_bad(photos, i)]
    assert [i for batch in got for i in batch.index.tolist()] == good
    assert len(got) <= len(batches)
    for batch in got:
        assert 0 < len(batch.index) <= size
        for i, image, label in zip(batch.index.tolist(), batch.images, batch.labels, strict=True):
            assert torch.equal(image, fit(photos[i][0], 24))
            assert label == photos.labels[i]
    assert set(bad_files.reasons) == {photos.paths[i] for i in range(start, 12) if is_bad(photos, i)}
    same(got, run(batches))


@pytest.mark.parametrize("size", [4, 3])
def test_packed_images_are_evaluated_alike(size):
    images = in_memory(23)
    got = run(EvalBatches(images, 5, size, bad_files=BadFiles(), start=3))
    assert [len(batch.index) for batch in got] == [5, 5, 5, 5]
    assert torch.equal(torch.cat([batch.index for batch in got]), torch.arange(3, 23))
    assert torch.equal(torch.cat([batch.images for batch in got]), torch.stack([fit(i, size) for i in images.data[3:]]))
    assert torch.equal(torch.cat([batch.labels for batch in got]), images.labels[3:])


def test_reading_runs_only_two_batches_ahead():
    images = Numbered(1000)
    batches = iter(EvalBatches(images, 10, 4, bad_files=BadFiles()))
    next(batches)
    time.sleep(0.2)
    assert len(images.decoded) <= 40
    batches.close()
    time.sleep(0.1)
    assert len(images.decoded) <= 40


def test_an_error_of_the_program_is_not_taken_for_a_bad_file():
    class Faulty(Numbered):
        def __getitem__(self, i):
            raise ZeroDivisionError("a programmer's mistake")

    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="a programmer's mistake"):
            run(EvalBatches(Faulty(4), 2, 4, bad_files=BadFiles(), workers=workers))


def loop(root):
    """As a program does."""
    batches = TrainBatches(Files.from_folder(root), 4, seed=0, bad_files=BadFiles(), resize=16, workers=2)
    try:
        while True:
            for _ in batches:
                print("batch", flush=True)
            batches.epoch += 1
    except KeyboardInterrupt:
        print("stopped", flush=True)


def test_a_worker_is_silent_only_where_the_main_process_hung_up(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *rest: told.append(kind))
    # What signals do then is for a process of its own: the processes that tests start would inherit it.
    leave_interrupts(0, leave=lambda: None)
    for error in (EOFError(), BrokenPipeError(), ConnectionResetError(), ValueError(), OSError()):
        sys.excepthook(type(error), error, None)
    assert told == [ValueError, OSError]


def test_ctrl_c_ends_workers_quietly(photos, tmp_path):
    child, said = started(tmp_path, lambda: loop(photos.root)), tmp_path / "out"
    while not said.exists() or said.read_text().count("batch") < 5:
        assert os.waitpid(child, os.WNOHANG)[0] == 0, (tmp_path / "err").read_text()
        time.sleep(0.01)
    os.killpg(child, signal.SIGINT)
    code, error = waited_for(tmp_path, child)
    assert said.read_text().endswith("stopped\n")
    assert "Traceback" not in error
    assert code == 0
