"""Whether a table is still the one that an index was built of: by its file's times and footer, then by its content.

As git does it: where the times are those that were noted, the file is not read. Where they are others, a checksum of
the whole file decides, and with the same content the new times are noted.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from crosslevel.features.table import FeatureTable

SETTLED = 2.0
"""Seconds after which a file's times tell a later change from this one: the coarsest clock of a file system."""


class State(NamedTuple):
    """A table's file as it was.

    ``checksum`` is that of its size and footer, ``content`` that of the whole file. ``times`` are those of its last
    change; none where that was so recent that another one could have the same.
    """

    checksum: str
    content: str
    times: list[int] | None

    @classmethod
    def of(cls, table: FeatureTable, settled: float = SETTLED) -> State:
        """As it is now; the whole file is read."""
        times = table.times()
        return cls(table.footer, table.content(), times if _is_settled(times, settled) else None)


def recognized(table: FeatureTable, metadata: dict[str, Any], settled: float = SETTLED) -> State | None:
    """The table's state where an index's metadata is of this content; None where it is not, or nobody can tell.

    Indexes of earlier versions noted no content.
    """
    noted = metadata.get("content")
    if metadata["checksum"] != table.footer or not isinstance(noted, str):
        return None
    times = table.times()
    if metadata.get("times") == times:
        return State(table.footer, noted, times)
    state = State.of(table, settled)
    return state if state.content == noted else None


def _is_settled(times: list[int], settled: float) -> bool:
    return time.time_ns() - max(times) > settled * 1e9
