"""Decoding of one video: frames can be requested in any order, with the same result."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from crosslevel.data.decode import PIXEL_LIMIT
from crosslevel.data.sources.video.container import BadVideo, errors, opened, reason, stream_of
from crosslevel.data.sources.video.timeline import Packet, Timeline, timeline

KEPT_BYTES = 128 * 2**20
"""Bytes of decoded frames that a process caches: 41 frames of 1920 x 1080."""

Frame = Any  # av.VideoFrame


class _Reader:
    """An open video, read from one of its keyframes on."""

    def __init__(self, file: str, line: Timeline) -> None:
        self.line, self._file = line, file
        self._keys = dict(zip(line.keys.tolist(), line.sizes.tolist(), strict=True))
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, group: int) -> Iterator[Frame]:
        """The frames from keyframe ``group`` on, in the order of their times."""
        key = int(self.line.keys[group])
        before = self.line.seeks[max(0, group - 1)], self.line.seeks[max(0, group - 8)]
        # Some formats seek by presentation time, others by decoding time.
        for time in (key, *map(int, (self.line.seeks[group], *before))):
            with contextlib.suppress(*errors()):
                self._container.seek(time, stream=self._stream, backward=True)
                packets = self._container.demux(self._stream)
                # Right after a seek, some formats give the first packets wrong times; the packet's size identifies the
                # keyframe.
                head = next((p for p in packets if p.is_keyframe and self._keys.get(p.pts) == p.size), None)
                if head is not None and head.pts <= key:
                    return self._decoded(itertools.chain([head], packets), key)
        self._container.close()
        self._open()
        return self._decoded(self._container.demux(self._stream), key)

    def _open(self) -> None:
        self._container = opened(self._file)
        self._stream = stream_of(self._container)
        context = self._stream.codec_context
        # Threads would delay errors, and there are as many processes as cores.
        context.thread_count = 1
        # Broken frames must fail, and not be filled with a guess. But in open groups, references to the group before,
        # which was not read, would also count as errors.
        if not self.line.open:
            context.options = {"err_detect": "explode"}

    def _decoded(self, packets: Iterator[Packet], first: int) -> Iterator[Frame]:
        """The frames from ``first`` on, in the order of their times.

        Frames before it may refer to frames that were not read, so they are not used, and their errors are ignored.
        """
        while True:
            try:
                packet = next(packets, None)
            except errors() as error:
                raise BadVideo(reason(error)) from error
            if packet is None:
                return
            try:
                frames = packet.decode()
            except errors() as error:
                if packet.pts is not None and packet.pts < first:
                    continue
                yield from self._drained(first, packet.pts)
                raise BadVideo(reason(error)) from error
            for frame in frames:
                if frame.pts is not None and frame.pts >= first:
                    if frame.is_corrupt:
                        raise BadVideo("cannot be decoded: the picture is damaged")
                    yield frame

    def _drained(self, first: int, failed: int | None) -> list[Frame]:
        """The frames before the one at ``failed`` that were decoded, but not yet output."""
        try:
            frames = self._stream.codec_context.decode(None)
        except errors():
            return []
        good = [f for f in frames if f.pts is not None and f.pts >= first and not f.is_corrupt]
        return [f for f in good if failed is not None and f.pts < failed]


class _Memory:
    """Decoded frames by group (the keyframe before them), up to ``most`` bytes: groups used last stay longest."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._groups: OrderedDict[int, dict[int, Frame]] = OrderedDict()
        self._bytes = 0

    def __contains__(self, group: int) -> bool:
        return group in self._groups

    def get(self, group: int, pts: int) -> Frame | None:
        """The frame at ``pts``, if it is still there."""
        return self._groups.get(group, {}).get(pts)

    def add(self, group: int, pts: int, frame: Frame) -> None:
        """Cache a frame, if there is room for it beside those of its group."""
        frames = self._groups.setdefault(group, {})
        self._groups.move_to_end(group)
        size = _bytes(frame)
        while self._bytes + size > self.most and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._bytes -= sum(map(_bytes, oldest.values()))
        if self._bytes + size <= self.most and pts not in frames:
            frames[pts] = frame
            self._bytes += size

    def clear(self) -> None:
        """Drop all frames."""
        self._groups.clear()
        self._bytes = 0


class Decoder:
    """One open video.

    A frame is decoded from the last keyframe before it. If a frame on the way cannot be decoded, it and all frames up
    to the next keyframe are bad, since the decoder would only guess their content. At most ``cache_bytes`` of decoded
    frames are cached.
    """

    def __init__(self, file: str, cache_bytes: int = KEPT_BYTES) -> None:
        self.line = timeline(file)
        self._reader, self._cache = _Reader(file, self.line), _Memory(cache_bytes)
        self._converter = import_module("av.video.reformatter").VideoReformatter()
        self._defects: dict[int, tuple[int, str]] = {}  # of groups: last frame before it, reason
        self._at: Frame = None  # the last one that was decoded
        self._group = -1
        self._frames: Iterator[Frame] = iter(())

    def close(self) -> None:
        """Close the file."""
        self._frames = iter(())
        self._cache.clear()
        self._reader.close()

    def frame(self, pts: int, group: int, block: Sequence[int]) -> UInt8[Tensor, "3 H W"]:
        """The frame at ``pts``, upright; decoded frames of ``block`` (those that may be requested) are cached.

        Raises:
            BadVideo: it cannot be decoded.

        """
        if pts > self.line.last:
            raise BadVideo("truncated: the file ends before this frame")
        cached = self._cache.get(group, pts)
        if cached is not None:
            return self._picture(cached)
        good, defect = self._defects.get(group, (pts, ""))
        if pts > good:
            raise BadVideo(defect)
        # Open groups are decoded from their start, so that the result does not depend on the order of requests.
        near = (0,) if self.line.open else (0, 1)
        goes_on = self._at is not None and self._at.pts <= pts and group - self._group in near
        # If a group is requested again, it is decoded to its end: the rest will probably be requested too.
        decode_all = not goes_on and group in self._cache
        if goes_on:
            with contextlib.suppress(BadVideo):  # the defect may lie before this group
                return self._picture(self._forward(pts, group, set(block)))
        self._begin(group)
        frame = self._forward(pts, group, set(block))
        if decode_all:
            with contextlib.suppress(BadVideo):  # reported when it is requested
                self._forward(block[-1], group, set(block))
        return self._picture(frame)

    def _forward(self, pts: int, group: int, block: set[int]) -> Frame:
        """Decode from the current position up to the frame at ``pts``."""
        self._group = group
        at_start = self._at is None
        try:
            while self._at is None or self._at.pts < pts:
                self._at = next(self._frames)
                if self._at.pts in block:
                    self._cache.add(group, self._at.pts, self._at)
        except (StopIteration, BadVideo) as error:
            reason = str(error) or "truncated: the video ends before this frame"
            if at_start:
                self._defects[group] = (-(2**63) if self._at is None else self._at.pts, reason)
            self._at, self._frames = None, iter(())
            raise BadVideo(reason) from error
        if self._at.pts > pts:
            self._check_gap(pts, self._at.pts)
            self._cache.add(group, pts, self._at)
        return self._at

    def _begin(self, group: int) -> None:
        self._at, self._frames = None, self._reader.frames(group)

    def _picture(self, frame: Frame) -> Tensor:
        """RGB (3, H, W), rotated by the video's metadata."""
        if frame.width * frame.height > PIXEL_LIMIT:
            raise BadVideo(f"{frame.width} x {frame.height} are more than {PIXEL_LIMIT:,} pixels")
        # frame.to_ndarray would make a converter of some megabytes for each frame, and keep it with the frame.
        # One thread: a forked process that frees its parent's converter would wait for threads that it does not have.
        image = torch.from_numpy(self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        turns = round(frame.rotation / 90) % 4
        return (torch.rot90(image, turns) if turns else image).permute(2, 0, 1).contiguous()

    def _check_gap(self, requested: int, following: int) -> None:
        """Refuse a large gap. Some formats list pictures that are never shown: the frame after one replaces it."""
        gaps = self.line.pts.diff()
        if following - requested >= (int(gaps.median()) if len(gaps) else 0):
            raise BadVideo(
                f"there is no frame here: the next one comes {(following - requested) * self.line.tick:.2f} s later"
            )


def _bytes(frame: Frame) -> int:
    return sum(plane.buffer_size for plane in frame.planes)
