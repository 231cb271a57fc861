"""Decoding against Pillow, against pixels written by the test, and against damaged files."""

import io
import os
import re
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crosslevel.images.health import PIXEL_LIMIT, BadFiles, BadImage, decode, read_image

RAMP = (np.indices((37, 52)).sum(0) * 2 + 20).astype(np.uint8)
RGB = np.stack([RAMP, 255 - RAMP, np.roll(RAMP, 9, 1)], -1)
DEEP = (np.arange(37 * 52, dtype=np.uint32).reshape(37, 52) * 34 % 65536).astype(np.uint16)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(data, **options):
    image = decode(bytearray(data), "x", **options)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    return image.permute(1, 2, 0).numpy()


def gray3(array):
    return np.repeat(np.asarray(array)[..., None], 3, -1)


def scaled(deep):
    return np.round(deep.astype(np.float64) * 255 / 65535).astype(np.uint8)


def png(array, color, size=None):
    """A 16-bit PNG of (H, W, C) written by hand, as Pillow writes none in color; ``size`` is (W, H)."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    width, height = size or (array.shape[1], array.shape[0])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("PPM", {}),
    ],
)
@pytest.mark.parametrize("array", [RGB, RAMP], ids=["color", "gray"])
def test_lossless_formats_give_the_pixels_that_were_written(format, options, array):
    want = array if array.ndim == 3 else gray3(array)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(array), format, **options)), want)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("array", [RGB, RAMP], ids=["color", "gray"])
def test_jpeg_equals_pillow(array, progressive, subsampling):
    image = Image.fromarray(array)
    options = {"subsampling": subsampling} if array.ndim == 3 else {}
    data = encoded(image, "JPEG", progressive=progressive, quality=90, **options)
    # Two builds of libjpeg may round the inverse transform differently by one.
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded(data) - want).max() <= 1


def test_lossy_webp_equals_pillow():
    data = encoded(Image.fromarray(RGB), "WEBP", quality=80)
    np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(format):
    got = decoded(encoded(Image.fromarray(DEEP), format))
    np.testing.assert_array_equal(got, gray3(scaled(DEEP)))
    assert len(np.unique(got)) > 200


def test_16_bit_tiff_of_the_other_byte_order():
    image = Image.fromarray(DEEP.astype(">u2").view(np.uint16))
    big = Image.frombytes("I;16B", image.size, DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(decoded(encoded(big, "TIFF")), gray3(scaled(DEEP)))


def test_16_bit_color_png():
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    # The high byte is at most one level from the scaled value.
    assert np.abs(decoded(png(deep, 2)).astype(int) - scaled(deep)).max() <= 1


def test_16_bit_transparency_lies_on_white():
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1], np.roll(DEEP, 99)], -1)
    alpha = deep[..., 3:] / 65535
    want = np.round((deep[..., :3] / 65535 * alpha + 1 - alpha) * 255)
    # Color and alpha are both cut to their high bytes.
    assert np.abs(decoded(png(deep, 6)) - want).max() <= 2
    gray = deep[..., [0, 3]]
    want = np.round((gray[..., :1] / 65535 * alpha + 1 - alpha) * 255)
    assert np.abs(decoded(png(gray, 4)) - want).max() <= 2


def test_16_bit_color_ppm():
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    data = b"P6 52 37 65535\n" + deep.astype(">u2").tobytes()
    np.testing.assert_array_equal(decoded(data), scaled(deep))


@pytest.mark.parametrize("top", [100, 255, 1000, 4095])
def test_ppm_scales_by_its_own_maximum(top):
    deep = (DEEP % (top + 1)).astype(np.uint16)
    kind = ">u2" if top > 255 else "u1"
    got = decoded(b"P5 52 37 %d\n" % top + deep.astype(kind).tobytes())
    assert np.abs(got - gray3(deep * 255.0 / top)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_1_bit(format):
    bits = RAMP > 100
    got = decoded(encoded(Image.fromarray(bits), format))
    np.testing.assert_array_equal(got, gray3(bits * np.uint8(255)))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_palette(format):
    palette = Image.fromarray(RGB).quantize(16)
    want = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(palette, format)), want)


def test_palette_with_one_transparent_color():
    palette = Image.fromarray(RGB).quantize(16)
    want = np.asarray(palette.convert("RGB")).copy()
    want[np.asarray(palette) == 3] = 255
    for format in ("PNG", "GIF"):
        np.testing.assert_array_equal(decoded(encoded(palette, format, transparency=3)), want)


def test_palette_with_degrees_of_transparency():
    palette = Image.fromarray(RGB).quantize(16)
    degrees = bytes(range(0, 256, 17))
    alpha = np.frombuffer(degrees, np.uint8)[np.asarray(palette)][..., None] / 255
    want = np.asarray(palette.convert("RGB")) * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(encoded(palette, "PNG", transparency=degrees)) - want).max() <= 1


@pytest.mark.parametrize("array", [RGB, RAMP], ids=["color", "gray"])
def test_png_with_a_transparent_color_key(array):
    key = tuple(int(v) for v in array[0, 0]) if array.ndim == 3 else int(array[0, 0])
    want = (array if array.ndim == 3 else gray3(array)).copy()
    want[(want == np.asarray(key)).all(-1)] = 255
    got = decoded(encoded(Image.fromarray(array), "PNG", transparency=key))
    np.testing.assert_array_equal(got, want)
    assert (got[0, 0] == 255).all()


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")])
def test_transparency_lies_on_white(mode, format):
    alpha = np.roll(RAMP, 17, 0)
    array = np.dstack([RGB if mode == "RGBA" else RAMP, alpha])
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    got = decoded(encoded(Image.fromarray(array, mode), format, **options))
    share = alpha[..., None] / 255
    color = RGB if mode == "RGBA" else gray3(RAMP)
    assert np.abs(got - (color * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("ycck", [False, True])
def test_cmyk_jpeg_as_adobe_writes_it(ycck):
    smooth = Image.fromarray(RGB).resize((52, 37))
    cmyk = smooth.convert("CMYK")
    # Pillow writes CMYK inverted with an Adobe marker of transform 0; 2 says that the first three
    # channels are YCC, so the same colors have to be written as such.
    if ycck:
        *cmy, k = (np.asarray(band).astype(np.float64) for band in cmyk.split())
        r, g, b = cmy
        y = 0.299 * r + 0.587 * g + 0.114 * b
        ycc = [255 - v for v in (y, 128 + (b - y) * 0.564, 128 + (r - y) * 0.713)]
        bands = [Image.fromarray(np.clip(np.round(v), 0, 255).astype(np.uint8)) for v in (*ycc, k)]
        data = bytearray(encoded(Image.merge("CMYK", bands), "JPEG", quality=100))
        data[data.index(b"Adobe") + 11] = 2
    else:
        data = encoded(cmyk, "JPEG", quality=100)
    assert np.abs(decoded(data).astype(int) - np.asarray(smooth)).max() <= 6


def test_cmyk_tiff():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    np.testing.assert_array_equal(decoded(encoded(cmyk, "TIFF")), np.asarray(cmyk.convert("RGB")))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF-LZW", "PNG16"])
def test_exif_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    if format == "TIFF-LZW":
        options["compression"] = "tiff_lzw"
    image = Image.fromarray(DEEP if format == "PNG16" else RGB)
    name = format.replace("-LZW", "").replace("16", "")
    plain = decoded(encoded(image, name, **options))
    got = decoded(encoded(image, name, exif=exif, **options))
    np.testing.assert_array_equal(got, UPRIGHT[orientation](plain))


@pytest.mark.parametrize("order", ["<", ">"])
def test_jpeg_orientation_in_both_byte_orders_and_after_other_segments(order):
    tag = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1) + tag + b"\0" * 4
    body = b"Exif\0\0" + tiff
    exif = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    note = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    xmp = b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note
    data = encoded(Image.fromarray(RGB), "JPEG")
    want = UPRIGHT[6](decoded(data))
    for segments in (exif, exif + xmp, xmp + exif):
        got = decoded(data[:2] + segments + data[2:])
        assert got.shape == want.shape
        assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("GIF", {})])
def test_of_several_frames_the_first(format, options):
    frames = [Image.fromarray(a).quantize(8).convert("RGB") for a in (RGB, 255 - RGB, RGB[::-1].copy())]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as several:
        assert several.n_frames == 3
    np.testing.assert_array_equal(decoded(data), np.asarray(frames[0]))


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
    bad = BadFiles()
    assert bad.summary(7) == "all 7 images could be read"
    bad.add("b.jpg", "empty file")
    bad.add("a.jpg", "truncated")
    bad.add("b.jpg", "another reason")
    bad.add("x\ny\tz\\.jpg", "not an image")
    assert len(bad) == 3
    assert "a.jpg" in bad
    assert "c.jpg" not in bad
    assert bad.summary(12406) == "skipped 3 of 12,406 images that could not be read"
    file = tmp_path / "bad_files.txt"
    bad.write(file)
    assert file.read_text() == "a.jpg\ttruncated\nb.jpg\tempty file\nx\\ny\\tz\\\\.jpg\tnot an image\n"
    assert bad.summary(12406).endswith(f"that could not be read (listed in {file})")


NAMES = st.binary(max_size=20).map(os.fsdecode) | st.text(max_size=20) | st.text("\\\n\r\tnrt", max_size=8)


@given(st.lists(NAMES, unique=True))
def test_every_path_can_be_read_back(paths):
    bad = BadFiles()
    for path in paths:
        bad.add(path, "reason")
    with tempfile.TemporaryDirectory() as folder:
        bad.write(Path(folder) / "bad_files.txt")
        lines = (Path(folder) / "bad_files.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    assert lines.pop() == ""
    plain = {"\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\t": "\t"}
    names = [re.sub(r"\\.", lambda found: plain[found[0]], line.removesuffix("\treason")) for line in lines]
    assert names == sorted(paths)
