"""The worst images: a few bytes that ask for gigabytes. Decoded in children with a limit, all of them together."""

import contextlib
import ctypes
import fcntl
import io
import os
import signal
import struct
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from picture_samples import encoded as whole

from crosslevel.data import decode as decoding
from crosslevel.data.decode import decode
from crosslevel.data.decoding import formats, memory, sizes
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images
from crosslevel.utils.errors import BadImage

SIDE = 13_300  # just below the pixel limit


def peak(work, small):
    """Bytes that ``work`` takes at most in a fork of this process, which has done ``small``; and what it returns."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            # What was freed before is given back, and nothing large is taken from it.
            ctypes.CDLL(None).mallopt(-3, 2**17)
            small()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            said = work()
            os.write(writing, f"{_status('VmHWM') - before}\n{said}".encode())
        except BaseException:
            os.write(writing, b"-1\n" + traceback.format_exc().encode()[-2000:])
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        taken, _, said = pipe.read().partition("\n")
    os.waitpid(pid, 0)
    assert taken not in ("", "-1"), said
    return int(taken), said


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side, depth, color):
    """A PNG whose header asks for ``side`` squared pixels, with hardly any data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(format, mode="RGB", patch=None, **options):
    """A small image, with the bytes of its size replaced."""
    stream = io.BytesIO()
    Image.new(mode, (16, 16), 9 if mode in ("L", "P", "I;16") else None).save(stream, format, **options)
    data = bytearray(stream.getvalue())
    if patch:
        patch(data)
    return bytes(data)


def webp(data):
    data[21:25] = ((SIDE - 1) | (SIDE - 1) << 14).to_bytes(4, "little")


def gif(data):
    size = struct.pack("<HH", SIDE, SIDE)
    data[6:10] = size
    at = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[at + 5 : at + 9] = size


def tiff(data):
    count = struct.unpack_from("<H", data, int.from_bytes(data[4:8], "little"))[0]
    for i in range(count):
        at = int.from_bytes(data[4:8], "little") + 2 + 12 * i
        if int.from_bytes(data[at : at + 2], "little") in (256, 257, 278):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, SIDE)


def jpeg(data):
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    data[at + 5 : at + 9] = struct.pack(">HH", SIDE, SIDE)


WORST = {
    "webp": lambda: encoded("WEBP", patch=webp, lossless=True),
    "16-bit png": lambda: png(SIDE, 16, 0),
    "16-bit rgba png": lambda: png(SIDE, 16, 6),
    "rgba png": lambda: png(SIDE, 8, 6),
    "16-bit tiff": lambda: encoded("TIFF", "I;16", patch=tiff),
    "lzw tiff": lambda: encoded("TIFF", "RGBA", patch=tiff, compression="tiff_lzw"),
    "gif": lambda: encoded("GIF", "P", patch=gif),
    "progressive cmyk jpeg": lambda: encoded("JPEG", "CMYK", patch=jpeg, progressive=True, subsampling=0),
    "jpeg": lambda: encoded("JPEG", patch=jpeg),
}


def read_all():
    said = []
    for kind, made in WORST.items():
        try:
            said.append(f"{kind}: {tuple(decode(bytearray(made()), kind).shape)}")
        except BadImage as error:
            said.append(str(error))
    return "\n".join(said)


@pytest.mark.filterwarnings("ignore")
def test_no_image_takes_more_than_decoding_may_and_what_is_refused_is_named():
    taken, said = peak(read_all, lambda: [decode(bytearray(encoded(f)), "x") for f in ("PNG", "JPEG", "TIFF", "GIF")])
    assert taken < memory.most() + 150 * 2**20, f"{taken / 1e9:.2f} GB\n{said}"
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert set(lines) == set(WORST)
    for kind in ("webp", "lzw tiff", "gif", "progressive cmyk jpeg"):
        assert "GB to decode, more than 0.8 GB: make it smaller, or set CROSSLEVEL_DECODE_MB=" in lines[kind], lines[
            kind
        ]
    assert lines["jpeg"] == "damaged: Corrupt JPEG data: premature end of data segment"


KINDS = {
    "JPEG": ("RGB", {}),
    "progressive JPEG": ("RGB", {"progressive": True, "subsampling": 0}),
    "turned JPEG": ("RGB", {"exif": True}),
    "CMYK JPEG": ("CMYK", {"progressive": True}),
    "PNG": ("RGB", {}),
    "RGBA PNG": ("RGBA", {}),
    "palette PNG": ("P", {}),
    "16-bit PNG": ("I;16", {}),
    "16-bit TIFF": ("I;16", {"compression": "tiff_lzw"}),
    "RGBA TIFF": ("RGBA", {"compression": "tiff_deflate"}),
    "one-strip TIFF": ("RGBA", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "GIF": ("P", {}),
    "BMP": ("RGB", {}),
    "WEBP": ("RGB", {"lossless": True, "method": 0}),
    "RGBA WEBP": ("RGBA", {"lossless": True, "method": 0}),
    "JPEG2000": ("RGBA", {}),
    "AVIF": ("RGB", {"speed": 10}),
    "HEIF": ("RGB", {}),
    "JXL": ("RGB", {"lossless": True, "effort": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_takes_more_than_is_reckoned_with(kind, monkeypatch):
    (mode, options), format = KINDS[kind], kind.split()[-1]
    if format in formats._EXTRA and not formats._has_plugin(formats._EXTRA[format][0]):
        pytest.skip(f"needs {formats._EXTRA[format][0]}")
    side = int((40 * 2**20 / (memory._PER_PIXEL.get(format, 9) + 3)) ** 0.5)
    image = Image.new(mode, (side, side), 9 if mode in ("P", "I;16") else None)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif.tobytes()}
    data = bytearray(whole(image, format, **options))
    reckoned = []

    @contextlib.contextmanager
    def room(need):
        reckoned.append(need)
        yield

    monkeypatch.setattr(decoding, "room", room)
    small = bytearray(whole(image.resize((600, 600)), format, **options))
    decode(data, "x")
    taken, _ = peak(lambda: decode(data, "x").shape, lambda: decode(small, "x"))
    assert taken < max(reckoned) + 6 * 2**20, (
        f"{taken / side**2:.1f} bytes a pixel, {max(reckoned) / side**2:.1f} reckoned"
    )


def test_large_images_are_read_at_a_reduced_size(monkeypatch):
    rows = np.linspace(0, 255, 400, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(rows, (300, 1))] * 3, -1))
    for format, options in (("PNG", {}), ("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("TIFF", {})):
        stream = io.BytesIO()
        image.save(stream, format, **options)
        whole = decode(bytearray(stream.getvalue()), "x").float()
        assert whole.shape == (3, 300, 400)
        for limit, scale in ((60_000, 2), (10_000, 4), (3_000, 8)):
            with monkeypatch.context() as patch:
                patch.setattr(memory, "LARGEST", limit)
                smaller = decode(bytearray(stream.getvalue()), "x").float()
            assert smaller.shape == (3, -(-300 // scale), -(-400 // scale))
            want = torch.nn.functional.adaptive_avg_pool2d(whole, smaller.shape[1:])
            assert (smaller - want).abs().mean() < 2


def test_a_tiff_in_strips_takes_no_more_than_one_of_them_beside_its_pixels(monkeypatch):
    """One in a single strip, or with a tile that is larger than the picture, is refused by its name."""
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "22")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40, 3), np.uint8)).resize((1300, 1000), 0)
    strips, single = (whole(image, "TIFF", compression="tiff_lzw", strip_size=size) for size in (2**16, 2**30))
    assert (decode(bytearray(strips), "x").permute(1, 2, 0).numpy() == np.asarray(image)).all()
    with pytest.raises(BadImage, match=r"1,300 x 1,000 pixels of TIFF take about 0\.0 GB"):
        decode(bytearray(single), "x")
    tiled = Image.open(io.BytesIO(strips))
    assert sizes.part_bytes(tiled) <= 2**16
    tiled.tag_v2[322], tiled.tag_v2[323] = 40_000, 40_000
    assert sizes.part_bytes(tiled) == 3 * 40_000**2


def test_the_size_of_a_jpeg_xl_is_known_before_it_is_opened():
    """Bare and in a container, of small and large sides, of one ratio and another; cut, it is damaged."""
    pytest.importorskip("pillow_jxl", reason="needs pillow_jxl: pip install 'crosslevel[jxl]'")
    for size in ((1, 1), (8, 8), (264, 176), (300, 200), (160, 90), (37, 52), (9000, 2), (2, 600), (256, 256)):
        image = Image.new("RGB", size)
        exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0" + bytes(300)
        for data in (whole(image, "JXL"), whole(image, "JXL", exif=exif)):
            assert sizes.size_ahead("JXL", data) == size
    stream, box = whole(image, "JXL"), data[:32]  # signature and ftyp
    assert stream[:2] == b"\xff\x0a"
    for parts in ([stream], [stream[:3], stream[3:]], [b"", stream]):
        split = b"".join(
            (len(part) + 12).to_bytes(4, "big") + b"jxlp" + i.to_bytes(4, "big") + part for i, part in enumerate(parts)
        )
        assert sizes.size_ahead("JXL", box + split) == size
    for cut in (2, 12, 20, 32, 40):
        with pytest.raises(BadImage, match="x: "):
            decode(bytearray(data[:cut]), "x")
    large = bytearray(whole(Image.new("RGB", (16, 16)), "JXL"))
    # small: no; height of 18 bits and more, ratio 1: as wide.
    large[2:8] = (0 | 2 << 1 | (SIDE - 1) << 3 | 1 << 21).to_bytes(6, "little")
    with pytest.raises(BadImage, match=r"13,300 x 13,300 pixels of JXL take about 7\.2 GB to decode"):
        decode(large, "x")


def written(folder):
    """The worst images: those that are refused, and the largest that are not, with pixels in all of them."""
    for kind, made in WORST.items():
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


@pytest.mark.slow
def test_the_worst_images_take_less_than_a_gigabyte_and_a_half_in_all_processes_together(tmp_path):
    """Two processes decode; a third of it is Python and PyTorch, which the test's own process has as well."""
    (tmp_path / "images").mkdir()
    written(tmp_path / "images")
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            images = open_images(tmp_path / "images")
            bad = images.bad_files()
            read = sum(len(batch.index) for batch in EvalBatches(images, 1, 32, bad=bad, workers=2))
            os.write(writing, "\n".join([str(read), *sorted(bad.reasons)]).encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    own, most = in_all(pid), 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        with contextlib.suppress(OSError, StopIteration):
            most = max(most, in_all(pid))
        time.sleep(0.01)
    with open(reading, encoding="utf-8") as pipe:
        count, *refused = pipe.read().splitlines()
    assert count == "5", (count, refused)
    assert refused == sorted(f"{kind}.img" for kind in WORST)
    assert own < most < 1.5e9, f"{own / 1e9:.2f}, {most / 1e9:.2f} GB"


def test_what_is_refused_can_be_allowed(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (900, 700)).save(stream, "PNG")
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "1")
    with pytest.raises(
        BadImage, match=r"900 x 700 pixels of PNG take about 0.0 GB .* set CROSSLEVEL_DECODE_MB=5"
    ) as told:
        decode(bytearray(stream.getvalue()), "x")
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", str(told.value).rpartition("=")[2])
    assert decode(bytearray(stream.getvalue()), "x").shape == (3, 700, 900)


def test_large_images_of_several_processes_wait_for_each_other(monkeypatch, tmp_path):
    """Slots that a killed process held are free again."""
    monkeypatch.setattr(memory, "_PATIENCE", 0.2)

    total, pid = memory.most() // memory._SLOT, os.fork()
    if not pid:
        with memory.room((total - 2) * memory._SLOT):
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


def test_a_process_that_was_stopped_in_the_turnstile_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(memory, "_PATIENCE", 0.2)
    total, pid = memory.most() // memory._SLOT, os.fork()
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
    slots = memory._taken(count)
    for slot in slots:
        fcntl.lockf(memory._file, fcntl.LOCK_UN, 1, slot)
    return slots
