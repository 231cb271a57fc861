"""A decode that crashes, or runs out of memory, in a process of its own: the image is named, and the rest goes on."""

import faulthandler
import os
import signal
import warnings

import numpy as np
import pytest
from PIL import Image

from crosslevel.data import decode as decoding
from crosslevel.data.loaders.batches import EvalBatches, TrainBatches
from crosslevel.data.loaders.pool import Pool
from crosslevel.data.open import open_images
from crosslevel.data.sources.folder import Files
from crosslevel.utils.errors import MachineError


@pytest.fixture(autouse=True)
def last_words(monkeypatch, tmp_path_factory):
    """Decoders that fail as those in C do, where an image has bad luck written into it.

    The folder holds what each process says when it dies: else pytest's faulthandler writes it into the tests' log.
    """
    own, folder = decoding._decode_pillow, tmp_path_factory.mktemp("last_words")

    def decode(data, *rest, **named):
        for word, number in ((b"SEGFAULT", signal.SIGSEGV), (b"ABORT", signal.SIGABRT), (b"KILLED", signal.SIGKILL)):
            if word in data:
                file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT)
                os.dup2(file, 2)
                faulthandler.disable()  # enabled twice, it would not take signals back that a library took meanwhile
                faulthandler.enable(file)
                os.kill(os.getpid(), number)
        if b"HUNGRY" in data:
            return np.ones(12 * 2**30, np.uint8)  # more than a process may have
        return own(data, *rest, **named)

    monkeypatch.setattr(decoding, "_decode_pillow", decode)
    return folder


def write(folder, **luck):
    for i in range(12):
        image = Image.fromarray(np.full((8, 8, 3), i, np.uint8))
        image.save(folder / f"{i:02}.bmp")
        with open(folder / f"{i:02}.bmp", "ab") as file:
            file.write(luck.get(f"n{i}", b""))
    return open_images(folder)


def evaluated(images):
    bad_files = images.bad_files()
    batches = EvalBatches(images, 2, 8, bad_files=bad_files, workers=2)
    return [int(i) for batch in batches for i in batch.index], bad_files.reasons


def test_images_that_crash_their_decoder_are_left_out_and_named(tmp_path, last_words):
    images = write(tmp_path, n3=b"SEGFAULT", n7=b"ABORT")
    with pytest.warns(UserWarning, match="crashed the process") as caught:
        index, reasons = evaluated(images)
    assert index == [i for i in range(12) if i not in (3, 7)]
    assert reasons == {
        "03.bmp": "its decoder crashed the process that read it: Segmentation fault",
        "07.bmp": "its decoder crashed the process that read it: Aborted",
    }
    assert len([line for line in caught if "left out" in str(line.message)]) == 2
    assert evaluated(images) == (index, reasons)  # known now: nothing crashes again
    said = sorted(file.read_text().lower() for file in last_words.iterdir())
    assert len(said) == 2
    assert "fatal python error: aborted" in "".join(said)


@pytest.mark.filterwarnings("ignore:.*crashed the process")
def test_a_training_goes_on_with_the_batches_of_one_that_knew(tmp_path):
    images = write(tmp_path, n5=b"SEGFAULT")

    def epochs():
        bad_files = images.bad_files()
        batches = TrainBatches(images, 4, seed=0, bad_files=bad_files, workers=2)
        found = []
        for batches.epoch in range(2):
            found += [batch.index.tolist() for batch in batches]
        return found, bad_files.reasons

    first = epochs()
    assert list(first[1]) == ["05.bmp"]
    assert all(5 not in batch and len(batch) == 4 for batch in first[0])
    assert epochs() == first


def test_a_process_may_not_take_all_memory(tmp_path):
    images = write(tmp_path, n2=b"HUNGRY")
    index, reasons = evaluated(images)
    assert index == [i for i in range(12) if i != 2]
    assert reasons == {"02.bmp": "not enough memory to decode it"}


def test_one_that_is_killed_ends_the_run_in_a_line_that_names_the_image(tmp_path):
    images = write(tmp_path, n4=b"KILLED")
    with pytest.raises(MachineError, match=r"it is killed by signal: Killed, while it decoded .*/04.bmp; if memory"):
        evaluated(images)


def test_where_everything_crashes_the_run_ends(tmp_path):
    images = write(tmp_path, n1=b"SEGFAULT")
    pool = Pool(images, range(12), workers=2, persistent=False, most_crashes=0)
    with pytest.raises(MachineError, match=r"1 images crashed .* the last one .*/01.bmp \(Segmentation fault\)"):
        list(pool)


class Faulty(Files):
    def __getitem__(self, i):
        raise RuntimeError("a fault of ours")


def test_other_errors_of_a_process_are_what_they_were(tmp_path):
    images = write(tmp_path)
    images.__class__ = Faulty
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="a fault of ours"):
        evaluated(images)
