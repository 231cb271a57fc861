"""gs:// and hf:// by fsspec, from servers on loopback that speak their protocols."""

import sys

import fsspec
import pytest
from container_samples import labelled, value, write_tar
from stubs import Google, Hub, served

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.loaders.streams import StreamBatches
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.utils.errors import SourceError


@pytest.fixture(params=["gs", "hf"])
def store(request, tmp_path, monkeypatch):
    """An empty store, and the address of what is in it."""
    if request.param == "gs":
        # Not its subclass, which first asks by gRPC what kind of bucket this is.
        plain = pytest.importorskip("gcsfs.core").GCSFileSystem
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", plain)
    else:
        pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("CROSSLEVEL_RETRY_SECONDS", "0,0.05")
    monkeypatch.setenv("CROSSLEVEL_CACHE", str(tmp_path / "cache"))
    kind, home = {"gs": (Google, "gs://bucket"), "hf": (Hub, "hf://datasets/owner/name")}[request.param]
    with served(kind) as server:
        told = {
            "gs": {"endpoint_url": server.address, "token": "anon"},
            "hf": {"endpoint": server.address, "token": False},
        }
        fsspec.config.conf[request.param] = told[request.param]
        fsspec.get_filesystem_class(request.param).clear_instance_cache()
        server.home = home
        yield server
        del fsspec.config.conf[request.param]


def fill(store, folder, shards=3):
    for i in range(shards):
        file = write_tar(folder / f"s-{i}.tar", labelled(range(10 * i, 10 * i + 10)))
        store.files[f"s-{i}.tar"] = file.read_bytes()


def test_shards_are_streamed_whatever_breaks_off(store, tmp_path):
    fill(store, tmp_path)
    bad_files = BadFiles()
    stream = open_images(f"{store.home}/s-{{0..2}}.tar", streams=True)
    store.cut = 3
    batches = StreamBatches(
        stream, 5, 30, seed=0, bad_files=bad_files, crops=lambda image, generator: image.unsqueeze(0)
    )
    assert sorted(int(n) for batch in batches for n in batch.images[:, 0, 0, 0, 0]) == list(range(30))
    assert not len(bad_files)
    assert store.cut == 0


def test_shards_are_found_by_a_pattern_and_copied_once(store, tmp_path):
    fill(store, tmp_path)
    store.files["other.txt"] = b"no shard"
    source = f"{store.home}/s-*.tar"
    images = open_images(source)
    assert [value(images[i][0]) for i in range(30)] == list(range(30))
    assert images.labels.tolist() == [i % 3 for i in range(30)]
    assert len(open_images(f"{store.home}/s-{{0..1}}.tar")) == 20


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_a_pack_is_read_as_it_was_made(store, tmp_path):
    write_tar(tmp_path / "x.tar", labelled(range(12)))
    folder = pack(str(tmp_path / "x.tar"), output=str(tmp_path / "packed"), size=4, quiet=True)
    for file in folder.rglob("*"):
        if file.is_file():
            store.files[f"packed/{file.relative_to(folder)}"] = file.read_bytes()
    images = open_images(f"{store.home}/packed")
    assert [value(images[i][0]) for i in range(12)] == list(range(12))


def test_what_is_not_there_is_one_line(store):
    for name in ("none.tar", "none-*.tar"):
        with pytest.raises(SourceError) as caught:
            open_images(f"{store.home}/{name}")
        assert f"{store.home}/{name}: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "package"), [("gs://b/x.tar", "gcsfs"), ("hf://datasets/o/n/x.tar", "huggingface_hub")]
)
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, address, package):
    protocol = address.partition(":")[0]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(SourceError, match=rf"^{address}: .*: pip install 'crosslevel\[remote\]' {package}$"):
        open_images(address, streams=True)
