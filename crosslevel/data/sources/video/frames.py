"""Video files as images: the selected frames; each video is a track."""

from __future__ import annotations

import glob
import itertools
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crosslevel.data.decoding.formats import EXTENSIONS
from crosslevel.data.images import Images
from crosslevel.data.index_cache import Paths
from crosslevel.data.sources.labels import below, labels_of
from crosslevel.data.sources.video.container import BadVideo
from crosslevel.data.sources.video.decoder import KEPT_BYTES, Decoder
from crosslevel.data.sources.video.timeline import Timeline, timeline
from crosslevel.data.uri import VIDEOS, Source, is_video
from crosslevel.data.watch import Watch
from crosslevel.utils.errors import BadImage, SourceError, UserError, did_you_mean

_FIRST = 20_000  # entries of a folder of images that are searched for videos, only to mention them


@dataclass(frozen=True)
class Pace:
    """Which frames of a video are used: the nearest to every 1 / ``fps`` s, or every ``stride``-th; else one a second.

    Raises:
        ValueError: both are given, or one is not above 0.

    """

    fps: float | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.stride is not None:
            raise UserError(f"fps={self.fps:g} and stride={self.stride}: give one of them")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"fps={self.fps:g}: give how many frames a second, above 0")
        if self.stride is not None and self.stride < 1:
            raise UserError(f"stride={self.stride}: 1 takes every frame, 10 every tenth")

    def select(self, seconds: Tensor) -> Int64[Tensor, " M"]:
        """The indices of the used frames; ``seconds`` (N,) are the times of all frames, ascending from 0."""
        if self.stride is not None or len(seconds) < 2:
            return torch.arange(0, len(seconds), self.stride or 1)
        fps = self.fps or 1.0
        # A container's clock may round times down, so the last frame counts although it comes a little early.
        times = torch.arange(int(float(seconds[-1]) * fps + 0.05) + 1, dtype=torch.float64) / fps
        nearest: Tensor = torch.searchsorted((seconds[1:] + seconds[:-1]) / 2, times).unique()
        return nearest


class Videos(Images):
    """The frames of video files, decoded on demand.

    ``paths[i]`` is ``video.mp4#t=12.040``, with the seconds since the video's first frame. ``tracks`` numbers the
    videos. Folders below the one that all videos share give ``labels``.

    ``blocks`` are the frames from one keyframe to the next; to decode one, all frames of its block before it must be
    decoded. A process keeps one video open, continues from the last decoded frame, and caches the used frames that it
    passes (at most ``kept_bytes``, 128 MB unless set). Reading in order is fastest; reading block by block is nearly as
    fast.

    ``files`` are relative to ``root``. Files that are no videos are left out with a warning; ``left_out`` names them,
    and those that end early.

    Raises:
        SourceError: fewer than 2 frames.
        ImportError: PyAV is missing.

    """

    decodes = False
    kept_bytes = KEPT_BYTES

    def __init__(self, root: str, files: Sequence[str], pace: Pace | None = None, *, name: str) -> None:
        self.root, self.pace, self.name = root, Pace() if pace is None else pace, name
        videos = self._timelines(files)
        self.watch = Watch.of_files([os.path.join(root, file) for file in files])
        self.files = [file for file, _ in videos]
        selected = [self.pace.select(line.seconds) for _, line in videos]
        counts = torch.tensor([len(frames) for frames in selected])
        self.pts = torch.cat([line.pts[frames] for (_, line), frames in zip(videos, selected, strict=True)])
        self.tracks = track = torch.arange(len(videos)).repeat_interleave(counts)
        groups = [line.groups[frames] for (_, line), frames in zip(videos, selected, strict=True)]
        self.groups = torch.cat(groups)
        self._track, self._ends = track, _ends(track, self.groups)
        # If every block is a single frame, any order is equally fast.
        many = len(self._ends) < len(self.pts)
        self.blocks = [range(*pair) for pair in itertools.pairwise([0, *self._ends.tolist()])] if many else None
        self.paths = Paths.of(_names((f, line.seconds[p]) for (f, line), p in zip(videos, selected, strict=True)))
        labels, self.classes = labels_of(below(self.files))
        self.labels = None if labels is None else labels[track]
        if len(self.pts) < 2:
            raise SourceError(f"{name}: needs at least 2 frames, there is only one: raise fps or lower stride")
        self._state = _State()

    def __getitem__(self, i: int) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """Frame i, upright, and its label (-1 without labels).

        Raises:
            BadImage: the video cannot be decoded there.

        """
        i = range(len(self))[i]
        if self._state.process != os.getpid():
            self._state = _State()  # a forked process must not move its parent's position in the file
        with self._state.lock:
            image = self._frame(i, self._state)
        labels = self.labels
        return image, -1 if labels is None else int(labels[i])

    def _frame(self, i: int, state: _State) -> Tensor:
        block = int(torch.searchsorted(self._ends, i, right=True))
        track, (first, end) = int(self._track[i]), (int(self._ends[block - 1]) if block else 0, int(self._ends[block]))
        try:
            if state.decoder is None or state.track != track:
                state.close()
                file = os.path.join(self.root, self.files[track])
                state.decoder, state.track = Decoder(file, self.kept_bytes), track
            return state.decoder.frame(int(self.pts[i]), int(self.groups[i]), self.pts[first:end].tolist())
        except BadVideo as error:
            raise BadImage(self.paths[i], str(error)) from error

    def __getstate__(self) -> dict[str, object]:
        """Leave out the open video: a worker process opens its own."""
        return {**self.__dict__, "_state": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._state = _State()

    def _timelines(self, files: Sequence[str]) -> list[tuple[str, Timeline]]:
        """The videos that can be read, in the order given."""
        timelines: list[tuple[str, Timeline]] = []
        bad: list[str] = []
        self.left_out = left_out = dict[str, str]()
        for file in files:
            path = os.path.join(self.root, file)
            try:
                line = timeline(path)
            except BadVideo as error:
                bad.append(f"{path}: {error}")
                left_out[file] = str(error)
                continue
            if line.ends_early:
                warnings.warn(f"{path}: {line.ends_early}", stacklevel=4)
                left_out[file] = line.ends_early
            timelines.append((file, line))
        if not timelines:
            more = f" ({len(bad) - 1} more cannot be read either)" if len(bad) > 1 else ""
            raise SourceError(f"{bad[0]}{more}" if bad else f"{self.name}: no video")
        for line_of in bad:
            warnings.warn(f"{line_of}; it is left out", stacklevel=4)
        return timelines

    def content(self) -> Iterable[bytes | memoryview]:
        """The frames' times, and names, sizes and times of change of the videos."""
        yield self.pts.numpy().tobytes()
        for file in self.files:
            try:
                status = os.stat(os.path.join(self.root, file))
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            yield f"{file}\0{state}\0".encode(errors="surrogateescape")


class _State:
    """The files that one process has open."""

    def __init__(self) -> None:
        self.process, self.lock = os.getpid(), threading.Lock()
        self.decoder: Decoder | None = None
        self.track = -1

    def close(self) -> None:
        if self.decoder is not None:
            self.decoder.close()
        self.decoder = None


def open_videos(source: Source) -> Videos | None:
    """The frames of the videos that ``source`` names; None if it names something else.

    A video, a folder of videos, a pattern with ``*``, ``?`` or ``[...]``, or a ``.txt`` file that names a video a line;
    each with ``,fps=2`` or ``,stride=10`` if given.

    Raises:
        SourceError: no video in it can be read, or an option is wrong.

    """
    if os.path.isdir(source.path):
        return _in_folder(source)
    if os.path.isfile(source.path):
        return _of_file(source)
    files = sorted(file for file in glob.glob(source.path, recursive=True) if is_video(file))
    if files:
        return Videos("", files, _pace(source), name=source.base_text)
    if is_video(source.path):
        raise SourceError(f"{source.path}: no such video: give a path, or a pattern that matches some")
    return None


def listed_videos(files: Sequence[str]) -> Videos | None:
    """The frames of these files, one a second; None unless all are videos."""
    return Videos("", files, name=f"a list of {len(files):,} videos") if _all_videos(files) else None


def _pace(source: Source) -> Pace:
    kinds = {"fps": float, "stride": int}
    settings: dict[str, float | int] = {}
    for key, value in source.options:
        if key not in kinds:
            hint = did_you_mean(key, kinds, "keys: fps (frames a second) and stride (every n-th frame)")
            raise SourceError(f"{source.base_text}: videos have no setting {key}={value}: {hint}")
        try:
            settings[key] = kinds[key](value or "")
        except ValueError as error:
            kind = {"fps": "number", "stride": "whole number"}[key]
            raise SourceError(f"{source.base_text}: {key}={value}: needs a {kind}") from error
    try:
        return Pace(**settings)  # type: ignore[arg-type]
    except UserError as error:
        raise SourceError(f"{source.base_text}: {error}") from error


def _of_file(source: Source) -> Videos | None:
    file = source.path
    if is_video(file):
        return Videos(os.path.dirname(file), [os.path.basename(file)], _pace(source), name=source.base_text)
    if not file.lower().endswith(".txt"):
        return None
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as text:
            lines = [line.rstrip("\n") for line in itertools.islice(text, 1)]
            if not _all_videos(lines):
                return None
            lines += [line.rstrip("\n") for line in text if line.strip()]
    except OSError:
        return None  # reported when it is read as a list of images
    return Videos(os.path.dirname(file), lines, _pace(source), name=source.base_text)


def _in_folder(source: Source) -> Videos | None:
    """The videos of a folder; none if it holds images and no option requests frames."""
    folder = source.path
    if source.options:
        files = sorted(file for file, kind in _walked(folder) if kind == "video")
        if not files:
            searched = ", ".join(sorted(VIDEOS))
            raise SourceError(f"{folder}: no video found in this folder or below it (looked for {searched})")
        return _below(source, files)
    first = list(itertools.islice(_walked(folder), _FIRST))
    videos = sorted(file for file, kind in first if kind == "video")
    if not videos:
        return None
    if any(kind == "image" for _, kind in first):
        warnings.warn(
            f"{folder}: images are taken; its videos, such as {videos[0]}, are left out: {folder},fps=1 takes those",
            stacklevel=3,
        )
        return None
    return _below(source, sorted(file for file, kind in _walked(folder) if kind == "video"))


def _below(source: Source, files: list[str]) -> Videos:
    """All videos of a folder; a new video in it counts as a change."""
    folder = source.path
    videos = Videos(folder, files, _pace(source), name=source.base_text)
    videos.watch = Watch.of_files([os.path.join(folder, file) for file in files], folder)
    return videos


def _walked(root: str) -> Iterator[tuple[str, str]]:
    """Files under ``root``, relative to it, with their kind: image, video or other; hidden files are left out.

    No folder is entered twice, so links cannot make loops.
    """
    visited: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                extension = name.rpartition(".")[2].lower()
                kind = "video" if extension in VIDEOS else "image" if extension in EXTENSIONS else "other"
                yield os.path.relpath(os.path.join(folder, name), root), kind


def _all_videos(files: Sequence[str]) -> bool:
    return bool(files) and all(map(is_video, files))


def _ends(tracks: Int64[Tensor, " N"], groups: Int64[Tensor, " N"]) -> Int64[Tensor, " B"]:
    """The index after the last frame of each keyframe."""
    new = (tracks.diff() != 0) | (groups.diff() != 0)
    return torch.cat([new.nonzero().squeeze(1) + 1, torch.tensor([len(tracks)])])


def _names(videos: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """``video.mp4#t=12.040``: milliseconds, or microseconds where frames are closer."""
    for file, seconds in videos:
        digits = 3 if not len(seconds) or float(seconds.diff().min() if len(seconds) > 1 else 1) >= 0.001 else 6
        for second in seconds.tolist():
            yield f"{file}#t={second:.{digits}f}"
