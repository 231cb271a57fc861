"""The list of what could not be read, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from crosslevel.utils.files import write


class BadFiles:
    """The images, shards and videos that could not be read: each once, with the reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._holders = set[str]()
        self._file: str | None = None

    def add(self, path: str, reason: str) -> None:
        """Record ``path``; the first reason given for a path stands."""
        self.reasons.setdefault(path, reason)

    def leave_out(self, holders: Mapping[str, str]) -> None:
        """Record files that hold several images, such as shards, by path and reason; they count as no image."""
        for path, reason in holders.items():
            self.add(path, reason)
        self._holders.update(holders)

    def __len__(self) -> int:
        """The number of images, and of files of several images, that could not be read."""
        return len(self.reasons)

    def __contains__(self, path: str) -> bool:
        return path in self.reasons

    def read(self, file: str | os.PathLike[str]) -> None:
        """Add what ``write`` left in a file."""
        for line in Path(file).read_bytes().decode("utf-8", "surrogateescape").split("\n"):
            path, tab, reason = line.partition("\t")
            if tab:
                self.add(unescaped(path), unescaped(reason))

    def write(self, file: str | os.PathLike[str]) -> None:
        r"""Write one ``path<TAB>reason`` a line, sorted by path, as UTF-8.

        Backslash, tab, newline and carriage return in a path are written ``\\``, ``\t``, ``\n``, ``\r``;
        file names that are not UTF-8 keep their bytes.
        """
        lines = (f"{escaped(path)}\t{escaped(reason)}\n" for path, reason in sorted(self.reasons.items()))
        write(file, "".join(lines).encode("utf-8", "surrogateescape"))  # others may write the same file
        self._file = os.fspath(file)

    @property
    def first(self) -> str:
        """`first_of` what could not be read."""
        return first_of(self.reasons)

    def summary(self, total: int | None) -> str:
        """One line for the end of a run over ``total`` images, or over those of a stream."""
        if not self.reasons:
            return "all images could be read" if total is None else f"all {total:,} images could be read"
        listing = "" if self._file is None else f" (listed in {escaped(self._file)})"
        if total is None:
            return f"skipped {len(self):,} images or shards that could not be read{listing}"
        holders, sentences = len(self._holders), list[str]()
        if len(self) > holders:
            sentences.append(f"skipped {len(self) - holders:,} of {total:,} images that could not be read")
        if holders:
            sentences.append(f"{holders:,} {'file is' if holders == 1 else 'files are'} damaged, with images missing")
        return "; ".join(sentences) + listing


def first_of(reasons: Mapping[str, str]) -> str:
    """`` (the first: path: reason)``, to be written after an error; empty where there is none."""
    return next((f" (the first: {path}: {reason})" for path, reason in reasons.items()), "")


def escaped(text: str) -> str:
    r"""``text`` on one line: backslash, newline, carriage return and tab as ``\\``, ``\n``, ``\r``, ``\t``."""
    replaced = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return replaced.replace("\t", "\\t")


def unescaped(text: str) -> str:
    """Undo ``escaped``."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r", "t": "\t"}.get(match[1], match[1]), text)


class _Defect(Exception):
    """The reason why an image cannot be read, in a few words."""
