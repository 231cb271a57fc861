"""The worst images: a few bytes that ask for gigabytes. Decoded in children with a limit, all of them together."""

import contextlib
import io

import numpy as np
import pytest
import torch
from picture_samples import encoded as whole
from PIL import Image
from worst_samples import SIDE, WORST, encoded, peak

from crosslevel.data import decode as decoding
from crosslevel.data.decode import decode
from crosslevel.data.decoding import formats, memory, sizes, webp
from crosslevel.utils.errors import BadImage


def read_all():
    said = []
    for kind, made in WORST.items():
        try:
            said.append(f"{kind}: {tuple(decode(bytearray(made()), kind).shape)}")
        except BadImage as error:
            said.append(str(error))
    return "\n".join(said)


@pytest.mark.filterwarnings("ignore")
def test_no_image_takes_more_than_decoding_may_and_what_is_refused_is_named():
    taken, said = peak(read_all, lambda: [decode(bytearray(encoded(f)), "x") for f in ("PNG", "JPEG", "TIFF", "GIF")])
    assert taken < memory.budget() + 150 * 2**20, f"{taken / 1e9:.2f} GB\n{said}"
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert set(lines) == set(WORST)
    for kind in ("webp", "lzw tiff", "gif", "progressive cmyk jpeg"):
        assert "GB to decode, more than 0.8 GB: make it smaller, or set CROSSLEVEL_DECODE_MB=" in lines[kind], lines[
            kind
        ]
    assert lines["jpeg"] == "damaged: Corrupt JPEG data: premature end of data segment"


KINDS = {
    "JPEG": ("RGB", {}),
    "progressive JPEG": ("RGB", {"progressive": True, "subsampling": 0}),
    "turned JPEG": ("RGB", {"exif": True}),
    "CMYK JPEG": ("CMYK", {"progressive": True}),
    "PNG": ("RGB", {}),
    "RGBA PNG": ("RGBA", {}),
    "palette PNG": ("P", {}),
    "16-bit PNG": ("I;16", {}),
    "16-bit TIFF": ("I;16", {"compression": "tiff_lzw"}),
    "RGBA TIFF": ("RGBA", {"compression": "tiff_deflate"}),
    "one-strip TIFF": ("RGBA", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "GIF": ("P", {}),
    "BMP": ("RGB", {}),
    "WEBP": ("RGB", {"lossless": True, "method": 0}),
    "RGBA WEBP": ("RGBA", {"lossless": True, "method": 0}),
    "JPEG2000": ("RGBA", {}),
    "AVIF": ("RGB", {"speed": 10}),
    "HEIF": ("RGB", {}),
    "JXL": ("RGB", {"lossless": True, "effort": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_takes_more_than_is_reckoned_with(kind, monkeypatch):
    (mode, options), format = KINDS[kind], kind.split()[-1]
    if format in formats.EXTRA and not formats.has_plugin(formats.EXTRA[format][0]):
        pytest.skip(f"needs {formats.EXTRA[format][0]}")
    side = int((40 * 2**20 / (memory.PER_PIXEL.get(format, 9) + 3)) ** 0.5)
    image = Image.new(mode, (side, side), 9 if mode in ("P", "I;16") else None)
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif.tobytes()}
    data = bytearray(whole(image, format, **options))
    reckoned = []

    @contextlib.contextmanager
    def room(need):
        reckoned.append(need)
        yield

    monkeypatch.setattr(decoding, "room", room)
    small = bytearray(whole(image.resize((600, 600)), format, **options))
    decode(data, "x")
    taken, _ = peak(lambda: decode(data, "x").shape, lambda: decode(small, "x"))
    assert taken < max(reckoned) + 6 * 2**20, (
        f"{taken / side**2:.1f} bytes a pixel, {max(reckoned) / side**2:.1f} reckoned"
    )


def test_large_images_are_read_at_a_reduced_size(monkeypatch):
    rows = np.linspace(0, 255, 400, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(rows, (300, 1))] * 3, -1))
    for format, options in (("PNG", {}), ("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("TIFF", {})):
        stream = io.BytesIO()
        image.save(stream, format, **options)
        whole = decode(bytearray(stream.getvalue()), "x").float()
        assert whole.shape == (3, 300, 400)
        for limit, scale in ((60_000, 2), (10_000, 4), (3_000, 8)):
            with monkeypatch.context() as patch:
                patch.setattr(memory, "LARGEST", limit)
                smaller = decode(bytearray(stream.getvalue()), "x").float()
            assert smaller.shape == (3, -(-300 // scale), -(-400 // scale))
            want = torch.nn.functional.adaptive_avg_pool2d(whole, smaller.shape[1:])
            assert (smaller - want).abs().mean() < 2


def large(format, mode="RGB", size=(1201, 901), **options):
    """A smooth picture with an upper left corner of its own; of a size that no power of two divides."""
    rows = np.linspace(0, 255, size[0]).astype(np.uint8)
    image = np.stack([np.tile(rows, (size[1], 1)), np.tile(255 - rows, (size[1], 1)), np.full(size[::-1], 90)], -1)
    image[: size[1] // 3, : size[0] // 3] = 20
    made = Image.fromarray(image.astype(np.uint8)).convert(mode)
    if mode == "RGBA":
        made.putalpha(Image.fromarray(np.tile(rows, (size[1], 1))))
    return bytearray(whole(made, format, **options))


TURNED = Image.Exif()
TURNED[0x0112] = 6

SCALED = {  # with the MiB at which a half and a quarter of it are decoded, and what pixels may differ by on average
    "lossy WebP": (lambda: large("WEBP", quality=95, method=0), (15, 10), 1),
    "lossless WebP": (lambda: large("WEBP", lossless=True, method=0, quality=0), (15, 14), 0.5),
    "transparent WebP": (lambda: large("WEBP", "RGBA", quality=95, method=0), (15, 14), 1),
    "turned WebP": (lambda: large("WEBP", quality=95, method=0, exif=TURNED.tobytes()), (15, 10), 1),
    "JPEG 2000": (lambda: large("JPEG2000"), (30, 8), 2),
    "bare JPEG 2000": (lambda: large("JPEG2000", "RGBA", no_jp2=True), (30, 8), 2),
}


@pytest.mark.parametrize("kind", SCALED)
def test_what_would_take_too_much_is_decoded_at_a_part_of_its_size(kind, monkeypatch):
    """As Pillow's whole image is when it is made smaller, and in no more memory than there is."""
    made, limits, difference = SCALED[kind]
    data = made()
    full = decode(data, "x").float()
    for limit, scale in zip(limits, (2, 4), strict=True):
        monkeypatch.setenv("CROSSLEVEL_DECODE_MB", str(limit))
        smaller = decode(data, "x")
        assert smaller.shape == (3, *(-(-side // scale) for side in full.shape[1:]))
        want = torch.nn.functional.interpolate(full[None], size=smaller.shape[1:], mode="area")[0]
        assert (smaller - want).abs().mean() < difference
        taken, _ = peak(lambda: decode(data, "x").shape, lambda: decode(data, "x"))
        assert taken < limit * 2**20, f"{taken / 2**20:.1f} MiB"


def test_a_large_webp_that_is_damaged_or_moves_is_named(monkeypatch):
    """Without a library that scales, too much is refused as before."""
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "15")
    data = large("WEBP", quality=95, method=0)
    with pytest.raises(BadImage, match="truncated: its data end early"):
        decode(data[: len(data) // 2], "x")
    moving = whole(
        Image.new("RGB", (1201, 901)), "WEBP", save_all=True, append_images=[Image.new("RGB", (1201, 901), "red")]
    )
    with pytest.raises(BadImage, match=r"1,201 x 901 pixels of WEBP take about 0\.0 GB"):
        decode(bytearray(moving), "x")
    monkeypatch.setattr(webp, "_library", lambda: None)
    with pytest.raises(BadImage, match=r"1,201 x 901 pixels of WEBP take about 0\.0 GB"):
        decode(data, "x")


def test_a_tiff_in_strips_takes_no_more_than_one_of_them_beside_its_pixels(monkeypatch):
    """One in a single strip, or with a tile that is larger than the picture, is refused by its name."""
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "22")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40, 3), np.uint8)).resize((1300, 1000), 0)
    strips, single = (whole(image, "TIFF", compression="tiff_lzw", strip_size=size) for size in (2**16, 2**30))
    assert (decode(bytearray(strips), "x").permute(1, 2, 0).numpy() == np.asarray(image)).all()
    with pytest.raises(BadImage, match=r"1,300 x 1,000 pixels of TIFF take about 0\.0 GB"):
        decode(bytearray(single), "x")
    tiled = Image.open(io.BytesIO(strips))
    assert sizes.part_bytes(tiled) <= 2**16
    tiled.tag_v2[322], tiled.tag_v2[323] = 40_000, 40_000
    assert sizes.part_bytes(tiled) == 3 * 40_000**2


def test_the_size_of_a_jpeg_xl_is_known_before_it_is_opened():
    """Bare and in a container, of small and large sides, of one ratio and another; cut, it is damaged."""
    pytest.importorskip("pillow_jxl", reason="needs pillow_jxl: pip install 'crosslevel[jxl]'")
    for size in ((1, 1), (8, 8), (264, 176), (300, 200), (160, 90), (37, 52), (9000, 2), (2, 600), (256, 256)):
        image = Image.new("RGB", size)
        exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0" + bytes(300)
        for data in (whole(image, "JXL"), whole(image, "JXL", exif=exif)):
            assert sizes.size_ahead("JXL", data) == size
    stream, box = whole(image, "JXL"), data[:32]  # signature and ftyp
    assert stream[:2] == b"\xff\x0a"
    for parts in ([stream], [stream[:3], stream[3:]], [b"", stream]):
        split = b"".join(
            (len(part) + 12).to_bytes(4, "big") + b"jxlp" + i.to_bytes(4, "big") + part for i, part in enumerate(parts)
        )
        assert sizes.size_ahead("JXL", box + split) == size
    for cut in (2, 12, 20, 32, 40):
        with pytest.raises(BadImage, match="x: "):
            decode(bytearray(data[:cut]), "x")
    large = bytearray(whole(Image.new("RGB", (16, 16)), "JXL"))
    # small: no; height of 18 bits and more, ratio 1: as wide.
    large[2:8] = (0 | 2 << 1 | (SIDE - 1) << 3 | 1 << 21).to_bytes(6, "little")
    with pytest.raises(BadImage, match=r"13,300 x 13,300 pixels of JXL take about 7\.2 GB to decode"):
        decode(large, "x")


def test_what_is_refused_can_be_allowed(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (900, 700)).save(stream, "PNG")
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", "1")
    with pytest.raises(
        BadImage, match=r"900 x 700 pixels of PNG take about 0.0 GB .* set CROSSLEVEL_DECODE_MB=5"
    ) as told:
        decode(bytearray(stream.getvalue()), "x")
    monkeypatch.setenv("CROSSLEVEL_DECODE_MB", str(told.value).rpartition("=")[2])
    assert decode(bytearray(stream.getvalue()), "x").shape == (3, 700, 900)
