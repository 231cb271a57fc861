"""Requests to a store or server: their size, and the pauses before new attempts while it is busy.

This is our own code: s3fs among fsspec's file systems retries by its own rules, HTTP does not. Here all have the same
pauses, which one variable sets, and errors that no new attempt can mend (`FINAL`) are not retried.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from crosslevel.utils.errors import UserError

PAUSES = (1.0, 2.0, 4.0, 8.0)
RETRY_SECONDS = "CROSSLEVEL_RETRY_SECONDS"
"""Environment variable with other pauses, such as 1,5,30 for three new attempts."""

REQUEST_KB = "CROSSLEVEL_REQUEST_KB"
"""Environment variable with another size of one request, in KiB."""

_BLOCK = 8 * 2**20  # bytes a request: fewer would wait for the network more often than they read
# No new attempt is made for a missing or forbidden file.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def pauses() -> tuple[float, ...]:
    """Seconds before each new attempt at a failed read: 1, 2, 4 and 8, or the value of `RETRY_SECONDS`.

    Raises:
        UserError: the value is no list of numbers.

    """
    setting = os.environ.get(RETRY_SECONDS)
    try:
        return PAUSES if setting is None else tuple(float(seconds) for seconds in setting.split(","))
    except ValueError as error:
        raise UserError(f"{RETRY_SECONDS}={setting}: give seconds, such as 1,5,30") from error


def request_bytes() -> int:
    """Bytes of one request to a store or server: 8 MiB, or the value of `REQUEST_KB`.

    Raises:
        UserError: the value is no number from 1 on.

    """
    setting = os.environ.get(REQUEST_KB)
    if setting is None:
        return _BLOCK
    if not setting.isdecimal() or not int(setting):
        raise UserError(f"{REQUEST_KB}={setting}: give KiB, such as 8192")
    return int(setting) * 2**10


def patiently(ask: Callable[[], Any]) -> Any:
    """The answer to a request, which is repeated after each of the `pauses` while the store is busy."""
    for pause in pauses():
        try:
            return ask()
        except FINAL:
            raise
        except Exception:
            time.sleep(pause)
    return ask()
