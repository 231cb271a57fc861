"""Marks on a verb that say what its command line has besides its signature; they are read without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def usual(*options: str) -> Callable[[F], F]:
    """The options that ``--help`` shows; ``--help all`` has the rest."""
    return lambda function: function


def on_command_line(**defaults: Any) -> Callable[[F], F]:
    """Defaults of the command line where a Python caller has others, such as a file in place of a returned array."""
    return lambda function: function


def with_options_of(other: Callable[..., Any], but: tuple[str, ...]) -> Callable[[F], F]:
    """Mark a command that has ``other``'s options too, ``but`` for some: it gets them as ``settings``, a plain tree."""
    return lambda function: function
