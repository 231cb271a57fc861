"""DICOM: pixels, windows and frames as pydicom and PS3.3 have them; what is broken or hostile is named."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from crosslevel.data.decode import count_pages, decode
from crosslevel.data.decoding.reading import Range, Reading
from crosslevel.data.decoding.values import dicom
from crosslevel.data.open import open_images
from crosslevel.utils.errors import BadImage

pydicom = pytest.importorskip("pydicom", reason="needs pydicom: pip install 'crosslevel[dicom]'")
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut

GRID = np.random.default_rng(0)
CT = GRID.integers(-1000, 2000, (19, 23)).astype(np.int16)
BOTH = {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1}


def written(values, syntax=dicom.PLAIN[1], encoded=None, **elements):
    """A file of these values; ``encoded`` are its frames where they are compressed."""
    values = np.asarray(values)
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    samples = elements.get("SamplesPerPixel", 1)
    data.Rows, data.Columns = values.shape[-3:-1] if samples > 1 and values.ndim > 2 else values.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(values.dtype.kind == "i")
    data.PlanarConfiguration = 0
    for name, value in (BOTH | elements).items():
        setattr(data, name, value)
    order = ">" if syntax == dicom.PLAIN[2] else "<"
    plain = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data.PixelData = plain if encoded is None else encapsulate(encoded)
    data["PixelData"].VR = "OW" if values.itemsize > 1 else "OB"
    if encoded is not None:
        data["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return bytearray(file.getvalue())


def read(data, channels=1, wanted=None, page=0):
    return decode(bytearray(data), "a.dcm", reading=Reading(channels=channels, range=wanted), page=page)


def stretched(x, low, high):
    return np.rint((np.clip(np.asarray(x, float), low, high) - low) * 255 / (high - low))


@pytest.mark.parametrize("syntax", dicom.PLAIN)
def test_gray_values_are_in_the_modalitys_units_and_a_range_is_of_these(syntax):
    data = written(CT, syntax, RescaleSlope=2, RescaleIntercept=-500)
    wanted = stretched(CT * 2.0 - 500, -160, 240)
    np.testing.assert_array_equal(read(data, wanted=Range(-160, 240))[0], wanted)
    np.testing.assert_array_equal(read(data, 3, Range(-160, 240))[2], wanted)
    assert (read(data, 4, Range(-160, 240))[3] == 255).all()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_without_a_range_the_files_first_window_is_used(function):
    x = CT.astype(float)
    given = {} if function is None else {"VOILUTFunction": function}
    data = written(CT, WindowCenter=[40, 500], WindowWidth=[400, 1000], RescaleSlope=1, RescaleIntercept=0, **given)
    if function == "SIGMOID":
        wanted = 255 / (1 + np.exp(-4 * (x - 40) / 400))
    elif function == "LINEAR_EXACT":
        wanted = np.clip((x - 40) / 400 + 0.5, 0, 1) * 255
    else:
        wanted = np.select([x <= 39.5 - 199.5, x > 39.5 + 199.5], [0, 255], ((x - 39.5) / 399 + 0.5) * 255)
    assert np.abs(read(data)[0].numpy() - wanted).max() <= 0.5 + 1e-9


def test_without_a_window_the_frame_goes_from_its_smallest_to_its_largest_value():
    np.testing.assert_array_equal(read(written(CT))[0], stretched(CT, CT.min(), CT.max()))
    assert set(read(written(np.full((4, 4), 7, np.uint16))).flatten().tolist()) == {0}
    np.testing.assert_array_equal(
        read(written(CT, WindowCenter=5, WindowWidth=0))[0], stretched(CT, CT.min(), CT.max())
    )


def test_monochrome1_is_turned_round():
    dark = read(written(CT, PhotometricInterpretation="MONOCHROME1"), wanted=Range(0, 100))[0].numpy()
    np.testing.assert_array_equal(dark, 255 - stretched(CT, 0, 100))
    both = read(written(CT, PhotometricInterpretation="MONOCHROME1"), 2, Range(0, 100)).numpy()
    np.testing.assert_array_equal(both[0], dark)
    assert (both[1] == 255).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_colours_and_palettes(bits):
    colours = GRID.integers(0, 2**bits, (9, 11, 3)).astype(f"u{bits // 8}")
    data = written(colours, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    np.testing.assert_array_equal(read(data, 3).permute(1, 2, 0), stretched(colours, 0, 2**bits - 1))
    index = GRID.integers(0, 4, (9, 11)).astype(np.uint8)
    tables = {}
    for name in ("Red", "Green", "Blue"):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        tables[f"{name}PaletteColorLookupTableData"] = GRID.integers(0, 2**bits, 4).astype(f"u{bits // 8}").tobytes()
    data = written(index, PhotometricInterpretation="PALETTE COLOR", **tables)
    coloured = apply_color_lut(index, pydicom.dcmread(io.BytesIO(data)))
    np.testing.assert_array_equal(read(data, 3).permute(1, 2, 0), stretched(coloured, 0, 2**bits - 1))


def rle(values):
    data = written(values)
    opened = pydicom.dcmread(io.BytesIO(data))
    opened.compress(dicom.RLE)
    file = io.BytesIO()
    opened.save_as(file, enforce_file_format=True)
    return file.getvalue()


def frame(values, format, **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, format, **options)
    return file.getvalue()


def test_compressed_frames():
    np.testing.assert_array_equal(read(rle(CT), wanted=Range(-1000, 2000))[0], stretched(CT, -1000, 2000))
    small = GRID.integers(0, 256, (32, 32), np.uint8)
    data = written(small, dicom.JPEG2000[0], [frame(small, "JPEG2000", irreversible=False, no_jp2=True)])
    np.testing.assert_array_equal(read(data, wanted=Range(0, 255))[0], small)
    jpeg = frame(small, "JPEG", quality=90)
    data = written(small, dicom.JPEG[0], [jpeg])
    np.testing.assert_array_equal(read(data, wanted=Range(0, 255))[0], np.array(Image.open(io.BytesIO(jpeg))))


def test_frames_are_pages(tmp_path):
    frames = GRID.integers(0, 256, (3, 8, 9), np.uint8)
    (tmp_path / "a.dcm").write_bytes(written(frames, NumberOfFrames=3))
    (tmp_path / "without").write_bytes(written(frames[0]))
    (tmp_path / "DICOMDIR").write_bytes(b"a list")
    assert count_pages(str(tmp_path / "a.dcm")) == 3
    with pytest.warns(UserWarning, match="left alone: 1"):
        images = open_images(f"{tmp_path},pages=all,range=0:255")
    assert list(images.paths) == ["a.dcm#1", "a.dcm#2", "a.dcm#3", "without"]
    for i, values in enumerate([*frames, frames[0]]):
        np.testing.assert_array_equal(images[i][0][0], values)
    with pytest.raises(BadImage, match="there is no such frame"):
        read(written(frames, NumberOfFrames=3), page=3)


def changed(name, value, **more):
    data = {"Rows": 19, "Columns": 23}
    return written(CT, **{name: value}, **{k: v for k, v in data.items() if k != name}, **more)


TINY = GRID.integers(0, 256, (16, 16), np.uint8)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (written(CT)[:-10], "a.dcm: "),
        (written(CT)[:140], "does not say how it is written"),
        (written(CT)[:132], "does not say how it is written"),
        (changed("Rows", 60_000, NumberOfFrames=1), "cannot be decoded"),
        (changed("Rows", 0), "a picture of 23 x 0 pixels"),
        (written(CT, Rows=60_000, Columns=60_000), "are more than 178,956,970 pixels"),
        (written(CT, Rows=8000, Columns=8000), "more than 50,000,000 pixels"),
        (written(CT, Rows=7000, Columns=7000, SamplesPerPixel=3), "GB to decode"),
        (written(CT, syntax="1.2.840.10008.1.2.4.70", encoded=[b"1234"]), "transfer syntax 1.2.840.10008.1.2.4.70 is"),
        (written(TINY, dicom.JPEG2000[0], [frame(np.zeros((64, 64), np.uint8), "JPEG2000", no_jp2=True)]), "64 x 64"),
        (written(TINY, dicom.JPEG[0], [frame(np.zeros((64, 64), np.uint8), "JPEG")]), "a frame of 64 x 64 pixels"),
        (written(TINY, dicom.JPEG2000[0], [b"no image at all, but long enough"]), "no JPEG 2000 codestream"),
        (written(TINY, dicom.JPEG[0], [b"no image at all, but long enough"]), "a.dcm: "),
        (written(TINY, dicom.RLE, [b"no image at all, but long enough"]), "a.dcm: "),
        (written(TINY, dicom.RLE, [bytes(20_000_000)]), "GB to decode"),
        (written(CT, "1.2.840.10008.1.2.1.99"), "transfer syntax 1.2.840.10008.1.2.1.99 is not read"),
        (written(TINY, SamplesPerPixel=2), "a.dcm: "),
    ],
)
def test_what_is_broken_or_hostile_is_one_line(data, what):
    with pytest.raises(BadImage, match=what) as error:
        read(data)
    assert "\n" not in str(error.value)


def test_any_byte_may_be_wrong():
    """Whatever is made of a damaged file, it is an image or a bad one, and nothing is printed."""
    whole, draws = bytes(written(CT, WindowCenter=40, WindowWidth=400)), np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole)
        for at in draws.integers(132, len(data) - CT.nbytes, 3):
            data[at] = draws.integers(256)
        try:
            image = read(data)
        except BadImage:
            continue
        assert image.shape[0] == 1


def test_sequences_in_sequences_without_end_are_one_line():
    whole = bytes(written(CT, dicom.PLAIN[0]))
    meta = 144 + struct.unpack_from("<I", whole, 140)[0]
    inner = struct.pack("<HHIHHI", 0x0028, 0x3010, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    with pytest.raises(BadImage, match="recursion"):
        read(whole[:meta] + inner * 50_000 + whole[meta:])


def test_without_pydicom_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom.library.cache_clear()
    try:
        with pytest.raises(BadImage, match=r"a DICOM image: pip install 'crosslevel\[dicom\]'"):
            read(written(CT))
    finally:
        dicom.library.cache_clear()
