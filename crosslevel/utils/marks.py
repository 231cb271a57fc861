"""Marks on a verb that say what its command line has besides its signature; they are read without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def verb(*common: str, **defaults: Any) -> Callable[[F], F]:
    """Mark a verb of the command line; the function stays as it is.

    Args:
        common: the options that ``--help`` shows; ``--help all`` has the rest. All of them, if none is named.
        defaults: those of the command line where a Python caller has others: a file in place of returned arrays.

    """
    return lambda function: function


def with_options_of(command: Callable[..., Any], but: tuple[str, ...]) -> Callable[[F], F]:
    """Mark a verb that has ``command``'s options too, ``but`` for some: it gets them as ``settings``, a plain tree."""
    return lambda function: function
