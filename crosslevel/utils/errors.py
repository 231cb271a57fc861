"""Errors for users, of one line each, with what is wrong and what to do; and text that cannot control a terminal.

Only these are shown as one line without a traceback: an error of another library is a fault, whatever its class.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class CrosslevelError(Exception):
    """The base of Crosslevel's own errors; the message is complete."""


class UserError(CrosslevelError, ValueError):
    """A request cannot be fulfilled; the message has the setting, its value, and what to do."""


class NotThere(UserError, FileNotFoundError):
    """A named file or folder does not exist."""


class MachineError(CrosslevelError, OSError):
    """A file cannot be written, or a process died: no setting is the cause."""


class MissingExtra(UserError, ImportError):
    """An optional part is not installed; the message has the command that installs it."""


class SourceError(UserError):
    """A source yields no images; the message says what is wrong and what to do, in one line."""


class NotFinite(CrosslevelError, RuntimeError):
    """The loss is no longer a number; the message has the losses."""


class FolderInUse(UserError):
    """Another process writes to the folder; the message names it."""


class Interrupted(CrosslevelError, RuntimeError):
    """A signal ended a run after it was saved: ``signal`` is its number, ``folder`` the run's folder."""

    def __init__(self, signal: int, folder: str) -> None:
        super().__init__(f"stopped by signal {signal}: crosslevel train --resume {folder} continues it")
        self.signal, self.folder = signal, folder

    @property
    def status(self) -> int:
        """The exit status that a command ends with."""
        return 128 + self.signal


class BadImage(CrosslevelError):
    """One image that cannot be read: ``path`` names it, ``reason`` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def near_names(word: str, choices: Iterable[str], cutoff: float = 0.6, most: int = 1) -> list[str]:
    """The ``most`` names closest to ``word``, in any case, the likeliest first."""
    spelled = {name.lower(): name for name in choices}
    return [spelled[name] for name in difflib.get_close_matches(word.lower(), spelled, most, cutoff)]


def did_you_mean(
    word: str,
    choices: Iterable[str],
    otherwise: str | None = None,
    *,
    value: str = "",
    cutoff: float = 0.6,
    most: int = 1,
) -> str:
    """The end of an error about an unknown word: the nearest choices, or all choices.

    Args:
        word: the unknown word.
        choices: the known words.
        otherwise: the text if none is near; all words unless given.
        value: text after the word, such as ``=3``.
        cutoff: how near a word has to be, from 0 (any) to 1 (the same).
        most: the number of words named.

    """
    names = list(choices)
    near = near_names(word, names, cutoff, most)
    if near:
        return f"did you mean {' or '.join(name + value for name in near)}?"
    return f"there are {', '.join(names)}" if otherwise is None else otherwise


def near_hint(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """``: did you mean NAME?``, for the end of an error; empty if no name is near."""
    hint = did_you_mean(word, choices, "", cutoff=cutoff)
    return hint and f": {hint}"


def counted(count: int, noun: str) -> str:
    """``1 image``, ``1,234 images``: a number and its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: str, lines: bool = False) -> str:
    r"""``text`` with control codes, line breaks and invalid characters written as ``\x1b``, ``\n``, ``\udcff``.

    Secrets in addresses are hidden. ``lines``: line breaks and tabs stay.
    """
    allowed = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in allowed else c.encode("unicode_escape").decode() for c in hidden(text))


_SCHEMES = "s3a?|gs|gcs|az|abfss?|https?|s?ftp|hdfs|postgres(?:ql)?|mysql|mariadb|oracle|mssql|redis"
_PASSWORD = re.compile(
    # scheme, slashes (any number: it may be mistyped) and name
    rf"((?:\b(?:{_SCHEMES})(?:\+\w+)?:/{{0,2}}|//)[^\s/:@]*):"
    # not a port; up to the last @ that begins no part of a source
    r"(?!\d+/(?!\S*@))\S*@(?!\w+=)"
)


_SIGNED = re.compile(
    r"([?&](?:x-(?:amz|goog)-[\w-]+|awsaccesskeyid|sig|signature|(?:access_|auth_)?token|(?:api_?)?key|password|secret)=)"
    # up to the next one, a source's option or suffix, or what ends a sentence
    r"(?:(?![,@]\w+=|[:;,.)\]]+(?:\s|$))[^&\s\"'<>])+",
    re.IGNORECASE,
)


def hidden(text: str) -> str:
    """``text`` without the secrets in its addresses: ``postgresql://bob:***@host/database``, ``x.tar?token=***``."""
    if "@" in text:
        text = _PASSWORD.sub(r"\1:***@", text)
    return _SIGNED.sub(r"\1***", text) if "=" in text else text
