"""The times and keyframes of a video's frames, found once by reading its packets."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT
from crosslevel.data.index_cache import remembered
from crosslevel.data.sources.video.container import BadVideo, errors, opened, reason, stream_of

Packet = Any  # av.Packet

_TABLE = 1  # increased when the format of the cached data changes
_FIRST = 32  # frames that are decoded to check a file's times


class Timeline(NamedTuple):
    """The presentation times of a video's N frames, in ticks of ``tick`` seconds, ascending, and its G keyframes.

    ``seeks`` are the keyframes' decoding times, ``sizes`` their bytes. Frames after ``last`` are listed in the file's
    header, but the file ends before them. ``open``: frames after a keyframe may refer to frames before it, as in H.264
    without IDR pictures.
    """

    pts: Int64[Tensor, " N"]
    keys: Int64[Tensor, " G"]
    seeks: Int64[Tensor, " G"]
    sizes: Int64[Tensor, " G"]
    tick: float
    last: int
    open: bool
    length: float  # duration in the header, in seconds; 0 if it has none

    @property
    def seconds(self) -> Float64[Tensor, " N"]:
        """Seconds since the first frame."""
        return (self.pts - self.pts[0]).double() * self.tick

    @property
    def groups(self) -> Int64[Tensor, " N"]:
        """The last keyframe up to each frame, from which it can be decoded."""
        return torch.searchsorted(self.keys, self.pts, right=True) - 1

    @property
    def ends_early(self) -> str:
        """The warning for a truncated file; empty for others."""
        actual = (self.last - int(self.pts[0])) * self.tick
        promised = max(self.length, float(self.seconds[-1]))
        # Sound often goes on a little longer than the picture.
        if self.last == int(self.pts[-1]) and actual > 0.95 * promised - 1:
            return ""
        return f"it ends after {actual:.1f} s of {promised:.1f} s: truncated, or its picture is shorter than its sound"


def timeline(file: str) -> Timeline:
    """The times of the frames of ``file``, found without decoding, and cached.

    Raises:
        BadVideo: it cannot be opened, there is no picture in it, or its frames have no times.

    """
    try:
        status = os.stat(file)
    except OSError as error:
        raise BadVideo(f"cannot be opened: {error.strerror or error}") from error
    state = f"{_TABLE} {status.st_size} {status.st_mtime_ns}"
    table = remembered("video", os.path.abspath(file), state, lambda: _demuxed(file))
    (tick, length), (last, is_open) = table["clock"].tolist(), table["told"].tolist()
    return Timeline(table["pts"], table["keys"], table["seeks"], table["sizes"], tick, last, bool(is_open), length)


def _demuxed(file: str) -> dict[str, Tensor]:
    container = opened(file)
    with container:
        stream = stream_of(container)
        if stream.codec_context.width * stream.codec_context.height > PIXEL_LIMIT:
            raise BadVideo(f"its pictures have more than {PIXEL_LIMIT:,} pixels")
        count, is_open = 0, False
        displayed: list[int] = []
        keys: list[tuple[int, int, int]] = []
        with contextlib.suppress(*errors()):  # the frames before a defect are used
            for packet in container.demux(stream):
                count += packet.size > 0
                if packet.size and packet.pts is not None and not packet.is_discard:
                    displayed.append(packet.pts)
                    if packet.is_keyframe:
                        is_open = is_open or (stream.codec_context.name == "h264" and not _has_idr(packet, stream))
                        keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.size))
        pts, starts = torch.tensor(displayed, dtype=torch.int64).unique(), torch.tensor(keys, dtype=torch.int64)
        if not len(starts):
            raise BadVideo("there is no picture in it whose time is known")
        starts = starts[starts[:, 0].argsort()]
        pts, last = pts[pts >= starts[0, 0]], int(pts[-1])
        missing = max(0, stream.frames - count)
        if missing and len(pts) > 1:
            step = int(pts.diff().median())
            pts = torch.cat([pts, last + step * torch.arange(1, missing + 1)])
        length = (container.duration or 0) / 1e6
        clock = torch.tensor([float(stream.time_base), length], dtype=torch.float64)
    _check_order(file)
    keyed = dict(zip(("keys", "seeks", "sizes"), starts.T.contiguous(), strict=True))
    return {"pts": pts, **keyed, "told": torch.tensor([last, int(is_open)]), "clock": clock}


def _has_idr(packet: Packet, stream: Any) -> bool:
    """Whether a keyframe of H.264 ends all references to earlier frames (ITU H.264, 7.4.1.2.4: NAL unit type 5)."""
    data, header = bytes(packet), bytes(stream.codec_context.extradata or b"")
    if header[:1] != b"\x01":  # start codes between the units (annex B)
        return any(data[match.end()] & 31 == 5 for match in re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL))
    width, at = (header[4] & 3) + 1, 0  # lengths before the units (ISO 14496-15)
    while at + width < len(data):
        if data[at + width] & 31 == 5:
            return True
        at += width + int.from_bytes(data[at : at + width])
    return False


def _check_order(file: str) -> None:
    """Decode the first frames.

    Raises:
        BadVideo: no frame can be decoded, or frames come without times or out of order, as with H.264 in AVI.

    """
    times: list[int | None] = []
    failed: Exception | None = None
    with opened(file) as container:
        try:
            for frame in itertools.islice(container.decode(stream_of(container)), _FIRST):
                times.append(frame.pts)
        except errors() as error:
            failed = error
    if not times and failed is not None:
        raise BadVideo(reason(failed)) from failed
    if any(b is None or a is None or b <= a for a, b in itertools.pairwise(times)):
        raise BadVideo("its frames have no times in order: convert it, such as by ffmpeg -i FILE FILE.mp4")
