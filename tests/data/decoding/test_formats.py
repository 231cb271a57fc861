"""Nothing in silence: every file whose content is an image is read or named, the others are counted."""

import os
import sys
import warnings

import numpy as np
import pytest
import torch
from container_samples import flat, value, write_tar
from picture_samples import RGB, encoded
from PIL import Image

from crosslevel.data.decode import decode
from crosslevel.data.decoding import formats
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images
from crosslevel.data.sources.containers.stream import ImageStream
from crosslevel.data.uri import parse
from crosslevel.utils.errors import BadImage, SourceError

PICTURE = Image.fromarray(RGB)
READ = {
    "jpg": ("JPEG", {"quality": 95}),
    "jfif": ("JPEG", {"quality": 95}),
    "png": ("PNG", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "ppm": ("PPM", {}),
    "webp": ("WEBP", {"lossless": True}),
    "jp2": ("JPEG2000", {"irreversible": False}),
    "qoi": ("QOI", {}),
    "avif": ("AVIF", {"quality": 100}),
    "heic": ("HEIF", {"quality": 100}),
    "jxl": ("JXL", {"lossless": True}),
}


def content(ending):
    format, options = READ[ending]
    if format in formats.EXTRA:
        module, extra = formats.EXTRA[format]
        pytest.importorskip(module, reason=f"needs {module}: pip install 'crosslevel[{extra}]'")
        formats.has_plugin(module)
    return encoded(PICTURE, format, **options)


@pytest.mark.parametrize("ending", READ)
@pytest.mark.parametrize("name", ["a.{}", "without", "a.UNKNOWN"])
def test_images_are_read_whatever_their_name(tmp_path, ending, name):
    data = content(ending)
    assert formats.format_of(data[: formats.HEAD]) == READ[ending][0]
    (tmp_path / name.format(ending)).write_bytes(data)
    (tmp_path / "b.png").write_bytes(encoded(PICTURE, "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        images = open_images(tmp_path)
    assert sorted(images.paths) == sorted([name.format(ending), "b.png"])
    image = images[list(images.paths).index(name.format(ending))][0]
    assert image.shape == (3, 37, 52)
    far = (image.permute(1, 2, 0).numpy().astype(int) - RGB).__abs__().mean()
    assert far <= (25 if ending == "gif" else 4)


def test_other_files_are_counted_in_one_line_and_hidden_ones_are_not(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(PICTURE, "JPEG"))
        (tmp_path / "sub" / f"{i}.TXT").write_text("a caption")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 20)
    (tmp_path / "README").write_text("P5 is no image here, and BM neither")
    (tmp_path / "BM.strange").write_text("BM, a word that begins like a bitmap")
    (tmp_path / ".hidden.jpg").write_bytes(encoded(PICTURE, "JPEG"))
    (tmp_path / "._0.jpg").write_bytes(bytes(100))
    os.symlink(tmp_path / "Thumbs.db", tmp_path / "link.db")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")
    for _ in range(2):  # found, and remembered
        with pytest.warns(UserWarning, match="left alone") as caught:
            images = open_images(tmp_path)
        assert [str(line.message) for line in caught] == [
            f"{tmp_path}: left alone: 3 .txt, 2 .db, 1 without an ending, 1 .strange"
        ]
        assert list(images.paths) == ["0.jpg", "1.jpg", "2.jpg"]


def test_only_files_of_unknown_endings_are_opened(tmp_path, monkeypatch):
    for name in ("0.jpg", "1.heic", "2.txt", "3.json", "4.mp4", "5.nef"):
        (tmp_path / name).write_bytes(b"II*\0" + bytes(60))
    for name in ("6.unknown", "7"):
        (tmp_path / name).write_bytes(encoded(PICTURE, "TIFF"))
    opened, own = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(os.path.basename(path)) or own(path, *a, **k))
    with pytest.warns(UserWarning, match=r"left alone: 1 .json, 1 .mp4, 1 .nef, 1 .txt"):
        images = open_images(f"{tmp_path}")
    assert sorted(name for name in opened if (tmp_path / name).exists()) == ["6.unknown", "7"]
    assert list(images.paths) == ["0.jpg", "1.heic", "6.unknown", "7"]


@pytest.mark.parametrize(("ending", "extra"), [("heic", "heic"), ("jxl", "jxl")])
def test_a_format_whose_package_is_missing_is_named_with_what_to_install(monkeypatch, ending, extra):
    head = {"heic": b"\0\0\0\x18ftypheic" + bytes(200), "jxl": b"\xff\x0a" + bytes(200)}[ending]
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, name, None)
    formats.has_plugin.cache_clear()
    try:
        with pytest.raises(BadImage, match=rf"a {extra.upper()} image: pip install 'crosslevel\[{extra}\]'"):
            decode(bytearray(head), "a")
    finally:
        formats.has_plugin.cache_clear()


def frames(count, size=(8, 6)):
    return [Image.new("RGB", size, (40 * i + 20, 40 * i + 20, 40 * i + 20)) for i in range(count)]


SEVERAL = {"gif": {}, "webp": {"lossless": True}, "tiff": {}, "png": {}, "avif": {"quality": 100}}


@pytest.mark.parametrize("ending", SEVERAL)
def test_all_frames_and_pages_are_a_track_where_that_is_wanted(tmp_path, ending):
    first, *others = frames(4)
    name = "a" if ending == "tiff" else f"a.{ending}"
    first.save(tmp_path / name, ending.upper(), save_all=True, append_images=others, **SEVERAL[ending])
    frames(1)[0].save(tmp_path / "b.jpg")
    images = open_images(tmp_path)
    assert list(images.paths) == [name, "b.jpg"]
    images = open_images(f"{tmp_path},pages=all")
    assert list(images.paths) == [f"{name}#{i}" for i in range(1, 5)] + ["b.jpg"]
    assert images.tracks.tolist() == [0, 0, 0, 0, 1]
    assert [round(float(image.float().mean()) / 40 - 0.5) for image, _ in images] == [0, 1, 2, 3, 0]
    assert len(open_images(f"{tmp_path},pages=all@frames=2")) == 3
    bad_files = images.bad_files()
    assert sum(len(b.index) for b in EvalBatches(images, 2, 6, bad_files=bad_files, workers=0)) == 5
    assert images.identity() != open_images(tmp_path).identity()


def test_pages_of_containers_are_refused_in_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", flat(0)), ("1.png", flat(1))])
    with pytest.raises(SourceError, match="pages=all is for folders and lists"):
        open_images(f"{tmp_path}/a.tar,pages=all")


def test_members_of_shards_are_told_by_content_too(tmp_path):
    members = [("0.png", flat(0)), ("1.image", flat(1)), ("1.cls", b"1"), ("2", flat(2)), ("3.odd", b"no image" * 9)]
    members += [("4.gif", encoded(Image.fromarray(np.full((4, 6), 4, np.uint8)), "GIF")), ("5.txt", flat(5))]
    write_tar(tmp_path / "a.tar", members)
    images = open_images(tmp_path / "a.tar")
    assert list(images.paths) == ["a.tar/0.png", "a.tar/1.image", "a.tar/2", "a.tar/4.gif"]
    assert [value(image) for image, _ in images] == [0, 1, 2, 4]
    stream = ImageStream.open(parse(f"stream:{tmp_path}/a.tar"))
    found = dict(stream.read([0], []))
    assert list(found) == list(images.paths)
    for i, data in enumerate(found.values()):
        assert torch.equal(decode(bytearray(data), "x"), images[i][0])
