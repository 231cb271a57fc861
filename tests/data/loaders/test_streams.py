"""Streams of tar shards: every image once, whatever the ranks, workers, buffers and damages."""

import functools
import gzip
import http.server
import io
import itertools
import sys
import tarfile
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders import streams
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers import remote
from crosslevel.data.sources.containers.remote import Damage, Tape, expand
from crosslevel.data.sources.containers.stream import ImageStream, Part
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError
from crosslevel.utils.rng import generator


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@functools.cache
def picture(number):
    """A PNG of one colour that tells its number."""
    stream = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number % 251, np.uint8)).save(stream, "png")
    return stream.getvalue()


def archive(numbers, format=tarfile.PAX_FORMAT, others=True, name="{:04}.png", bad=()):
    """A tar file of pictures, each followed by a caption, as WebDataset's are."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for number in numbers:
            data = b"no picture" if number in bad else picture(number)
            members = [(name.format(number), data), (f"{number:04}.txt", b"a caption" * number)]
            for title, content in members[: 1 + others]:
                member = tarfile.TarInfo(title)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def shards(folder, *parts, **how):
    for i, numbers in enumerate(parts):
        (folder / f"s-{i}.tar").write_bytes(archive(numbers, **how))
    return ImageStream.open(parse(f"stream:{folder}/s-*.tar"))


def crops(image, generator):
    """The image as it is, and one that shows which generator was used."""
    return torch.stack([image, torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)])


def batches(stream, size, epoch_size, **how):
    return StreamBatches(stream, size, epoch_size, **{"seed": 0, "bad": BadFiles(), "crops": crops, **how})


def numbers(batch):
    return batch.images[:, 0, 0, 0, 0].tolist()


def seen(delivered):
    return [number for batch in delivered for number in numbers(batch)]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


# Every image once


@pytest.mark.filterwarnings("ignore:.*cannot be dealt out")
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(0, 2**40),
)
def test_a_pass_has_every_image_once_over_all_ranks(sizes, world, buffer, epoch, seed):
    place = f"memory://{uuid.uuid4()}"
    ends = np.cumsum([0, *sizes])
    for i, (first, last) in enumerate(itertools.pairwise(ends)):
        with fsspec.open(f"{place}/{i}.tar", "wb") as file:
            file.write(archive(range(first, last), others=False))
    stream, total = ImageStream.open(parse(f"{place}/*.tar")), int(ends[-1])
    parts, found = [], []
    for rank in range(world):
        rank_batches = batches(stream, 4, max(total, world), seed=seed, rank=rank, world=world, buffer=buffer)
        parts += rank_batches.parts(epoch)
        samples = list(streams._shuffled(stream.read(rank_batches.parts(epoch), []), buffer, generator(seed)))
        found += [path for path, _ in samples]
    assert len(found) == len(set(found)) == total
    # Shards that the ranks divide are read by one of them only.
    alone = [part.shard for part in parts if part.of == 1]
    assert len(alone) == len(set(alone)) == len(sizes) // world * world


@pytest.mark.parametrize("workers", [0, 2])
def test_two_shards_in_two_ranks_cover_every_image_once_an_epoch(tmp_path, workers):
    stream = shards(tmp_path, range(20), range(20, 40))
    orders = []
    for epoch in range(2):
        found, index = [], []
        for rank in range(2):
            half = batches(stream, 5, 40, rank=rank, world=2, workers=workers, buffer=7)
            half.epoch = epoch
            delivered = list(half)
            assert len(delivered) == len(half) == 4
            assert len({number // 20 for number in seen(delivered)}) == 1  # a shard is read by one rank
            found += seen(delivered)
            index += torch.cat([batch.index for batch in delivered]).tolist()
        assert sorted(found) == sorted(index) == list(range(40))
        orders.append(found)
    assert orders[0] != orders[1] != list(range(40))


def test_one_shard_in_two_ranks_is_split_by_image_and_said_so(tmp_path):
    stream = shards(tmp_path, range(20))
    with pytest.warns(UserWarning, match="1 of the shards, 1 in all, cannot be dealt out to 2 ranks: .* one in 2 of"):
        first = batches(stream, 5, 20, rank=0, world=2)
    one, other = seen(first), seen(batches(stream, 5, 20, rank=1, world=2))
    assert sorted(one + other) == list(range(20))
    assert {number % 2 for number in one} == {0}


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    stream = shards(tmp_path, range(9), range(9, 30), range(30, 44), bad=(3, 17))
    results = []
    for workers in (0, 1, 2):
        some = batches(stream, 4, 30, workers=workers, buffer=10)
        results.append([])
        for epoch in (0, 1, 5):
            some.epoch = epoch
            results[-1] += list(some)
        assert set(some.bad.reasons) <= {"s-0.tar/0003.png", "s-1.tar/0017.png"}
    assert results[0][0].images.shape == (4, 2, 3, 6, 8)
    assert results[0][0].labels.tolist() == [-1] * 4
    same(results[0], results[1])
    same(results[0], results[2])


def test_the_order_does_not_depend_on_the_speed_of_reading(tmp_path, monkeypatch):
    stream = shards(tmp_path, range(50), range(50, 60), range(60, 100))
    want = seen(batches(stream, 10, 100, buffer=16))
    read, calls = Tape.read, []

    def slow(tape, count):
        calls.append(tape.name)
        time.sleep(0.004 * (len(calls) % 3 == 0 and "s-0" in tape.name))
        return read(tape, count)

    monkeypatch.setattr(Tape, "read", slow)
    assert seen(batches(stream, 10, 100, buffer=16)) == want
    assert calls


def test_crops_are_drawn_by_seed_epoch_and_number(tmp_path):
    stream = shards(tmp_path, range(12))
    some = batches(stream, 4, 12, seed=5)
    some.epoch = 3
    for batch in some:
        for number, views in zip(batch.index.tolist(), batch.images, strict=True):
            assert torch.equal(views, crops(views[0], generator(5, 3, number)))


def test_a_stream_that_ends_early_begins_again_in_another_order(tmp_path):
    found = seen(batches(shards(tmp_path, range(10)), 5, 40))
    passes = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(part) == list(range(10)) for part in passes)
    assert len({tuple(part) for part in passes}) == 4


def test_an_epoch_leaves_out_what_is_beyond_it(tmp_path):
    found = seen(batches(shards(tmp_path, range(100)), 8, 20, buffer=100))
    assert len(found) == len(set(found)) == 16  # the last, smaller batch is left out
    assert max(found) > 50


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_a_resumed_epoch_equals_the_rest_of_the_whole_one(tmp_path, start, workers):
    stream = shards(tmp_path, range(11), range(11, 25), bad=(2, 20))
    whole = batches(stream, 5, 30, buffer=6)
    whole.epoch = 4
    resumed = batches(stream, 5, 30, buffer=6, workers=workers)
    resumed.epoch, resumed.start = 4, start
    rest = iter(resumed)
    assert resumed.start == 0
    want = list(whole)
    same(want[start:], list(rest))
    same(want, list(resumed))


def test_what_is_skipped_is_not_decoded(tmp_path, monkeypatch):
    decoded = []
    decode = streams.decode
    monkeypatch.setattr(
        streams, "decode", lambda data, path, **more: decoded.append(path) or decode(data, path, **more)
    )
    resumed = batches(shards(tmp_path, range(60)), 5, 60)
    resumed.start = 10
    assert len(list(resumed)) == 2
    assert len(decoded) == 10


def test_leaving_an_epoch_early_does_not_disturb_the_next(tmp_path):
    some = batches(shards(tmp_path, range(40), range(40, 80)), 5, 80, workers=2, buffer=16)
    want = list(some)
    for _ in range(3):
        for batch in some:
            assert torch.equal(batch.images, want[0].images)
            break
    same(want, list(some))
    assert not [t for t in threading.enumerate() if t.name.startswith("crosslevel-read")]


# Damage


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_and_the_next_one_takes_its_place(tmp_path, workers):
    some = batches(shards(tmp_path, range(20), bad=(4, 11)), 5, 20, workers=workers)
    delivered = list(some)
    assert [len(batch.index) for batch in delivered] == [5] * 4
    assert set(some.bad.reasons) == {"s-0.tar/0004.png", "s-0.tar/0011.png"}
    assert set(some.bad.reasons.values()) == {"not an image, or the beginning of one is damaged"}
    found = torch.cat([batch.index for batch in delivered])
    replaced = found != torch.arange(20)
    assert int(replaced.sum()) == 2
    assert set(seen(delivered)) == set(range(20)) - {4, 11}


def test_more_bad_images_than_spare_ones(tmp_path):
    some = batches(shards(tmp_path, range(60), bad=set(range(60)) - {7, 33}), 30, 60)
    delivered = list(some)
    assert [len(batch.index) for batch in delivered] == [30, 30]
    assert set(seen(delivered)) <= {7, 33}
    assert len(some.bad) == 58
    lonely = batches(shards(tmp_path, range(200), bad=set(range(200)) - {7}), 2, 4)
    assert seen(lonely) == [7] * 4  # most batches have no readable image: they are passed over
    with pytest.raises(SourceError, match="hardly any of its images can be read"):
        list(batches(shards(tmp_path, range(20), bad=range(20)), 5, 20))


@pytest.mark.parametrize(("keep", "says"), [(0.5, "truncated"), (1200, "truncated"), (-1024, "the end of the archive")])
def test_a_truncated_shard_is_named_and_survived(tmp_path, keep, says):
    stream = shards(tmp_path, range(20), range(20, 30), others=False)
    file = tmp_path / "s-0.tar"
    with tarfile.open(file) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    whole = file.read_bytes()[: end + 1024]
    file.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    some = batches(stream, 5, 30)
    found = seen(some)
    assert list(some.bad.reasons) == ["s-0.tar"]
    assert says in some.bad.reasons["s-0.tar"]
    left = {0.5: 10, 1200: 1, -1024: 20}[keep]
    assert f"the {left:,} images before are used" in some.bad.reasons["s-0.tar"]
    assert set(found) == {*range(left), *range(20, 30)}
    assert len(found) == 30


def test_other_damages_are_named_and_survived(tmp_path):
    good = archive(range(10))
    (tmp_path / "a 🐈\n.tar").write_bytes(good)
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "none.tar").write_bytes(archive([1], name="{}.json"))
    (tmp_path / "header.tar").write_bytes(good[:3584] + b"\1" * 512 + good[4096:])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(good, 0)[:4000])
    (tmp_path / "broken.tgz").write_bytes(gzip.compress(good)[:60] + b"\0" * 200)
    stream = ImageStream.open(parse(f"stream:{tmp_path}/*.t*"))
    (tmp_path / "empty.tar").unlink()
    some = batches(stream, 5, 40)
    assert len(list(some)) == 8
    begins = {
        "garbage.tar": "damaged: no member begins at byte 0",
        "empty.tar": "cannot be opened: No such file or directory",
        "none.tar": "no image in it (looked for apng, ",
        "header.tar": "damaged: no member begins at byte 3,584; the 2 images before",
        "cut.tar.gz": "damaged or truncated: Compressed file ended",
        "broken.tgz": "damaged or truncated: ",
    }
    assert set(some.bad.reasons) == set(begins)
    assert all(some.bad.reasons[title].startswith(reason) for title, reason in begins.items()), some.bad.reasons


def test_when_every_shard_fails_one_line_says_so(tmp_path):
    stream = shards(tmp_path, range(5), range(5, 10))
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    for workers in (0, 1):
        some = batches(stream, 5, 10, workers=workers)
        with pytest.raises(SourceError, match=r"none of its 2 shards can be read \(the first: s-\d.tar: cannot be op"):
            list(some)
        assert set(some.bad.reasons) == {"s-0.tar", "s-1.tar"}
    with pytest.raises(SourceError, match=r"none of its 2 shards can be read"):
        stream.some(3)


def test_a_rank_whose_shards_are_gone_reads_the_others(tmp_path):
    stream = shards(tmp_path, range(10), range(10, 20))
    (tmp_path / "s-0.tar").unlink()
    for rank in range(2):
        assert set(seen(batches(stream, 5, 40, rank=rank, world=2))) == set(range(10, 20))


# Reading


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    long = "folder/" * 12 + "{:04}.é.JPG" if format == tarfile.USTAR_FORMAT else "f/é" * 80 + "{:04}.JPG"
    file = tmp_path / "x.tar"
    file.write_bytes(archive(range(5), format=format, name=long))
    with tarfile.open(file, "a", format=format) as tar:
        folder, link, hidden = tarfile.TarInfo("d.png"), tarfile.TarInfo("l.png"), tarfile.TarInfo("d/._a.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "0001.png"
        for member in (folder, link, hidden):
            tar.addfile(member)
    with tarfile.open(file) as tar:
        want = [
            (f"x.tar/{m.name}", tar.extractfile(m).read()) for m in tar if m.isfile() and m.name.lower().endswith("jpg")
        ]
    stream, troubles = ImageStream.open(parse(f"stream:{file}")), []
    assert list(stream.read([Part(0)], troubles)) == want
    assert len(want) == 5
    assert not troubles
    assert [int(image[0, 0, 0]) for image, _ in stream] == list(range(5))


def test_compressed_shards_are_unpacked(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive(range(8))))
    (tmp_path / "b.tgz").write_bytes(gzip.compress(archive(range(8, 16))))
    assert sorted(seen(batches(ImageStream.open(parse(f"stream:{tmp_path}/*")), 4, 16))) == list(range(16))


class Flaky:
    """A file of which every other read fails."""

    def __init__(self, file, failures):
        self.file, self.failures = file, failures

    def read(self, count):
        if self.failures:
            raise self.failures.pop()
        return self.file.read(min(count, 700))

    def close(self):
        self.file.close()


def test_a_failed_read_goes_on_where_it_was(tmp_path, monkeypatch):
    stream = shards(tmp_path, range(6))
    failures, opened, real = [], [], remote._opened

    def flaky(name, in_blocks, packed):
        opened.append(in_blocks)
        return Flaky(real(name, in_blocks, packed), failures)

    monkeypatch.setattr(remote, "_opened", flaky)
    tape = Tape(stream.shards[0], threading.Event())
    whole = (tmp_path / "s-0.tar").read_bytes()
    got = b""
    for errors in ([], [OSError("reset")], [TimeoutError(), RuntimeError("odd")], [ValueError("no ranges")], []):
        failures[:] = errors
        got += tape.read(1000)
    assert got == whole[:5000]
    assert tape.skip(len(whole)) == len(whole) - 5000
    assert opened == [True, True, True, True, False]
    failures[:] = [OSError("down")] * 3
    with pytest.raises(Damage, match="cannot be read, tried 3 times: down"):
        tape.read(1)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files over HTTP; it fails as often as its server's ``failures`` say, and knows ranges if ``ranges`` is set."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        wanted = self.headers.get("Range")
        if not (self.server.ranges and wanted):
            return super().do_GET()
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{min(last + 1, len(data)) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_):
        self.server.asked += 1


@pytest.fixture
def web(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    server.failures, server.ranges, server.asked = 0, True, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_over_http(tmp_path, web, monkeypatch, ranges):
    monkeypatch.setattr(remote, "_BLOCK", 2048)  # several requests a shard
    shards(tmp_path, range(10), range(10, 20), range(20, 30))
    stream = ImageStream.open(parse(web.address + "/s-{0..2}.tar"))
    assert stream.titles == ["s-0.tar", "s-1.tar", "s-2.tar"]
    web.failures, web.ranges = 2, ranges
    some = batches(stream, 5, 30)
    assert sorted(seen(some)) == list(range(30))
    assert not len(some.bad)
    (tmp_path / "s-1.tar").unlink()
    some.epoch = 1
    assert set(seen(some)) == {*range(10), *range(20, 30)}
    assert list(some.bad.reasons) == ["s-1.tar"]
    assert some.bad.reasons["s-1.tar"].startswith("cannot be opened: ")


def test_a_bucket_is_listed_and_read(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    Bucket().pipe({f"/bucket/train-{i}.tar": archive(range(5 * i, 5 * i + 5)) for i in range(3)})
    stream = ImageStream.open(parse("s3://bucket/train-*.tar"))
    assert [shard.rpartition("/")[2] for shard in stream.shards] == stream.titles
    assert stream.titles == ["train-0.tar", "train-1.tar", "train-2.tar"]
    assert sorted(seen(batches(stream, 5, 15))) == list(range(15))


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(SourceError, match=r"^s3://b/x.tar: Install s3fs .*: pip install 'crosslevel\[remote\]'$"):
        ImageStream.open(parse("s3://b/x.tar"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SourceError, match=r"needs fsspec: pip install 'crosslevel\[remote\]'"):
        ImageStream.open(parse("https://host/x.tar"))


# Names


def test_names_are_written_out(tmp_path):
    assert expand("https://h/a-{08..11}.tar") == [f"https://h/a-{i}.tar" for i in ("08", "09", "10", "11")]
    assert expand("https://h/{2..0}.tar") == [f"https://h/{i}.tar" for i in (2, 1, 0)]
    assert expand("x/{a,b}{1..2}{c}.tar") == [f"x/{a}{i}{{c}}.tar" for a in "ab" for i in "12"]
    for wrong, says in (
        ("https://h/{0..99999999}.tar", "at most 1,000,000 names"),
        ("nope://h/x.tar", "Protocol not known: nope"),
        (f"{tmp_path}/*.tar", "no file matches this pattern"),
        ("memory://none/*.tar", "no file matches this pattern"),
        ("/dev/null", "not a file: each epoch reads its shards anew"),
    ):
        with pytest.raises(SourceError, match=says):
            expand(wrong)


def test_a_pattern_may_find_too_many(tmp_path, monkeypatch):
    shards(tmp_path, *([[0]] * 3))
    monkeypatch.setattr("crosslevel.data.sources.containers.remote._MOST", 2)
    assert len(expand(f"{tmp_path}/s-[01].tar")) == 2
    for pattern in (f"{tmp_path}/*.tar", f"{tmp_path}/s-{{0..2}}.tar", f"{tmp_path}/{{s-0,*}}.tar"):
        with pytest.raises(SourceError, match="at most 2 names"):
            expand(pattern)


def test_what_is_a_stream(tmp_path, monkeypatch):
    shards(tmp_path, range(3))
    stream = open_images(f"stream:{tmp_path}/s-{{0..0}}.tar", streams=True)
    assert isinstance(stream, ImageStream)
    assert stream.labels is None
    assert parse(stream.name).short == "s"
    assert parse("https://h/photos/{00..01}.tar?key=a").short == "photos"
    assert parse("hf://datasets/owner/name/x-{0..3}.tar").is_stream
    assert not parse("hf://owner/name,column=photo").is_stream
    with pytest.raises(SourceError, match="a stream has no known number of images, only train can use one"):
        open_images(f"stream:{tmp_path}/s-0.tar")
    for wrong, says in (
        (f"stream:{tmp_path}/x.parquet", "only tar shards can be streamed"),
        ("https://h/{a,a}.tar", "names a shard more than once"),
    ):
        with pytest.raises(SourceError, match=says):
            open_images(wrong, streams=True)
    monkeypatch.chdir(tmp_path)
    assert parse("stream:s-*.tar").absolute().text == f"stream:{tmp_path}/s-*.tar"
    assert parse("s-0.tar").absolute().text == f"{tmp_path}/s-0.tar"
    assert parse("https://h/x.tar").absolute().text == "https://h/x.tar"
    assert parse("stream:https://h/x.tar").absolute().text == "stream:https://h/x.tar"


def test_a_stream_has_no_parts():
    with pytest.raises(SourceError, match="a stream has no known images to take a part of: leave @imbalance=3 out"):
        open_images("https://host/x.tar@imbalance=3", streams=True)


def test_some_images_to_look_at(tmp_path):
    stream = shards(tmp_path, range(30), range(30, 60), bad=(0,))
    some = stream.some(20)
    assert len(some) == 20
    assert some.paths == stream.some(20).paths
    image, label = some[5]
    assert (image == int(some.paths[5][-8:-4])).all()
    assert label == -1
    assert len(stream.some(1000)) == 60


def test_wrong_arguments(tmp_path):
    stream = shards(tmp_path, range(3))
    for wrong, says in (
        ({"rank": 2, "world": 2}, "rank=2 is not one of the 2 ranks"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"buffer": 0}, "buffer=0"),
        ({"epoch_size": 1, "world": 2}, "epoch_size=1: at least one image for each of 2 ranks"),
    ):
        with pytest.raises(ValueError, match=says):
            StreamBatches(
                stream, **{"batch_size": 4, "epoch_size": 8, "seed": 0, "bad": BadFiles(), "crops": crops, **wrong}
            )
