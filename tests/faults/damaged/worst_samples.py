"""The worst images: a few bytes that ask for gigabytes; and what a child takes to do something."""

import ctypes
import io
import os
import struct
import traceback
import zlib
from pathlib import Path

from PIL import Image

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


def codes(side=1024):
    """A lossless WebP with 65,536 groups of codes, one for each 4 x 4 pixels: of a megapixel, some 380 MB of tables."""
    groups = (side // 4) ** 2
    simple = (1, 4)  # one symbol, which takes no bits
    bytes_alike = [(0, 1), (8, 4), (1 << 6 | 1 << 33, 36), (0, 1)]  # 256 symbols of 8 bits each
    names = int.from_bytes(b"".join(i.to_bytes(2, "little") for i in range(groups)), "little")
    header = [(0x2F, 8), (side - 1, 14), (side - 1, 14), (0, 4), (0, 2), (1, 1), (0, 3), (0, 1)]
    map_of_groups = [*bytes_alike, (2**256 - 1, 280), *bytes_alike, (2**256 - 1, 256), simple, simple, simple]
    every_group = (int("1" * 5 * groups, 16), 20 * groups)
    stream = at = 0
    for value, bits in [*header, *map_of_groups, (names, 16 * groups), every_group]:
        stream, at = stream | value << at, at + bits
    body = stream.to_bytes(2 * (at // 16 + 4), "little")
    part = b"VP8L" + len(body).to_bytes(4, "little") + body
    return b"RIFF" + (4 + len(part)).to_bytes(4, "little") + b"WEBP" + part


def blocks(side=1500):
    """A JPEG 2000 in blocks of 4 x 4 pixels: 135 bytes a pixel."""
    stream = io.BytesIO()
    Image.new("RGBA", (side, side)).save(stream, "JPEG2000", codeblock_size=(4, 4))
    return stream.getvalue()


BEYOND = {"codes of a webp": codes, "blocks of a jp2": blocks}
"""Images that take many times what their pixels do; both would be read where there is no limit."""
