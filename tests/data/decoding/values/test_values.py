"""Images of one, four and more channels: what every format becomes, compared with Pillow, NumPy and tifffile."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from crosslevel.data.decode import decode, read_image
from crosslevel.data.decoding.pillow import upright
from crosslevel.data.decoding.reading import Range, Reading
from crosslevel.data.decoding.values.lzw import unpacked
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse, read_as
from crosslevel.utils.errors import BadImage, SourceError

GRID = np.random.default_rng(0)
RGBA = GRID.integers(0, 256, (23, 17, 4), np.uint8)
BANDS = GRID.integers(0, 65536, (23, 17, 6), np.uint16)


def as_file(array, format, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return bytearray(file.getvalue())


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return bytearray(file.getvalue())


def read(data, channels, wanted=None, page=0):
    return decode(bytearray(data), "a", reading=Reading(channels=channels, range=wanted), page=page)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "QOI"])
def test_transparency_is_kept_beside_the_colours(format):
    options = {"WEBP": {"lossless": True, "exact": True}}.get(format, {})
    np.testing.assert_array_equal(hwc(read(as_file(RGBA, format, **options), 4)), RGBA)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_one_channel_is_pillows_brightness_of_what_three_are(mode, format):
    picture = Image.fromarray(RGBA).convert(mode)
    file = io.BytesIO()
    try:
        picture.save(file, format)
    except (OSError, ValueError):
        pytest.skip(f"{format} has no {mode}")
    colours = Image.fromarray(hwc(read(file.getvalue(), 3)))
    np.testing.assert_array_equal(read(file.getvalue(), 1)[0].numpy(), np.array(colours.convert("L")))


def test_images_without_transparency_are_opaque_beside_those_that_have_it():
    for data, colours in [
        (as_file(RGBA[..., :3], "PNG"), RGBA[..., :3]),
        (as_file(RGBA[..., 0], "PNG"), RGBA[..., [0, 0, 0]]),
        (as_file(RGBA[..., 0], "JPEG", quality=100), None),
        (as_npy(RGBA[..., :3]), RGBA[..., :3]),
        (as_file(RGBA[..., 0], "TIFF"), RGBA[..., [0, 0, 0]]),
    ]:
        image = hwc(read(data, 4))
        assert (image[..., 3] == 255).all()
        if colours is not None:
            np.testing.assert_array_equal(image[..., :3], colours)


def test_large_images_are_converted_in_bands_to_the_same():
    for channels in (1, 2, 4):
        in_bands = upright(Image.fromarray(RGBA), Reading(channels=channels), at_once=10, band=64)
        assert torch.equal(in_bands, read(as_file(RGBA, "PNG"), channels))


@pytest.mark.parametrize("planes", [False, True])
def test_arrays_of_16_bits_are_scaled_to_8(planes):
    array = BANDS.transpose(2, 0, 1) if planes else BANDS
    wanted = np.rint(BANDS.astype(np.float64) * 255 / 65535)
    np.testing.assert_array_equal(hwc(read(as_npy(array), 6)), wanted)
    np.testing.assert_array_equal(hwc(read(as_npy(np.asfortranarray(array)), 6)), wanted)


@pytest.mark.parametrize("kind", ["uint8", "bool", "int16", "uint32", "float16", "float32", "float64", ">i4"])
def test_arrays_of_any_kind_are_scaled_by_a_range(kind):
    values = (GRID.random((9, 8, 2)) * 100).astype(kind)
    found = hwc(read(as_npy(values), 2, Range(10, 60)))
    if kind in ("uint8", "bool"):
        np.testing.assert_array_equal(found, values * (255 if kind == "bool" else 1))
    else:
        np.testing.assert_array_equal(found, np.rint((np.clip(values.astype(float), 10, 60) - 10) * 255 / 50))


def test_what_is_no_number_is_black():
    values = np.array([[np.nan, np.inf, -np.inf, 5.0]], np.float32)
    assert read(as_npy(values), 1, Range(0, 10)).flatten().tolist() == [0, 255, 0, 128]


def test_gray_images_of_more_bits_are_scaled_by_a_range():
    values = GRID.integers(0, 5000, (8, 8)).astype(np.uint16)
    found = read(as_file(values, "PNG"), 1, Range(0, 1000))[0].numpy()
    np.testing.assert_array_equal(found, np.rint(np.clip(values, 0, 1000).astype(float) * 255 / 1000))
    with pytest.raises(BadImage, match="floating-point pixels have no agreed range: --range LOW:HIGH"):
        read(as_file(values.astype(np.float32), "TIFF"), 3)
    found = hwc(read(as_file(values.astype(np.float32), "TIFF"), 3, Range(0, 1000)))
    np.testing.assert_array_equal(found[..., 1], np.rint(np.clip(values, 0, 1000).astype(float) * 255 / 1000))


LAYOUTS = [
    {},
    {"planarconfig": "separate"},
    {"rowsperstrip": 5},
    {"tile": (16, 16)},
    {"tile": (16, 16), "planarconfig": "separate", "bigtiff": True},
    {"byteorder": ">"},
    {"compression": "deflate"},
    {"compression": "deflate", "predictor": True, "tile": (16, 32)},
    {"photometric": "miniswhite"},
]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bands_of_tiff_are_those_that_were_written(kind, layout):
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile, which writes them: pip install tifffile")
    values = (BANDS // 300).astype(kind)
    file = io.BytesIO()
    planes = layout.get("planarconfig") == "separate"
    written = values.transpose(2, 0, 1) if planes else values
    options = {"photometric": "minisblack", "planarconfig": "contig", **layout}
    if options.get("predictor") and kind.startswith("float"):
        pytest.skip("tifffile needs imagecodecs for it")
    tifffile.imwrite(file, written, **options)
    found = hwc(read(file.getvalue(), 6, Range(0, 255)))
    wanted = np.clip(values, 0, 255)
    np.testing.assert_array_equal(found, 255 - wanted if options["photometric"] == "miniswhite" else wanted)


def test_a_band_a_page_is_one_image():
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile, which writes them: pip install tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, (BANDS // 300).astype(np.uint8).transpose(2, 0, 1), photometric="minisblack")
    np.testing.assert_array_equal(hwc(read(file.getvalue(), 6)), BANDS // 300)
    with pytest.raises(BadImage, match="1 channel, not 5: --channels 1 reads it"):
        read(file.getvalue(), 5)


def tiff(values, packed=1, predictor=1, turned=1, order="<", changes=()):
    """A TIFF of one strip, written by hand: what a test needs beside tifffile, and what is damaged."""
    height, width, samples = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if isinstance(packed, int) else packed[1]
    code = packed if isinstance(packed, int) else packed[0]
    data = zlib.compress(data) if packed == 8 else data
    tags = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [8 * values.itemsize]), 259: (3, [code]), 262: (3, [1]),
        273: (4, [8]), 274: (3, [turned]), 277: (3, [samples]), 278: (3, [height]), 279: (4, [len(data)]),
        317: (3, [predictor]), 339: (3, [kind]),
    } | dict(changes)  # fmt: skip
    body = struct.pack(order + "H", len(tags))
    for tag, (type, numbers) in sorted(tags.items()):
        body += struct.pack(order + "HHI", tag, type, len(numbers))
        body += struct.pack(order + {3: "H", 4: "I"}[type], numbers[0]).ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + body + bytes(4)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_floats_in_pieces_are_put_together(kind):
    values = GRID.normal(size=(5, 7, 2)).astype(kind)
    rows = values.astype(values.dtype.newbyteorder(">")).reshape(5, 14, 1).view(np.uint8).transpose(0, 2, 1)
    rows = rows.reshape(5, -1, 2)
    less = np.diff(rows, axis=1, prepend=np.zeros((5, 1, 2), np.uint8))
    data = tiff(values, packed=(8, zlib.compress(less.tobytes())), predictor=3)
    wanted = np.rint((np.clip(values.astype(float), -2, 2) + 2) * 255 / 4)
    np.testing.assert_array_equal(hwc(read(data, 2, Range(-2, 2))), wanted)


@pytest.mark.parametrize("turned", range(1, 9))
def test_bands_are_turned_as_pillow_turns_images(turned):
    picture = Image.fromarray(RGBA[..., :3])
    exif = Image.Exif()
    exif[274] = turned
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    upright = hwc(read(file.getvalue(), 3))
    data = tiff(np.concatenate([RGBA[..., :3]] * 2, 2), turned=turned)
    np.testing.assert_array_equal(hwc(read(data, 6))[..., :3], upright)


@pytest.mark.parametrize("size", [1, 300, 5000, 70_000])
def test_lzw_is_undone_as_pillow_writes_it(size):
    values = (np.arange(size) // 3 % 251).astype(np.uint8).reshape(1, -1)
    data = as_file(values, "TIFF", compression="tiff_lzw")
    with Image.open(io.BytesIO(data)) as opened:
        (offset,), (length,) = opened.tag_v2[273], opened.tag_v2[279]
    assert unpacked(memoryview(data)[offset : offset + length], size) == values.tobytes()
    np.testing.assert_array_equal(hwc(read(data, 4))[..., 0], values)


SIX = np.zeros((4, 4, 6), np.uint8)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (as_npy(SIX)[:-1], "truncated: 95 bytes for an array"),
        (as_npy(SIX) + b"1", "broken: 97 bytes for an array"),
        (b"\x93NUMPY\x01\x00\x04\x00nope", "broken: no array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "broken: no array"),
        (as_npy(np.zeros((2, 2), [("a", "u1"), ("b", "f4")])), "an array of"),
        (as_npy(np.zeros((4, 4, 6), "c8")), "complex64 are no picture"),
        (as_npy(np.zeros((4, 4, 6))), "floating-point pixels have no agreed range"),
        (as_npy(np.zeros((4, 4, 5), np.uint8)), "5 channels, not 6: --channels 5 reads it"),
        (as_npy(np.zeros(6, np.uint8)), r"an array of uint8 \(6,\), not \(H, W\)"),
        (as_npy(np.zeros((0, 4, 6), np.uint8)), "a picture of 4 x 0 pixels"),
        (tiff(SIX)[:60], "truncated: a tag lies behind the end"),
        (b"II*\0" + struct.pack("<I", 8), "truncated: a tag"),
        (tiff(SIX, changes={256: (4, [2**31])}), "pixels"),
        (tiff(SIX, changes={257: (4, [2**31]), 256: (4, [1])}), "pixels"),
        (tiff(SIX, changes={273: (4, [2**31])}), "ends behind the file"),
        (tiff(SIX, changes={279: (4, [2])}), "fewer values than its pixels"),
        (tiff(SIX, changes={278: (4, [1])}), "1 strips or tiles, where 4 would be"),
        (tiff(SIX, changes={278: (4, [0])}), "strips or tiles without pixels"),
        (tiff(SIX, changes={258: (3, [12])}), "bands of 12 bits"),
        (tiff(SIX, changes={259: (3, [7])}), "bands in compression 7 are not read"),
        (tiff(SIX, changes={262: (3, [3])}), "photometric interpretation 3"),
        (tiff(SIX, changes={277: (3, [60_000])}), "60000 channels, not 6"),
        (tiff(SIX, changes={322: (4, [2**20]), 323: (4, [2**20]), 324: (4, [8]), 325: (4, [9])}), "far larger"),
        (tiff(SIX, packed=(8, b"no")), "damaged: "),
        (tiff(SIX, packed=(5, b"\xff\xff\xff\xff")), "an LZW code that nothing stands for|fewer values"),
        (as_file(RGBA[..., :3], "PNG"), "3 channels, not 6"),
        (as_file(RGBA[..., :3], "JPEG"), "3 channels, not 6"),
    ],
)
def test_what_cannot_be_read_is_named(data, what):
    with pytest.raises(BadImage, match=what):
        read(data, 6)


def test_a_strip_that_would_fill_the_memory_is_not_unpacked_further_than_the_image_goes():
    bomb = zlib.compress(bytes(20_000_000), 1)
    assert len(bomb) < 100_000
    image = read(tiff(SIX, packed=(8, bomb)), 6)
    assert image.shape == (6, 4, 4)
    with pytest.raises(BadImage, match="more than 178,956,970 pixels"):
        read(tiff(SIX, packed=(8, bomb), changes={256: (4, [20_000]), 257: (4, [20_000])}), 6)
    with pytest.raises(BadImage, match=r"take about .* GB to decode"):
        read(tiff(SIX, packed=(8, bomb), changes={256: (4, [6000]), 257: (4, [6000]), 277: (3, [6])}), 6)


@pytest.mark.parametrize("packed", [1, 8])
def test_any_byte_of_a_tiff_may_be_wrong(packed):
    """Whatever is made of a damaged file, it is an image or a bad one."""
    whole, draws = tiff(RGBA, packed), np.random.default_rng(2)
    for _ in range(150):
        data = bytearray(whole)
        for at in draws.integers(len(data) - 160 if packed == 1 else 0, len(data), 3):
            data[at] = draws.integers(256)
        try:
            image = read(data, 4)
        except BadImage:
            continue
        assert image.shape[0] == 4


def test_a_chain_of_pages_that_bites_its_tail_ends():
    data = bytearray(tiff(np.zeros((4, 4, 1), np.uint8)))
    (where,) = struct.unpack_from("<I", data, 4)
    data[-4:] = struct.pack("<I", where)  # the next page is the same one
    with pytest.raises(BadImage, match="1 channel, not 1000"):
        read(data, 1000)


def test_arrays_in_a_folder_are_images_where_somebody_says_how_to_read_them(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", BANDS)
        Image.fromarray(RGBA).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="left alone: 3 .npy"):
        assert len(open_images(tmp_path)) == 3
    images = open_images(f"{tmp_path},channels=6")
    assert (len(images), images.channels, images.name) == (6, 6, f"{tmp_path},channels=6")
    assert images[0][0].shape == (6, 23, 17)
    with pytest.raises(BadImage):
        _ = images[1]
    part = open_images(f"{tmp_path},channels=6@repeat=2")
    assert part.channels == 6
    assert images.identity() != open_images(f"{tmp_path},channels=4").identity()


def test_how_images_are_read_is_written_after_the_source():
    source = parse("photos/,range=-160:240,channels=1@frames=5")
    assert (source.reading.channels, source.reading.range) == (1, Range(-160, 240))
    assert source.text == "photos/,channels=1,range=-160:240@frames=5"
    assert read_as("photos/,channels=4", {"range": "0:1e4"}) == "photos/,channels=4,range=0:10000"
    for text, what in [
        ("photos/,channels=0", "channels=0: needs a whole number from 1 to 1024"),
        ("photos/,channels=rgb", "channels=rgb: needs a whole number"),
        ("photos/,range=5", "range=5: needs the smallest and the largest value"),
        ("photos/,range=5:5", "range=5:5: needs"),
        ("photos/,range=0:inf", "range=0:inf: needs"),
    ]:
        with pytest.raises(SourceError, match=what):
            parse(text)
    in_memory = "turntable,classes=2,objects=4,frames=1,imbalance=1,size=8"
    with pytest.raises(SourceError, match=f"not those of {in_memory}, which has 3"):
        open_images(f"{in_memory},channels=1")


def test_a_file_is_read_as_its_source_is(tmp_path):
    np.save(tmp_path / "a.npy", BANDS)
    assert read_image(str(tmp_path / "a.npy"), reading=Reading(channels=6)).shape == (6, 23, 17)
    with pytest.raises(BadImage, match="6 channels, not 3: --channels 6 reads it"):
        read_image(str(tmp_path / "a.npy"))
