"""Damage that only the decoder sees: the image is bad, or kept where that is wanted; nothing reaches stderr unnamed."""

import contextlib
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from picture_samples import RGB, encoded
from PIL import Image

from crosslevel.data.decode import decode, read_image
from crosslevel.data.decoding import complaints, memory, trace
from crosslevel.data.decoding.reading import Reading
from crosslevel.data.loaders.batches import EvalBatches
from crosslevel.data.open import open_images
from crosslevel.data.uri import parse, read_as
from crosslevel.settings.command import Command
from crosslevel.settings.parser import prepared
from crosslevel.utils.errors import BadImage, SourceError, UserError

KEEP = Reading(damaged="keep")


def huffman(mode):
    """A JPEG with noise in the middle of its scan: libjpeg fills in, and says so."""
    data = bytearray(encoded(Image.fromarray(RGB).convert(mode), "JPEG", quality=95))
    middle = (data.rfind(b"\xff\xda") + len(data)) // 2
    data[middle : middle + 40] = b"\xff\x00\x55\xaa" * 10
    return data


def described_first():
    """XMP stands before EXIF, as some editors leave it: Pillow decodes it, and does not tell what libjpeg says."""
    exif = Image.Exif()
    exif[0x0112] = 3
    data = huffman("RGB")
    parts = [b"http://ns.adobe.com/xap/1.0/\0<x/>", b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")]
    segments = b"".join(b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return data[:2] + segments + data[2:]


def fax():
    """A TIFF in Group 4 coding with a bad code word: libtiff fills in, and says so."""
    data = bytearray(encoded(Image.fromarray(RGB).convert("1"), "TIFF", compression="group4"))
    data[60:66] = b"\x13\x57\x9b\xdf\x24\x68"
    return data


def checksum():
    data = bytearray(encoded(Image.fromarray(RGB), "PNG"))
    data[-14] ^= 1  # the checksum of the pixels
    return data


def cut():
    return bytearray(encoded(Image.fromarray(RGB), "JPEG", quality=95)[:-300])


DAMAGED = {
    "jpeg": (lambda: huffman("RGB"), "damaged: .*Corrupt JPEG data"),
    "gray jpeg": (lambda: huffman("L"), "damaged: .*Corrupt JPEG data"),
    "cmyk jpeg": (lambda: huffman("CMYK"), "damaged: .*Corrupt JPEG data"),
    "jpeg with XMP before EXIF": (described_first, "damaged: .*Corrupt JPEG data"),
    "tiff": (fax, "damaged: Fax4Decode: Bad code word"),
    "png": (checksum, "wrong checksum"),
    "cut jpeg": (cut, "truncated: the end-of-image marker is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_the_decoder_reports_makes_a_bad_image_that_can_be_kept(kind, capfd):
    made, why = DAMAGED[kind]
    with pytest.raises(BadImage, match=why):
        decode(made(), "a.jpg")
    with pytest.warns(UserWarning, match=r"a\\x1b.jpg: damaged, and kept: ") as caught:
        image = decode(made(), "a\x1b.jpg", reading=KEEP)
    assert [line.category for line in caught].count(UserWarning) == 1
    assert image.shape == (3, 37, 52)
    assert image.float().std() > 1
    assert capfd.readouterr().err == ""


def test_whole_images_are_the_same_whatever_is_kept():
    for format in ("JPEG", "PNG", "TIFF", "WEBP"):
        data = encoded(Image.fromarray(RGB), format)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(decode(bytearray(data), "x"), decode(bytearray(data), "x", reading=KEEP))


def test_what_is_said_beside_reaches_stderr_as_ever(capfd):
    with complaints.heard() as said:
        print("from Python", file=sys.stderr)
    assert said.text == ""
    assert capfd.readouterr().err == "from Python\n"


def test_many_threads_complain_of_their_own_images_alone():
    good, bad = encoded(Image.fromarray(RGB), "JPEG"), bytes(huffman("RGB"))
    found = {}

    def work(n):
        for k in range(20):
            try:
                decode(bytearray(bad if (n + k) % 2 else good), "x")
                found[n, k] = False
            except BadImage:
                found[n, k] = True

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(n, k): (n + k) % 2 == 1 for n in range(4) for k in range(20)}


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(Image.fromarray(RGB), "JPEG"))
    (tmp_path / "3.jpg").write_bytes(huffman("RGB"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*damaged, and kept")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_names_or_keeps_them(folder, workers, capfd):
    for source, kept in ((f"{folder}", 3), (f"{folder},damaged=keep", 4), (f"{folder},damaged=keep@repeat=1", 4)):
        images = open_images(source)
        bad_files = images.bad_files()
        assert sum(len(b.index) for b in EvalBatches(images, 4, 32, bad_files=bad_files, workers=workers)) == kept
        assert list(bad_files.reasons) == (["3.jpg"] if kept == 3 else [])
    lines = [line for line in capfd.readouterr().err.splitlines() if "JPEG" in line]  # of the processes that decode
    assert all("3.jpg: damaged, and kept: " in line for line in lines)
    assert open_images(f"{folder}").identity() != open_images(f"{folder},damaged=keep").identity()


VERBS = {
    "train": ["crosslevel.training.train", "{}"],
    "tune": ["crosslevel.tuning.tune", "{}"],
    "embed": ["crosslevel.features.embed", "run", "{}"],
    "pack": ["crosslevel.data.pack", "{}"],
    "subset": ["crosslevel.data.subset", "{}"],
    "inspect": ["crosslevel.inspection.inspect", "{}", "--beside", "other"],
    "evaluate": ["crosslevel.evaluation.evaluate", "run", "{}", "--test", "other@frames=2"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_one_option_reaches_every_verb_that_reads_images(verb):
    module, *arguments = VERBS[verb]
    settings = prepared(
        Command.of(module, verb), [*(a.format("photos/@repeat=2") for a in arguments), "--damaged", "keep"]
    )
    named = [settings[name] for name in ("images", "test", "beside") if settings.get(name)]
    assert named[0] == "photos/,damaged=keep@repeat=2"
    assert named[1:] in ([], ["other,damaged=keep"], ["other,damaged=keep@frames=2"])


def test_options_of_reading_are_written_after_any_source(tmp_path):
    (tmp_path / "a,damaged=keep").mkdir()
    for text, path, reading in (
        ("photos,damaged=keep", "photos", KEEP),
        ("x.parquet,column=a,damaged=keep,pages=all", "x.parquet", Reading("keep", "all")),
        ("https://h/{0..2}.tar,damaged=keep", "https://h/{0..2}.tar", KEEP),
        ("hf://o/n:train,damaged=keep", "o/n", KEEP),
        (f"{tmp_path}/a,damaged=keep", f"{tmp_path}/a,damaged=keep", Reading()),
    ):
        source = parse(text)
        assert (source.path, source.reading, source.text) == (path, reading, text)
        assert parse(source.absolute().text).reading == reading
    assert read_as("photos,damaged=keep", {"damaged": "refuse"}) == "photos"
    with pytest.raises(SourceError, match="damaged=no: use refuse or keep"):
        parse("photos,damaged=no")
    with pytest.raises(UserError, match="damaged=no: use refuse or keep"):
        prepared(Command.of("crosslevel.data.pack", "pack"), ["photos", "--damaged", "no"])


def test_noise_in_scans_is_told(capfd):
    """As the issue counted: of JPEG files with noise in their scans none is taken whose decoder complains."""
    rng, silent = np.random.default_rng(0), 0
    whole = encoded(Image.fromarray(RGB), "JPEG", quality=90)
    first = whole.rfind(b"\xff\xda") + 14
    for _ in range(60):
        data = bytearray(whole)
        at = int(rng.integers(first, len(data) - 2))
        data[at] = int(rng.integers(256))
        with contextlib.suppress(BadImage):
            decode(data, "x")
            silent += 1
    assert silent < 60
    assert capfd.readouterr().err == ""


def test_damage_is_heard_where_an_image_is_read_at_a_reduced_size(monkeypatch):
    monkeypatch.setattr(memory, "LARGEST", RGB.shape[0] * RGB.shape[1] // 2)
    whole = bytearray(encoded(Image.fromarray(RGB), "JPEG", quality=95))
    assert decode(whole, "x").shape[1] < RGB.shape[0]
    with pytest.raises(BadImage, match="Corrupt JPEG data"):
        decode(huffman("RGB"), "x")


@pytest.mark.parametrize("odd", [0, 1])
def test_an_odd_side_is_read_at_the_same_reduced_size(monkeypatch, odd):
    """Where the whole would take more than a mebibyte."""
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "1")
    side = 600 + odd
    image = bytearray(encoded(Image.new("RGB", (side, side), "red"), "JPEG"))
    assert decode(image, "x").shape == (3, 300 + odd, 300 + odd)


def test_decoding_leaves_the_warnings_of_other_threads_alone():
    """`warnings.catch_warnings` would take them, and could leave its filters behind for good."""
    filters, data = list(warnings.filters), bytearray(encoded(Image.fromarray(RGB), "PNG"))
    stop = threading.Event()

    def decoding():
        while not stop.is_set():
            decode(data, "x")

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=decoding)
        thread.start()
        for i in range(300):
            warnings.warn(f"number {i}", stacklevel=1)
            time.sleep(0)
        stop.set()
        thread.join()
    assert [str(w.message) for w in heard if "number" in str(w.message)] == [f"number {i}" for i in range(300)]
    assert list(warnings.filters) == filters


def test_what_has_crashed_in_one_folder_is_read_in_another(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    trace.refused[str(tmp_path / "a" / "1.png")] = "it crashed"
    with pytest.raises(BadImage, match=r"^1\.png: it crashed"):
        read_image(str(tmp_path / "a" / "1.png"), "1.png")
    assert read_image(str(tmp_path / "b" / "1.png"), "1.png").shape[0] == 3
