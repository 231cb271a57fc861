"""Damaged and oversized files are bad images, and the list of them can be read back."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_samples import DEEP, RAMP, RGB, decoded, encoded, png
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.decode import PIXEL_LIMIT, decode, read_image
from crosslevel.utils.errors import BadImage

WHOLE = {
    "jpeg": encoded(Image.fromarray(RGB), "JPEG", quality=90),
    "gray jpeg": encoded(Image.fromarray(RAMP), "JPEG", quality=90),
    "progressive jpeg": encoded(Image.fromarray(RGB), "JPEG", progressive=True),
    "cmyk jpeg": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "png": encoded(Image.fromarray(RGB), "PNG"),
    "palette png": encoded(Image.fromarray(RGB).quantize(16), "PNG"),
    "16-bit png": encoded(Image.fromarray(DEEP), "PNG"),
    "webp": encoded(Image.fromarray(RGB), "WEBP"),
    "lossless webp": encoded(Image.fromarray(RGB), "WEBP", lossless=True),
    "tiff": encoded(Image.fromarray(RGB), "TIFF"),
    "lzw tiff": encoded(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"),
    "bmp": encoded(Image.fromarray(RGB), "BMP"),
    "ppm": encoded(Image.fromarray(RGB), "PPM"),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_cut_file_is_bad(kind, share):
    data = WHOLE[kind]
    with pytest.raises(BadImage) as caught:
        decode(bytearray(data[: max(10, int(len(data) * share))]), "photos/cut")
    assert caught.value.path == "photos/cut"
    assert 0 < len(caught.value.reason) < 200
    assert "\n" not in caught.value.reason


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.integers(1, 400))
def test_wherever_a_file_is_cut_it_is_bad_or_whole(kind, missing):
    data = WHOLE[kind]
    try:
        got = decoded(data[: max(0, len(data) - missing)])
    except BadImage:
        return
    np.testing.assert_array_equal(got, decoded(data))


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if "jpeg" in kind or "png" in kind])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_file_whose_end_is_zeros_is_bad(kind, share):
    data = WHOLE[kind]
    kept = int(len(data) * share)
    with pytest.raises(BadImage):
        decode(bytearray(data[:kept] + bytes(len(data) - kept)), "x")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damage_anywhere_ends_in_a_picture_or_a_bad_image(kind, draw):
    data = bytearray(WHOLE[kind])
    for _ in range(draw.draw(st.integers(1, 5))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        got = decoded(data, max_pixels=10**6)
    except BadImage:
        return
    assert got.shape[2] == 3
    assert got.shape[0] * got.shape[1] <= 10**6


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"P6 "]))
def test_noise_is_bad(noise, start):
    with pytest.raises(BadImage):
        decode(bytearray(start + noise), "x", max_pixels=10**4)


def test_reasons(tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, reason in {
        "text.jpg": "not an image",
        "empty.png": "empty file",
        "missing.png": "cannot be opened: No such file",
        "folder.png": "cannot be opened: Is a directory",
    }.items():
        with pytest.raises(BadImage, match=reason) as caught:
            read_image(str(tmp_path / name), name)
        assert caught.value.path == name
        assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("kind", WHOLE)
def test_the_pixel_limit(kind):
    assert decoded(WHOLE[kind], max_pixels=37 * 52).shape == (37, 52, 3)
    with pytest.raises(BadImage, match=r"more than 1,923 pixels"):
        decode(bytearray(WHOLE[kind]), "x", max_pixels=37 * 52 - 1)


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = png(np.zeros((1, 1, 1)), 0, size=(60_000, 60_000))
    with pytest.raises(BadImage, match=f"more than {PIXEL_LIMIT:,} pixels"):
        decode(bytearray(bomb), "x")


def test_pixels_without_an_agreed_range_are_bad():
    for array in (RAMP.astype(np.float32), DEEP.astype(np.int32) * 100_000 // 3):
        with pytest.raises(BadImage, match="no agreed range"):
            decode(bytearray(encoded(Image.fromarray(array), "TIFF")), "x")


def test_bad_files(tmp_path):
    bad_files = BadFiles()
    assert bad_files.summary(7) == "all 7 images could be read"
    bad_files.add("b.jpg", "empty file")
    bad_files.add("a.jpg", "truncated")
    bad_files.add("b.jpg", "another reason")
    bad_files.add("x\ny\tz\\.jpg", "not an image")
    assert len(bad_files) == 3
    assert "a.jpg" in bad_files
    assert "c.jpg" not in bad_files
    assert bad_files.summary(12406) == "skipped 3 of 12,406 images that could not be read"
    file = tmp_path / "bad_files.txt"
    bad_files.write(file)
    assert file.read_text() == "a.jpg\ttruncated\nb.jpg\tempty file\nx\\ny\\tz\\\\.jpg\tnot an image\n"
    assert bad_files.summary(12406).endswith(f"that could not be read (listed in {file})")


def test_a_shard_counts_as_no_image(tmp_path):
    bad_files = BadFiles()
    bad_files.leave_out({"a.tar": "truncated"})
    assert bad_files.summary(12406) == "1 file is damaged, with images missing"
    bad_files.leave_out({"a.tar": "truncated", "b.tar": "truncated"})
    bad_files.add("b.jpg", "empty file")
    assert len(bad_files) == 3
    expected = "skipped 1 of 12,406 images that could not be read; 2 files are damaged, with images missing"
    assert bad_files.summary(12406) == expected
    bad_files.write(tmp_path / "bad_files.txt")
    assert bad_files.summary(12406) == f"{expected} (listed in {tmp_path / 'bad_files.txt'})"


NAMES = st.binary(max_size=20).map(os.fsdecode) | st.text(max_size=20) | st.text("\\\n\r\tnrt", max_size=8)


@given(st.lists(NAMES, unique=True))
def test_every_path_can_be_read_back(paths):
    bad_files = BadFiles()
    for path in paths:
        bad_files.add(path, "reason")
    with tempfile.TemporaryDirectory() as folder:
        bad_files.write(Path(folder) / "bad_files.txt")
        lines = (Path(folder) / "bad_files.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    assert lines.pop() == ""
    plain = {"\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\t": "\t"}
    names = [re.sub(r"\\.", lambda found: plain[found[0]], line.removesuffix("\treason")) for line in lines]
    assert names == sorted(paths)


def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jpg").symlink_to("pipe")
    with pytest.raises(BadImage, match="not a file, but a pipe or a device"):
        read_image(str(tmp_path / "link.jpg"))
