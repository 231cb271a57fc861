"""Commands that are killed at changes of files, or have no space: the same command then ends as if nothing had been.

The short form, a part of all points; `make faults` tries all of them.
"""

import kills
import pytest

pytestmark = pytest.mark.skipif(kills.missing() is not None, reason=str(kills.missing()))
JOBS = ("train", "pack", "embed.parquet", "embed.npy, in place of an older table", "tune")


@pytest.fixture(scope="module")
def found():
    """Of all jobs, from one process, which imports everything once."""
    return kills.survey(JOBS, every=70)


@pytest.mark.parametrize("job", JOBS)
def test_no_kill_and_no_failing_write_loses_anything(found, job):
    assert set(found[job]) == set(kills.FAULTS)
    assert all(counts.tried for counts in found[job].values())
    lost = any(counts.lost or counts.unreached for counts in found[job].values())
    assert not lost, kills.table({job: found[job]})
