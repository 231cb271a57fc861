"""Decoding of one video: where its frames are, and any of them, the same in whatever order they are asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT
from crosslevel.data.index_cache import remembered

KEPT_BYTES = 128 * 2**20
"""What decoded frames may take in a process: 41 of 1920 x 1080."""

Frame = Any  # av.VideoFrame
Packet = Any  # av.Packet

_TABLE = 1  # raised when what is remembered of a film changes
_LOOKED_AT = 32  # frames that are decoded to see whether a file's times can be relied on


class BadVideo(Exception):
    """What is wrong with a video, or with one frame of it, in a few words."""


class Timeline(NamedTuple):
    """When the N frames of a video are shown, in ticks of ``tick`` seconds, ascending, and its G keyframes.

    ``seeks`` are the keyframes' times of decoding, ``sizes`` their bytes. Frames after ``last`` are promised by the
    file's header, but the file ends before them. ``open`` says that what
    follows a keyframe may refer to what was before it, as in H.264 without IDR pictures.
    """

    pts: Int64[Tensor, " N"]
    keys: Int64[Tensor, " G"]
    seeks: Int64[Tensor, " G"]
    sizes: Int64[Tensor, " G"]
    tick: float
    last: int
    open: bool
    length: float  # seconds that the header tells, 0 where it does not

    @property
    def seconds(self) -> Float64[Tensor, " N"]:
        """Since the first frame."""
        return (self.pts - self.pts[0]).double() * self.tick

    @property
    def groups(self) -> Int64[Tensor, " N"]:
        """The last keyframe up to each frame: the one that it can be decoded from."""
        return torch.searchsorted(self.keys, self.pts, right=True) - 1

    @property
    def ends_early(self) -> str:
        """What a file that was cut off says; empty of others."""
        there = (self.last - int(self.pts[0])) * self.tick
        promised = max(self.length, float(self.seconds[-1]))
        # Sound often goes on a little longer than the picture.
        if self.last == int(self.pts[-1]) and there > 0.95 * promised - 1:
            return ""
        return f"it ends after {there:.1f} s of {promised:.1f} s: truncated, or its picture is shorter than its sound"


def timeline(file: str) -> Timeline:
    """Where the frames of ``file`` are; found out once, without decoding it.

    Raises:
        BadVideo: it cannot be opened, there is no picture in it, or its frames have no times.

    """
    try:
        found = os.stat(file)
    except OSError as error:
        raise BadVideo(f"cannot be opened: {error.strerror or error}") from error
    state = f"{_TABLE} {found.st_size} {found.st_mtime_ns}"
    table = remembered("video", os.path.abspath(file), state, lambda: _demuxed(file))
    (tick, length), (last, is_open) = table["clock"].tolist(), table["told"].tolist()
    return Timeline(table["pts"], table["keys"], table["seeks"], table["sizes"], tick, last, bool(is_open), length)


class Decoder:
    """One open video.

    A frame is decoded from the last keyframe before it. If a picture fails on the way, it and all after it up to the
    next keyframe are bad: a decoder would fill them with what it guesses.
    """

    def __init__(self, file: str) -> None:
        self.line, self._file = timeline(file), file
        self._converter = import_module("av.video.reformatter").VideoReformatter()
        self._keys = dict(zip(self.line.keys.tolist(), self.line.sizes.tolist(), strict=True))
        self._kept: OrderedDict[int, dict[int, Frame]] = OrderedDict()
        self._kept_bytes = 0
        self._defects: dict[int, tuple[int, str]] = {}  # of groups: the last frame before it, and what it is
        self._at: Frame = None  # the last one that was decoded
        self._group = -1
        self._frames: Iterator[Frame] = iter(())
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._frames = iter(())
        self._kept.clear()
        self._container.close()

    def frame(self, pts: int, group: int, block: Sequence[int]) -> UInt8[Tensor, "3 H W"]:
        """The frame at ``pts``, upright; those of ``block`` (its group's frames that may be asked for) are kept.

        Raises:
            BadVideo: it cannot be decoded.

        """
        if pts > self.line.last:
            raise BadVideo("truncated: the file ends before this frame")
        kept = self._kept.get(group, {}).get(pts)
        if kept is not None:
            return self._picture(kept)
        good, defect = self._defects.get(group, (pts, ""))
        if pts > good:
            raise BadVideo(defect)
        # Open groups are begun anew, so that what the decoder makes of them does not depend on the order.
        near = (0,) if self.line.open else (0, 1)
        goes_on = self._at is not None and self._at.pts <= pts and group - self._group in near
        # Asked for again, a group is decoded to its end: the rest will be asked for as well.
        whole = not goes_on and group in self._kept
        if goes_on:
            with contextlib.suppress(BadVideo):  # the defect may lie before this group
                return self._picture(self._forward(pts, group, set(block)))
        self._begin(group)
        found = self._forward(pts, group, set(block))
        if whole:
            with contextlib.suppress(BadVideo):  # named when it is asked for
                self._forward(block[-1], group, set(block))
        return self._picture(found)

    def _forward(self, pts: int, group: int, block: set[int]) -> Frame:
        """Decode from where we are up to the frame at ``pts``."""
        self._group = group
        fresh = self._at is None
        try:
            while self._at is None or self._at.pts < pts:
                self._at = next(self._frames)
                if self._at.pts in block:
                    self._keep(group, self._at.pts, self._at)
        except (StopIteration, BadVideo) as error:
            reason = str(error) or "truncated: the film ends before this frame"
            if fresh:
                self._defects[group] = (-(2**63) if self._at is None else self._at.pts, reason)
            self._at, self._frames = None, iter(())
            raise BadVideo(reason) from error
        if self._at.pts > pts:
            self._check_gap(pts, self._at.pts)
            self._keep(group, pts, self._at)
        return self._at

    def _picture(self, frame: Frame) -> Tensor:
        """RGB (3, H, W), turned as the film says."""
        if frame.width * frame.height > PIXEL_LIMIT:
            raise BadVideo(f"{frame.width} x {frame.height} are more than {PIXEL_LIMIT:,} pixels")
        # frame.to_ndarray would make a converter of some megabytes for each frame, and keep it with the frame.
        # One thread: a forked process that drops a converter of its parent would wait for threads that it has not.
        image = torch.from_numpy(self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        turns = round(frame.rotation / 90) % 4
        return (torch.rot90(image, turns) if turns else image).permute(2, 0, 1).contiguous()

    def _check_gap(self, wanted: int, found: int) -> None:
        """Some formats list pictures that are never shown: the frame beside stands for them, but not the next one."""
        gaps = self.line.pts.diff()
        if found - wanted >= (int(gaps.median()) if len(gaps) else 0):
            raise BadVideo(
                f"there is no frame here: the next one comes {(found - wanted) * self.line.tick:.2f} s later"
            )

    def _keep(self, group: int, pts: int, frame: Frame) -> None:
        mine = self._kept.setdefault(group, {})
        self._kept.move_to_end(group)
        size = _bytes(frame)
        while self._kept_bytes + size > KEPT_BYTES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= sum(map(_bytes, oldest.values()))
        if self._kept_bytes + size <= KEPT_BYTES and pts not in mine:
            mine[pts] = frame
            self._kept_bytes += size

    def _open(self) -> None:
        self._container = _opened(self._file)
        self._stream = _stream(self._container)
        context = self._stream.codec_context
        # Threads would delay errors, and there are as many processes as cores.
        context.thread_count = 1
        # What is broken shall fail, and not be filled with a guess; but where groups are open, the decoder takes
        # references to the group before, which was not read, for defects.
        if not self.line.open:
            context.options = {"err_detect": "explode"}

    def _begin(self, group: int) -> None:
        """Go to a keyframe, or somewhere before it."""
        key, self._at = int(self.line.keys[group]), None
        before = self.line.seeks[max(0, group - 1)], self.line.seeks[max(0, group - 8)]
        # Formats differ in whether they look for the time of showing or of decoding.
        for place in (key, *map(int, (self.line.seeks[group], *before))):
            with contextlib.suppress(*_errors()):
                self._container.seek(place, stream=self._stream, backward=True)
                packets = self._container.demux(self._stream)
                # Right after a jump, some formats give the first packets wrong times: the size tells them.
                head = next((p for p in packets if p.is_keyframe and self._keys.get(p.pts) == p.size), None)
                if head is not None and head.pts <= key:
                    self._frames = self._decoded(itertools.chain([head], packets), key)
                    return
        self._container.close()
        self._open()
        self._frames = self._decoded(self._container.demux(self._stream), key)

    def _decoded(self, packets: Iterator[Packet], first: int) -> Iterator[Frame]:
        """The frames from ``first`` on, in the order of their times.

        Those before it may refer to what was never read: what they are, or whether they fail, says nothing.
        """
        while True:
            try:
                packet = next(packets, None)
            except _errors() as error:
                raise BadVideo(_reason(error)) from error
            if packet is None:
                return
            try:
                frames = packet.decode()
            except _errors() as error:
                if packet.pts is not None and packet.pts < first:
                    continue
                yield from self._drained(first, packet.pts)
                raise BadVideo(_reason(error)) from error
            for frame in frames:
                if frame.pts is not None and frame.pts >= first:
                    if frame.is_corrupt:
                        raise BadVideo("cannot be decoded: the picture is damaged")
                    yield frame

    def _drained(self, first: int, failed: int | None) -> list[Frame]:
        """What had been decoded, but not yet shown, before the picture at ``failed``."""
        try:
            frames = self._stream.codec_context.decode(None)
        except _errors():
            return []
        shown = [f for f in frames if f.pts is not None and f.pts >= first and not f.is_corrupt]
        return [f for f in shown if failed is not None and f.pts < failed]


def _demuxed(file: str) -> dict[str, Tensor]:
    container = _opened(file)
    with container:
        stream = _stream(container)
        if stream.codec_context.width * stream.codec_context.height > PIXEL_LIMIT:
            raise BadVideo(f"its pictures have more than {PIXEL_LIMIT:,} pixels")
        count, is_open = 0, False
        shown: list[int] = []
        keys: list[tuple[int, int, int]] = []
        with contextlib.suppress(*_errors()):  # what comes before a defect is used
            for packet in container.demux(stream):
                count += packet.size > 0
                if packet.size and packet.pts is not None and not packet.is_discard:
                    shown.append(packet.pts)
                    if packet.is_keyframe:
                        is_open = is_open or (stream.codec_context.name == "h264" and not _has_idr(packet, stream))
                        keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.size))
        pts, starts = torch.tensor(shown, dtype=torch.int64).unique(), torch.tensor(keys, dtype=torch.int64)
        if not len(starts):
            raise BadVideo("there is no picture in it whose time is known")
        starts = starts[starts[:, 0].argsort()]
        pts, last = pts[pts >= starts[0, 0]], int(pts[-1])
        missing = max(0, stream.frames - count)
        if missing and len(pts) > 1:
            step = int(pts.diff().median())
            pts = torch.cat([pts, last + step * torch.arange(1, missing + 1)])
        told = (container.duration or 0) / 1e6
        clock = torch.tensor([float(stream.time_base), told], dtype=torch.float64)
    _check_order(file)
    keyed = dict(zip(("keys", "seeks", "sizes"), starts.T.contiguous(), strict=True))
    return {"pts": pts, **keyed, "told": torch.tensor([last, int(is_open)]), "clock": clock}


def _has_idr(packet: Packet, stream: Any) -> bool:
    """Whether a keyframe of H.264 ends all references to what was before it (ITU H.264, 7.4.1.2.4: NAL unit type 5)."""
    data, header = bytes(packet), bytes(stream.codec_context.extradata or b"")
    if header[:1] != b"\x01":  # start codes between the units (annex B)
        return any(data[found.end()] & 31 == 5 for found in re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL))
    width, place = (header[4] & 3) + 1, 0  # lengths before the units (ISO 14496-15)
    while place + width < len(data):
        if data[place + width] & 31 == 5:
            return True
        place += width + int.from_bytes(data[place : place + width])
    return False


def _check_order(file: str) -> None:
    """Decode the first frames.

    Raises:
        BadVideo: none can be decoded, or they come without times or not in their order, as of H.264 in AVI.

    """
    times: list[int | None] = []
    failed: Exception | None = None
    with _opened(file) as container:
        try:
            for frame in itertools.islice(container.decode(_stream(container)), _LOOKED_AT):
                times.append(frame.pts)
        except _errors() as error:
            failed = error
    if not times and failed is not None:
        raise BadVideo(_reason(failed)) from failed
    if any(b is None or a is None or b <= a for a, b in itertools.pairwise(times)):
        raise BadVideo("its frames have no times in order: convert it, such as by ffmpeg -i FILE FILE.mp4")


def _opened(file: str) -> Any:
    """The container."""
    try:
        # With its protocol: a file name may begin like one, such as http:.
        return _av().open(f"file:{os.path.abspath(file)}", metadata_errors="ignore")
    except _errors() as error:
        raise BadVideo(_reason(error)) from error


def _stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise BadVideo("there is no picture in it")
    return stream


def _errors() -> tuple[type[Exception], ...]:
    """What PyAV raises for files that are broken."""
    return (_av().FFmpegError, OSError, ValueError)


def _av() -> Any:
    """PyAV: only videos need it."""
    try:
        return import_module("av")
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'crosslevel[video]'") from error


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be decoded: {strerror}".split("\n", maxsplit=1)[0]


def _bytes(frame: Frame) -> int:
    return sum(plane.buffer_size for plane in frame.planes)
