"""How shards are found and read: members, failed reads, addresses, patterns."""

import functools
import gzip
import http.server
import sys
import tarfile
import threading

import pytest
from stream_samples import archive, batches, crops, seen, shards

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers.patience import request_bytes
from crosslevel.data.sources.containers.remote import Damage, Tape, expand, open_file
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.errors import SourceError, UserError


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
    assert list(stream.read([0], troubles)) == want
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


def test_a_failed_read_goes_on_where_it_was(tmp_path):
    stream = shards(tmp_path, range(6))
    failures, opened = [], []

    def flaky(name, in_blocks, packed):
        opened.append(in_blocks)
        return Flaky(open_file(name, in_blocks, packed), failures)

    tape = Tape(stream.shards[0], threading.Event(), opened=flaky)
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
    monkeypatch.setenv("CROSSLEVEL_REQUEST_KB", "2")  # several requests a shard
    shards(tmp_path, range(10), range(10, 20), range(20, 30))
    stream = ImageStream.open(parse(web.address + "/s-{0..2}.tar"))
    assert stream.titles == ["s-0.tar", "s-1.tar", "s-2.tar"]
    web.failures, web.ranges = 2, ranges
    some = batches(stream, 5, 30)
    assert sorted(seen(some)) == list(range(30))
    assert not len(some.bad_files)
    (tmp_path / "s-1.tar").unlink()
    some.epoch = 1
    assert set(seen(some)) == {*range(10), *range(20, 30)}
    assert list(some.bad_files.reasons) == ["s-1.tar"]
    assert some.bad_files.reasons["s-1.tar"].startswith("cannot be opened: ")


@pytest.mark.parametrize("given", ["0", "-1", "8M", ""])
def test_a_size_of_requests_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("CROSSLEVEL_REQUEST_KB", given)
    with pytest.raises(UserError, match=f"^CROSSLEVEL_REQUEST_KB={given}: give KiB, such as 8192$"):
        request_bytes()


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


def test_names_are_written_out(tmp_path):
    assert expand("https://h/a-{08..11}.tar") == [f"https://h/a-{i}.tar" for i in ("08", "09", "10", "11")]
    assert expand("https://h/{2..0}.tar") == [f"https://h/{i}.tar" for i in (2, 1, 0)]
    assert expand("x/{a,b}{1..2}{c}.tar") == [f"x/{a}{i}{{c}}.tar" for a in "ab" for i in "12"]
    for wrong, says in (
        ("https://h/{0..99999999}.tar", "stand for more than 100,000 names"),
        ("nope://h/x.tar", "Protocol not known: nope"),
        (f"{tmp_path}/*.tar", "no file matches this pattern"),
        ("memory://none/*.tar", "no file matches this pattern"),
        ("/dev/null", "not a file: each epoch reads its shards anew"),
    ):
        with pytest.raises(SourceError, match=says):
            expand(wrong)


def test_a_pattern_may_find_too_many(tmp_path):
    shards(tmp_path, *([[0]] * 3))
    assert len(expand(f"{tmp_path}/s-[01].tar", limit=2)) == 2
    for pattern in (f"{tmp_path}/*.tar", f"{tmp_path}/s-{{0..2}}.tar", f"{tmp_path}/{{s-0,*}}.tar"):
        with pytest.raises(SourceError, match="at most 2 names"):
            expand(pattern, limit=2)


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
    some = stream.sample(20)
    assert len(some) == 20
    assert some.paths == stream.sample(20).paths
    image, label = some[5]
    assert (image == int(some.paths[5][-8:-4])).all()
    assert label == -1
    assert len(stream.sample(1000)) == 60


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
                stream,
                **{"batch_size": 4, "epoch_size": 8, "seed": 0, "bad_files": BadFiles(), "crops": crops, **wrong},
            )


def test_sizes_are_those_of_files_and_no_server_is_asked(tmp_path):
    stream = shards(tmp_path, range(3), range(9))
    (tmp_path / "s-0.tar").unlink()
    assert stream.sizes() == [0, (tmp_path / "s-1.tar").stat().st_size]
    assert ImageStream.open(parse("https://nowhere.invalid/s-{0..2}.tar")).sizes() == [1, 1, 1]
