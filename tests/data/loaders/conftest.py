"""What the tests of streams share."""

import pytest


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_RETRY_SECONDS", "0,0")
