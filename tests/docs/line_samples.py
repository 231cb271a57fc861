"""What the documentation's commands find outside a user's folder: weights by name, shards, a bucket, a browser.

Weights by name are random ones of small networks: timm's own architectures with few and narrow blocks.
"""

import functools
import http.server
import logging
import signal
import threading
import urllib.request
from contextlib import contextmanager
from typing import NamedTuple

import fsspec
import pytest
from clip_samples import write_clip
from hub_samples import CONVNEXT, VIT, Hub, weights
from timm.models import save_for_hf

NARROW = {
    "vit_small_patch14_dinov2": VIT,
    "vit_large_patch14_dinov2": VIT,
    "vit_small_patch16_224": VIT,
    "vit_giant_patch14_224": VIT,
    "vit_base_patch16_clip_224": VIT,
    "convnext_tiny": CONVNEXT,
}
"""The sizes that these networks of timm's have here."""
SERVED = ("vit_small_patch14_dinov2.lvd142m", "vit_large_patch14_dinov2.lvd142m", "convnext_tiny.in12k")
CLIP = "vit_base_patch16_clip_224.openai"


class Outside(NamedTuple):
    """The hub, and the address that stands for https://host."""

    hub: Hub
    address: str


def put_weights(hub, folder):
    """On the hub what the pages name, and a file of weights in the folder."""
    for name in SERVED:
        hub.put(f"timm/{name}", model__safetensors=weights(name)[1])
    write_clip(folder / "clip", name=CLIP.partition(".")[0], arguments={})
    files = ("open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json")
    hub.files[f"timm/{CLIP}"] = {name: (folder / "clip" / name).read_bytes() for name in files}
    model, _ = weights("test_vit", 1, num_classes=0, img_size=64)
    save_for_hf(model, folder / "theirs", safe_serialization=True)
    files = ("config.json", "model.safetensors")
    hub.files["owner/name"] = {name: (folder / "theirs" / name).read_bytes() for name in files}
    (folder / "mine.safetensors").write_bytes(weights("vit_small_patch16_224", 2)[1])


@contextmanager
def web(folder):
    """The address of a server of the files in the folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def bucket(shards):
    """While the block lasts, s3://bucket has these shards; its store."""
    server = pytest.importorskip("moto.server", reason="the S3 server is of pip install 'crosslevel[test]'")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    address = f"http://127.0.0.1:{moto.get_host_and_port()[1]}"
    fsspec.config.conf["s3"] = {"endpoint_url": address, "key": "key", "secret": "secret"}
    s3fs.S3FileSystem.clear_instance_cache()
    store = fsspec.filesystem("s3", use_listings_cache=False)
    if store.exists("bucket"):  # moto keeps what a former server of this process had
        store.rm("bucket", recursive=True)
    store.mkdir("bucket")
    for i, shard in enumerate(shards):
        store.put(str(shard), f"bucket/photos-{i:03}.tar")
    yield store
    store.rm("bucket", recursive=True)
    del fsspec.config.conf["s3"]
    s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


class Browser:
    """Stands in for `webbrowser.open`: looks at the page once, and presses Ctrl-C."""

    def __init__(self):
        self.pages = []

    def __call__(self, address):
        threading.Thread(target=self._look, args=(address,), daemon=True).start()
        return True

    def _look(self, address):
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                self.pages.append(answer.read().decode())
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@contextmanager
def keyboard():
    """Ctrl-C interrupts, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
