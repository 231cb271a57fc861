"""Errors that a user meets: one line each that says what is wrong and what to do."""

from __future__ import annotations


class CrosslevelError(Exception):
    """What Crosslevel itself has to say; the message is whole as it stands."""


class UserError(CrosslevelError, ValueError):
    """Something that was asked for cannot be done: what, which value, and what to do."""


class MachineError(CrosslevelError, OSError):
    """A file that cannot be written, or a process that died: nothing that a setting did."""


class NotFinite(CrosslevelError, RuntimeError):
    """The loss is no longer a number; the message says what was seen."""


class SourceError(UserError):
    """A source that gives no images: what is wrong with it and what to do, in one line."""


class BadImage(CrosslevelError):
    """One image that cannot be read: ``path`` names it, ``reason`` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class FolderInUse(UserError):
    """Another process writes to the folder; the message names it."""


class Interrupted(CrosslevelError, RuntimeError):
    """A signal ended a run after it had saved what it had: ``signal`` is its number, ``folder`` the run's."""

    def __init__(self, signal: int, folder: str) -> None:
        super().__init__(f"stopped by signal {signal}: crosslevel train --resume {folder} goes on")
        self.signal, self.folder = signal, folder

    @property
    def status(self) -> int:
        """The exit status that a command ends with."""
        return 128 + self.signal
