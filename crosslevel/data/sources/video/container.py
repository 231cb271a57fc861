"""Opening of video files with PyAV, and the errors that it raises for broken ones."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from crosslevel.utils.errors import MissingExtra


class BadVideo(Exception):
    """The defect of a video, or of one of its frames, in a few words."""


def opened(file: str) -> Any:
    """The container.

    Raises:
        BadVideo: it cannot be opened.
        ImportError: PyAV is missing.

    """
    try:
        # The protocol is given, since a file name may begin like another one, such as http:.
        return _av().open(f"file:{os.path.abspath(file)}", metadata_errors="ignore")
    except errors() as error:
        raise BadVideo(reason(error)) from error


def stream_of(container: Any) -> Any:
    """The video stream.

    Raises:
        BadVideo: there is no video stream.

    """
    stream = container.streams.best("video")
    if stream is None:
        raise BadVideo("there is no picture in it")
    return stream


def errors() -> tuple[type[Exception], ...]:
    """The exceptions that PyAV raises for broken files."""
    return (_av().FFmpegError, OSError, ValueError)


def _av() -> Any:
    """PyAV: only videos need it."""
    try:
        return import_module("av")
    except ImportError as error:
        raise MissingExtra("videos need PyAV: pip install 'crosslevel[video]'") from error


def reason(error: Exception) -> str:
    """Why something cannot be decoded, in a few words."""
    strerror = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be decoded: {strerror}".split("\n", maxsplit=1)[0]
