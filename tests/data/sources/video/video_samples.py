"""Films whose frames tell their numbers."""

from fractions import Fraction

import numpy as np
import pytest

from crosslevel.utils.errors import BadImage

av = pytest.importorskip("av", reason="needs PyAV: pip install 'crosslevel[video]'")


FRAMES = 40
KINDS = {
    "b.mp4": ("libx264", {"g": "12", "bf": "2"}),
    "open.mkv": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "b.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "hidden.webm": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "stream.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "stream.m2ts": ("libx264", {"g": "12", "bf": "2"}),
    "single.mov": ("mjpeg", {}),
}


def stripes(number):
    """Stripe b is white if bit b of ``number`` is set."""
    picture = np.zeros((48, 64, 3), np.uint8)
    for bit in range(8):
        if number >> bit & 1:
            picture[:, 8 * bit : 8 * bit + 8] = 255
    return picture


def number(picture):
    return sum(int(picture[1, 24, 8 * bit + 4] > 127) << bit for bit in range(8))


def write(file, frames=FRAMES, codec="mpeg4", options=None, times=None, **container):
    """A video of 25 frames a second, or of frames at ``times`` in milliseconds."""
    clock = Fraction(1, 1000)
    with av.open(str(file), "w", options=container) as target:
        stream = target.add_stream(codec, rate=25, options=options or {"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.time_base = stream.codec_context.time_base = clock
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(stripes(i), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], clock
            for packet in stream.encode(frame):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return str(file)


def packets(file):
    with av.open(file) as source:
        return [(p.pos, p.size, p.is_keyframe) for p in source.demux(source.streams.video[0]) if p.size]


def seen(source, i):
    """The number that image i shows, or why there is none."""
    try:
        return number(source[i][0])
    except BadImage as error:
        return error.path, error.reason


def reopened(source):
    """The same source as a new process has it."""
    copy = object.__new__(type(source))
    copy.__setstate__(source.__getstate__())
    return copy
