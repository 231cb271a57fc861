"""Reads at an offset, with and without the system's own call for it."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from crosslevel.data.sources.containers.random_file import RandomFile


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")])
def test_many_threads_read_at_once(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name, raising=False)
    content = bytes(range(256)) * 400 + b"\r\n\x1a"  # nothing is taken for the end of a line or of a text
    (tmp_path / "file").write_bytes(content)
    file = RandomFile(str(tmp_path / "file"))

    def part(offset):
        buffer = bytearray(999)
        return bytes(buffer[: file.read_into(buffer, offset)]), file.read(7, offset)

    offsets = [n * 7919 % len(content) for n in range(3000)] + [len(content) - 1, len(content), len(content) + 9]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(part, offsets))
    assert parts == [(content[offset : offset + 999], content[offset : offset + 7]) for offset in offsets]


def test_it_is_closed_when_nothing_refers_to_it(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    file = RandomFile(str(tmp_path / "file"))
    number = file.number
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    with pytest.raises(FileNotFoundError):
        RandomFile(str(tmp_path / "none"))
