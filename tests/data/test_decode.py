"""Decoding against Pillow and against pixels written by the test."""

import io
import struct

import numpy as np
import pytest
from picture_samples import DEEP, RAMP, RGB, decoded, encoded, png
from PIL import Image


def gray3(array):
    return np.repeat(np.asarray(array)[..., None], 3, -1)


def scaled(deep):
    return np.round(deep.astype(np.float64) * 255 / 65535).astype(np.uint8)


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
