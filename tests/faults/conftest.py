"""What the tests of strangers' files share."""

import pytest
from strangers import Scene


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = Scene(tmp_path)
    yield made
    made.untouched()
