"""Pictures that several tests read: three arrays, encoders and a decoder, and images of which some are bad."""

import io
import struct
import zlib

import numpy as np
import torch

from crosslevel.data.decode import decode
from crosslevel.data.images import Images
from crosslevel.utils.errors import BadImage

RAMP = (np.indices((37, 52)).sum(0) * 2 + 20).astype(np.uint8)
RGB = np.stack([RAMP, 255 - RAMP, np.roll(RAMP, 9, 1)], -1)
DEEP = (np.arange(37 * 52, dtype=np.uint32).reshape(37, 52) * 34 % 65536).astype(np.uint16)
BAD = {4: b"", 9: b"no picture"}


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(data, **options):
    image = decode(bytearray(data), "x", **options)
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy()


def png(array, color, size=None):
    """A 16-bit PNG of (H, W, C) written by hand, as Pillow writes none in color; ``size`` is (W, H)."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    width, height = size or (array.shape[1], array.shape[0])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class Numbered(Images):
    """Image i is 3 x 4 x 5 pixels of value i; some cannot be read; counts what is decoded."""

    def __init__(self, count, bad=(), labels=True):
        self.name, self.paths, self.bad, self.decoded = "numbered", [f"n/{i}" for i in range(count)], set(bad), []
        self.labels = torch.arange(count) * 10 if labels else None

    def __getitem__(self, i):
        self.decoded.append(i)
        if i in self.bad:
            raise BadImage(self.paths[i], "broken on purpose")
        return torch.full((3, 4, 5), i % 256, dtype=torch.uint8), -1 if self.labels is None else int(self.labels[i])


def is_bad(photos, i):
    return int(photos.paths[i][2:4]) in BAD
