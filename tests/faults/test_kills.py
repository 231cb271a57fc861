"""Commands that are killed at changes of files, or have no space: the same command then ends as if nothing had been.

The short form, a part of all points; `make faults` tries all of them.
"""

import kills
import pytest

# A search is many processes: one kill of it, and one failing write of each kind, are left here of the long form.
SHORT = {
    "train": kills.FAULTS,
    "pack": kills.FAULTS,
    "embed.parquet": kills.FAULTS,
    "embed.npy, in place of an older table": kills.FAULTS,
    "tune": ("kill", "once", "full"),
}


@pytest.mark.skipif(kills.missing() is not None, reason=str(kills.missing()))
@pytest.mark.parametrize("job", SHORT)
def test_no_kill_and_no_failing_write_loses_anything(job):
    found = kills.survey([job], SHORT[job], every=70)[job]
    assert all(counts.tried for counts in found.values())
    assert not any(counts.lost or counts.unreached for counts in found.values()), kills.table({job: found})
