"""Damaged files are named, and survived, by every command that reads a pack or makes one."""

import zlib

import pytest
import torch
from packing_samples import ODD, packed, write
from PIL import Image

from crosslevel.data.bad_files import BadFiles
from crosslevel.data.open import open_images
from crosslevel.settings.parser import run


def bomb(file):
    """A PNG of a few bytes that says it has 10 billion pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))


def damaged(root):
    """Pictures with odd names, and in their midst all that must be survived; returns the names of the bad ones."""
    write(root)
    for name in ODD:
        Image.new("RGB", (40, 30), (9, 8, 7)).save(root / "a" / name)
        (root / "b" / f"broken {name}").write_bytes(b"no picture")
    bomb(root / "b" / "bomb.png")
    (root / "a" / "vanishing.png").symlink_to(root.parent / "gone.png")
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "self.png").symlink_to(root / "b" / "self.png")
    return sorted(["a/vanishing.png", "b/bomb.png", "b/self.png", *(f"b/broken {name}" for name in ODD)])


def named(file):
    bad_files = BadFiles()
    bad_files.read(file)
    return sorted(bad_files.reasons), bad_files.reasons


def test_pack_names_and_survives_damage(tmp_path, capsys):
    bad = damaged(tmp_path / "photos")
    packed(tmp_path / "photos", tmp_path / "p")
    names, reasons = named(tmp_path / "p" / "bad_files.txt")
    assert names == bad
    assert "100000 x 100000" in reasons["b/bomb.png"]
    assert "No such file" in reasons["a/vanishing.png"]
    assert "skipped 6 of 33 images" in capsys.readouterr().out
    found = open_images(tmp_path / "p")
    source = open_images(tmp_path / "photos")
    assert list(found.paths) == [path for path in source.paths if path not in bad]
    assert set(found.paths) >= {f"a/{name}" for name in ODD}
    place = found.paths.index("a/new\nline.png")
    assert torch.equal(found[place][0], torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 26))


def test_train_names_and_survives_damage(tmp_path):
    from crosslevel.training.train import train

    bad = damaged(tmp_path / "photos")
    options = ["--encoder.width=0.0625", "--views.size=16", "--batch_size=8", "--device=cpu", "--report_html=false"]
    run(train, [str(tmp_path / "photos"), *options, "--epochs=1", "--workers=2", f"--run={tmp_path}/r"])
    assert named(tmp_path / "r" / "bad_files.txt")[0] == bad


@pytest.mark.parametrize("workers", [0, 2])
def test_embed_names_and_survives_damage(tmp_path, workers):
    import pyarrow.parquet as pq

    from crosslevel import Encoder
    from crosslevel.features.embed import embed
    from crosslevel.models.encoder import View

    bad = damaged(tmp_path / "photos")
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    encoder.save(tmp_path / "encoder.safetensors")
    arguments = [str(tmp_path / "encoder.safetensors"), str(tmp_path / "photos"), f"--output={tmp_path}/f.parquet"]
    table = pq.read_table(run(embed, [*arguments, "--device=cpu", f"--workers={workers}"]))
    assert named(tmp_path / "f.bad_files.txt")[0] == bad
    assert len(table) == 27
    assert set(table["path"].to_pylist()) >= {f"a/{name}" for name in ODD}
