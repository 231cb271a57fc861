"""What the tests of streams share."""

import pytest

from crosslevel.data.sources.containers import remote


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
