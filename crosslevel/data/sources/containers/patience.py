"""How a store or server is asked: in requests of some size, and again after some pauses where it is busy.

Ours: of fsspec's file systems s3fs asks again by rules of its own, HTTP does not; here all have the same pauses, which
one variable sets, and what no later attempt can mend (`FINAL`) is not asked for again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from crosslevel.utils.errors import UserError

PAUSES = (1.0, 2.0, 4.0, 8.0)
RETRY_SECONDS = "CROSSLEVEL_RETRY_SECONDS"
"""What sets other pauses: such as 1,5,30 for three new attempts."""

REQUEST_KB = "CROSSLEVEL_REQUEST_KB"
"""What sets another size of one request, in KiB."""

_BLOCK = 8 * 2**20  # bytes a request: fewer would wait for the network more often than they read
# No later attempt finds what is not there or may not be read.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def pauses() -> tuple[float, ...]:
    """Seconds before each new attempt at a read that failed: 1, 2, 4 and 8, or what `RETRY_SECONDS` says.

    Raises:
        UserError: that is no list of numbers.

    """
    setting = os.environ.get(RETRY_SECONDS)
    try:
        return PAUSES if setting is None else tuple(float(seconds) for seconds in setting.split(","))
    except ValueError as error:
        raise UserError(f"{RETRY_SECONDS}={setting}: give seconds, such as 1,5,30") from error


def request_bytes() -> int:
    """Bytes of one request to a store or server: 8 MiB, or what `REQUEST_KB` says.

    Raises:
        UserError: that is no number from 1 on.

    """
    setting = os.environ.get(REQUEST_KB)
    if setting is None:
        return _BLOCK
    if not setting.isdecimal() or not int(setting):
        raise UserError(f"{REQUEST_KB}={setting}: give KiB, such as 8192")
    return int(setting) * 2**10


def patiently(ask: Callable[[], Any]) -> Any:
    """The answer, asked for again after each of the `pauses` while the store is busy."""
    for pause in pauses():
        try:
            return ask()
        except FINAL:
            raise
        except Exception:
            time.sleep(pause)
    return ask()
