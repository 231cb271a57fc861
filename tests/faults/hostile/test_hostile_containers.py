"""Shards and Parquet files of strangers: one that is damaged or lies is named and left out, the rest is read."""

import contextlib
import io
import itertools
import tarfile
import tracemalloc
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from container_samples import flat, labelled, value, write_tar
from mutations import mutated

from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.errors import BadImage, SourceError

BASE256 = [b"\x80" + b"\x7f" * 11, b"\x80" + bytes(3) + b"\x7f" * 8, b"\x80" + bytes(4) + b"\x10" + bytes(6)]


def lying(size):
    """A shard whose second member is said to have ``size`` bytes, as a tar header has them."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i:04}.png")
            info.size = len(flat(i))
            tar.addfile(info, io.BytesIO(flat(i)))
    data = bytearray(stream.getvalue())
    header = data[1024:1536]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[1024:1536] = header
    return bytes(data)


def extended(record):
    """A shard whose second member is preceded by a pax header with ``record``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, kind in (("0.png", flat(0), b"0"), ("x", record, b"x"), ("1.png", flat(1), b"0")):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pax(key, text):
    body = f" {key}={text}\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return f"{length}{body}".encode()


HOSTILE = {
    **{f"a member of {size.hex()} bytes": lying(size) for size in (*BASE256, b"77777777777\0")},
    "a pax size of 5,000 digits": extended(pax("size", "9" * 5000)),
    "a pax size of 30 digits": extended(pax("size", "9" * 30)),
    "a pax record of a length of 5,000 digits": extended(b"1" * 5000 + b" path=a.png\n"),
    "no tar file": b"P" * 5000,
    "nothing": b"",
}


@pytest.fixture
def shards(tmp_path):
    """Four sound shards of five images, with a place for one between them."""
    for i in (0, 1, 3, 4):
        write_tar(tmp_path / f"s-{i}.tar", labelled(range(10 * i, 10 * i + 5)))
    return tmp_path


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_named_by_the_indexed_and_the_streamed_reader_and_the_rest_is_read(shards, kind):
    (shards / "s-2.tar").write_bytes(HOSTILE[kind])
    sound = {10 * i + k for i in (0, 1, 3, 4) for k in range(5)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = open_images(f"{shards}/s-*.tar")
    assert list(images.left_out) == ["s-2.tar"]
    assert [str(line.message).count("s-2.tar: ") for line in caught][:1] == [1]
    bad_files = images.bad_files()
    read = [int(i) for batch in EvalBatches(images, 8, 4, bad_files=bad_files) for i in batch.images[:, 0, 0, 0]]
    assert sound <= set(read) <= sound | {0, 1, 2}
    stream = ImageStream.open(parse(f"stream:{shards}/s-*.tar"))
    troubles: list[tuple[str, str]] = []
    tracemalloc.start()
    names = [name for name, _ in stream.read(range(5), troubles)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {name.partition("/")[0] for name in names} >= {"s-0.tar", "s-1.tar", "s-3.tar", "s-4.tar"}
    assert len([name for name in names if not name.startswith("s-2")]) == 20
    assert any(path.startswith("s-2.tar") and "\n" not in why for path, why in troubles)
    assert peak < 50 * 2**20


def test_a_single_hostile_shard_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.tar").write_bytes(lying(BASE256[0]))
    with pytest.raises(SourceError, match=r"x.tar: needs at least 2 images, found 1 \(x.tar: damaged") as caught:
        open_images(tmp_path / "x.tar")
    assert "\n" not in str(caught.value)


def parquet(file, numbers, group=13):
    table = pa.table({"image": pa.array([flat(i) for i in numbers]), "label": pa.array([i % 3 for i in numbers])})
    pq.write_table(table, file, row_group_size=group, store_schema=False, compression="none")
    return file


def with_rows(data, told):
    """A file of one group of 13 rows whose footer says that the group, and the file, have ``told`` rows (below 64)."""
    first = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # Thrift's compact protocol: a field of type i64, and 13 in zigzag.
    places = [i for i in range(first, len(data) - 8) if data[i : i + 2] == b"\x16\x1a"]
    for chosen in itertools.combinations(places, 2):
        made = bytearray(data)
        for i in chosen:
            made[i + 1] = 2 * told
        footer = pq.read_metadata(io.BytesIO(made))
        if footer.num_rows == footer.row_group(0).num_rows == told and footer.row_group(0).column(0).num_values == 13:
            return bytes(made)
    raise AssertionError("no such place in the footer")


@pytest.mark.parametrize("told", [14, 40])
def test_rows_that_a_row_group_lacks_are_named_and_the_others_are_read(tmp_path, told):
    parquet(tmp_path / "a.parquet", range(13))
    (tmp_path / "a.parquet").write_bytes(with_rows((tmp_path / "a.parquet").read_bytes(), told))
    parquet(tmp_path / "b.parquet", range(13, 20))
    with pytest.warns(UserWarning, match=f"the labels are left out: {told - 13} of"):
        images = open_images(tmp_path)
    bad_files = images.bad_files()
    read = [int(i) for batch in EvalBatches(images, 8, 4, bad_files=bad_files) for i in batch.images[:, 0, 0, 0]]
    assert read == list(range(20))
    assert sorted(bad_files.reasons) == sorted(f"a.parquet/{i}" for i in range(13, told))
    assert set(bad_files.reasons.values()) == {"its row group has 13 rows, fewer than the file says"}


@pytest.mark.parametrize("damage", ["cut", "kind", "empty", "rows"])
def test_a_parquet_file_that_is_none_is_left_out(tmp_path, damage):
    whole = parquet(tmp_path / "a.parquet", range(13)).read_bytes()
    parquet(tmp_path / "b.parquet", range(13, 20))
    content = {"cut": whole[:-9], "kind": b"no Parquet", "empty": b"", "rows": whole}[damage]
    if damage == "rows":
        content = whole.replace(b"\x16\x1a", b"\x16\x1b")  # minus 14
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.warns(UserWarning, match=r"a.parquet: not a Parquet file, or cut off: .*: it is left out"):
        images = open_images(tmp_path)
    assert list(images.left_out) == ["a.parquet"]
    assert [value(image) for image, _ in images] == list(range(13, 20))
    assert images.labels.tolist() == [i % 3 for i in range(13, 20)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_mutated_containers_cost_at_most_themselves(tmp_path, kind):
    rng = np.random.default_rng(19)
    whole, hurt = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    if kind == "tar":
        write_tar(whole, labelled(range(5)))
        content = write_tar(hurt, labelled(range(50, 55)), format=tarfile.PAX_FORMAT).read_bytes()
    else:
        parquet(whole, range(5))
        content = parquet(hurt, range(50, 60), group=4).read_bytes()
    for _ in range(40):
        hurt.write_bytes(mutated(content, rng))
        with contextlib.suppress(SourceError):  # a column of another name or kind is refused
            images, read = open_images(tmp_path), []
            for i in range(len(images)):
                with contextlib.suppress(BadImage):
                    read.append(int(images[i][0][0, 0, 0]))
            assert read[:5] == list(range(5))
        if kind == "tar":
            stream = ImageStream.open(parse(f"stream:{tmp_path}/*.tar"))
            assert len([name for name, _ in stream.read(range(2), []) if name.startswith("a.tar")]) == 5
