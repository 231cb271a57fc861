"""Decorators for verbs, with what the command line has besides the signature; they are read without an import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def verb(*common: str, **defaults: Any) -> Callable[[F], F]:
    """Mark a verb of the command line; the function stays as it is.

    Args:
        common: the options that ``--help`` shows (all, if none is named); ``--help all`` has the rest.
        defaults: the command line's defaults if they differ from Python's, such as a file in place of returned arrays.

    """
    return lambda function: function


def with_options_of(command: Callable[..., Any], but: tuple[str, ...]) -> Callable[[F], F]:
    """Mark a verb that also has ``command``'s options, except those in ``but``, as ``settings``, a plain tree."""
    return lambda function: function
