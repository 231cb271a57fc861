"""Commands that are killed at changes of files, or have no space: the same command then ends as if nothing had been.

The short form, a part of all points; `make faults` tries all of them.
"""

import kills
import pytest


@pytest.mark.skipif(kills.missing() is not None, reason=str(kills.missing()))
def test_no_kill_and_no_failing_write_loses_anything():
    found = kills.survey([], every=40)
    assert all(counts.tried for row in found.values() for counts in row.values())
    assert not any(counts.lost or counts.unreached for row in found.values() for counts in row.values()), kills.table(
        found
    )
