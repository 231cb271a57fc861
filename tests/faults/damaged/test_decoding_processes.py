"""What several processes that decode take together, and how they wait for each other."""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest
from picture_samples import encoded as whole
from PIL import Image, ImageFile
from worst_samples import BEYOND, WORST, chunk

from crosslevel.data import decode as decoding
from crosslevel.data.decoding import memory


def written(folder):
    """The worst images: those that are refused, and the largest that are not, with pixels in all of them."""
    for kind, made in (WORST | BEYOND).items():
        (folder / f"{kind}.img").write_bytes(made())
    side, compressor = 12_500, zlib.compressobj(1)
    row = bytes([0]) + bytes(range(250)) * (side * 3 // 250)
    packed = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    largest = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    ramp = Image.linear_gradient("L").convert("RGB")
    others = {
        "a.webp": whole(ramp.resize((5400, 5400)), "WEBP", lossless=True, method=0),
        "b.tif": whole(ramp.resize((7000, 7000)), "TIFF", compression="tiff_lzw", strip_size=2**30),
        "c.jpg": whole(ramp.resize((8000, 8000)), "JPEG", progressive=True, subsampling=0),
    }
    for name, data in {"0.png": largest, "1.png": largest, **others}.items():
        (folder / name).write_bytes(data)


def tree_of(pid):
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(child for file in children for number in file.read_text().split() for child in tree_of(int(number)))]


def in_all(pid):
    """Bytes that a process and its children have in memory; what they share counts once."""
    total = 0
    for one in tree_of(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


READER = """
import sys
from crosslevel.data.decoding import memory
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images

memory.acquire_slots.__defaults__ = (600.0,)  # on a machine that has other work, one may wait for minutes
images = open_images(sys.argv[1])
bad_files = images.bad_files()
read = sum(len(batch.index) for batch in EvalBatches(images, 1, 32, bad_files=bad_files, workers=2))
print(read, *sorted(bad_files.reasons), sep="\\n")
"""


@pytest.mark.slow
def test_the_worst_images_take_less_than_a_gigabyte_and_a_half_in_all_processes_together(tmp_path):
    """Two processes decode for a third; a third of it is Python and PyTorch."""
    (tmp_path / "images").mkdir()
    written(tmp_path / "images")
    most, line = 0, [sys.executable, "-c", READER, str(tmp_path / "images")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                most = max(most, in_all(reader.pid))
            time.sleep(0.05)  # looking takes a core itself, decoding seconds
        said, error = reader.communicate()
    assert reader.returncode == 0, error
    count, *refused = said.splitlines()
    assert count == "5", (count, refused)
    assert refused == sorted(f"{kind}.img" for kind in WORST | BEYOND)
    assert 2e8 < most < 1.5e9, f"{most / 1e9:.2f} GB"


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP"])
def test_nothing_is_decoded_before_there_is_room(format, monkeypatch):
    """Not even to see whether it is turned."""
    data, events, load = bytearray(whole(Image.new("RGB", (40, 30)), format)), [], ImageFile.ImageFile.load

    @contextlib.contextmanager
    def room(need):
        events.append("room")
        yield
        events.append("out")

    monkeypatch.setattr(decoding, "room", room)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: events.append("load") or load(image))
    decoding.decode(data, "x")
    assert events[0] == "room"
    assert events[-1] == "out"
    assert "load" in events or format in ("WEBP", "AVIF", "JPEG2000")  # these have a way of their own


def test_large_images_of_several_processes_wait_for_each_other(tmp_path):
    """Slots that a killed process held are free again."""
    total, pid = memory.budget() // memory.SLOT, os.fork()
    if not pid:
        with memory.room((total - 2) * memory.SLOT):
            (tmp_path / "held").touch()
            signal.pause()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert len(_slots(2)) == 2
    with pytest.warns(UserWarning, match="waited 0 s for memory to decode an image: another process of this command"):
        assert len(_slots(3)) == 2  # the third one's turn does not come
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(_slots(total)) == total


def test_a_limit_that_no_number_of_slots_fills_keeps_nobody_waiting(monkeypatch):
    for megabytes in (40, 100):
        monkeypatch.setenv("CROSSLEVEL_DECODE_MB", str(megabytes))
        with warnings.catch_warnings(action="error"), memory.room(megabytes * 2**20):
            pass


def test_a_process_that_was_stopped_in_the_turnstile_does_not_stop_the_others():
    total, pid = memory.budget() // memory.SLOT, os.fork()
    if not pid:
        fcntl.lockf(memory._file, fcntl.LOCK_EX, 1, memory._TURNSTILE)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    assert len(_slots(2)) == 2  # all are free
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)
    assert len(_slots(total)) == total


def _slots(count):
    slots = memory.acquire_slots(count, patience=0.2)
    for slot in slots:
        fcntl.lockf(memory._file, fcntl.LOCK_UN, 1, slot)
    return slots
