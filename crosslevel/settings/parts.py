"""Parts of a command that are objects: given as settings, as an object, or as what makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from crosslevel.utils.errors import UserError, did_you_mean

T = TypeVar("T")


def made(
    kind: Callable[..., T], given: T | Mapping[str, Any] | Callable[..., T] | None, *arguments: Any, name: str
) -> T:
    """The part itself.

    Args:
        kind: its class.
        given: an object, which is taken as it is; settings; or a function of ``arguments``; None takes all defaults.
        arguments: what comes before the settings, such as the size of the features.
        name: of the part, for errors.

    Raises:
        UserError: settings that the class does not have, or something else altogether.

    """
    if isinstance(kind, type) and isinstance(given, kind):
        return cast(T, given)
    if given is None or isinstance(given, Mapping):
        return kind(*arguments, **checked(kind, given or {}, name))
    if callable(given):
        return given(*arguments)
    raise UserError(f"{name}={given!r}: give a {getattr(kind, '__name__', name)}, or its settings as a dictionary")


def checked(kind: Callable[..., Any], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings, if ``kind`` has them all.

    Raises:
        UserError: with the name that it has not, and the nearest that it has.

    """
    known = [name for name in inspect.signature(kind).parameters if name != "self"]
    for setting in settings:
        if setting not in known:
            raise UserError(f"{name} has no setting {setting!r}: {did_you_mean(setting, known)}")
    return dict(settings)
