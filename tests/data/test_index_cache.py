"""The index cache and compact lists of paths."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.index_cache import Paths, cache_folder, remembered

NAMES = st.lists(st.one_of(st.text(), st.binary(max_size=9).map(os.fsdecode)), max_size=12)


@given(names=NAMES)
def test_paths_are_the_strings_they_were_made_of(names):
    names = [name.encode("utf-8", "ignore").decode() if not _encodable(name) else name for name in names]
    paths = Paths.of(names)
    assert list(paths) == names
    assert paths == names
    assert paths == Paths.of(names)
    assert [paths[i] for i in range(len(names))] == names
    assert [paths[i - len(names)] for i in range(len(names))] == names
    assert paths[::-1] == names[::-1]
    index = torch.arange(len(names)).flip(0)
    assert list(paths.take(index)) == names[::-1]


def _encodable(name):
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == name
    except UnicodeEncodeError:
        return False


def test_a_place_outside_the_list():
    with pytest.raises(IndexError):
        Paths.of(["a"])[1]
    assert Paths.of(["a"]) != ["b"]
    assert len(Paths.of([])) == 0


def test_made_once_until_the_state_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.arange(3) + len(calls), "empty": torch.zeros(0)}

    first = remembered("kind", "a key", "state 1", make)
    again = remembered("kind", "a key", "state 1", make)
    assert torch.equal(first["x"], again["x"])
    assert again["empty"].shape == (0,)
    assert len(calls) == 1
    assert int(remembered("kind", "a key", "state 2", make)["x"][0]) == 2
    assert int(remembered("kind", "another key", "state 2", make)["x"][0]) == 3
    assert int(remembered("kind", "a key", "state 2", make)["x"][0]) == 2


def test_a_damaged_cache_is_made_anew_and_an_unwritable_one_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    remembered("kind", "key", "state", lambda: {"x": torch.ones(2)})
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"damaged")
    assert torch.equal(remembered("kind", "key", "state", lambda: {"x": torch.zeros(2)})["x"], torch.zeros(2))
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "file"))
    assert torch.equal(remembered("kind", "key", "state", lambda: {"x": torch.ones(2)})["x"], torch.ones(2))
