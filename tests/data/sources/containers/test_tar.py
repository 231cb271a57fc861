"""Walking over the headers of tar files, against the standard library's."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslevel.data.sources.containers import tar


class Tape:
    """Bytes in memory, and how many of them were read."""

    def __init__(self, data):
        self.data, self.at, self.touched = data, 0, 0

    def read(self, count):
        found = self.data[self.at : self.at + count]
        self.at += len(found)
        self.touched += len(found)
        return found

    def skip(self, count):
        there = min(count, len(self.data) - self.at)
        self.at += there
        return there


def archive(files, format=tarfile.PAX_FORMAT, **fields):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as target:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            target.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def walked(data):
    return [(member.name.decode(), member.offset, member.size) for member in tar.tar_members(Tape(data))]


@given(
    names=st.lists(st.sampled_from(["a.png", "d/é.jpg", "f/" * 60 + "b.png", "g" * 180]), min_size=1, max_size=5),
    sizes=st.lists(st.integers(0, 2000), min_size=5, max_size=5),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    step=st.integers(0, 700),
)
def test_members_are_those_that_tarfile_finds(names, sizes, format, step):
    data = archive(
        [(name, bytes([i]) * size) for i, (name, size) in enumerate(zip(names, sizes, strict=False))], format
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as other:
        want = [(member.name, member.offset_data, member.size) for member in other]
    tape, found = Tape(data), []
    for member in tar.tar_members(tape):
        assert tape.at == member.offset
        assert set(tape.read(min(step, member.size))) <= {len(found)}
        found.append((member.name.decode(), member.offset, member.size))
    assert found == want


def test_links_and_folders_have_no_data_whatever_their_size_says():
    with_link = archive([("a.png", b"1")])[:1024] + bytearray(archive([("l.png", b"22")], type=tarfile.SYMTYPE))[:512]
    assert walked(with_link + archive([("b.png", b"333")])) == [("a.png", 512, 1), ("b.png", 2048, 3)]


def test_nothing_but_headers_is_read():
    data = archive([(f"{i}.png", bytes(5000)) for i in range(20)])
    tape = Tape(data)
    assert len(list(tar.tar_members(tape))) == 20
    assert tape.touched == 21 * tar.BLOCK


def test_sums_of_signed_bytes_are_taken():
    header = bytearray(archive([("é.png", b"")], tarfile.GNU_FORMAT)[:512])
    header[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    assert signed != sum(header)
    header[148:156] = f"{signed:06o}\0 ".encode()
    assert walked(bytes(header) + bytes(1024)) == [("é.png", 512, 0)]


def broken_pax(data):
    at = data.index(b" path=") - 3
    return data[:at] + b"999" + data[at + 3 :]


@pytest.mark.parametrize(
    ("data", "what", "at"),
    [
        (b"", "end", 0),
        (b"x" * 511, "end", 511),
        (b"x" * 600, "header", 0),
        (archive([("a.png", b"1" * 600)])[:1000], "end", 1000),
        (archive([("a.png", b"1" * 600)])[:1536], "end", 1536),
        (archive([("a.png", b"")], type=tarfile.GNUTYPE_SPARSE), "sparse", 0),
        (archive([("g" * 500, b"1")])[:800], "end", 800),
        (broken_pax(archive([("g" * 500, b"1")])), "pax", 0),
        (archive([("x", bytes(2**20 + 1))], type=tarfile.XHDTYPE), "long", 0),
    ],
)
def test_damage_is_told_with_its_place(data, what, at):
    with pytest.raises(tar.BadTar) as caught:
        list(tar.tar_members(Tape(data)))
    assert (caught.value.damage, caught.value.at) == (what, at)
