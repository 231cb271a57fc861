"""Features in a folder of parts that grows, and what an engine needs; `test_ray` has those of a cluster."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embed_samples import draw, embedded, random_encoder, rows, same

import crosslevel
from crosslevel import Encoder
from crosslevel.data.duplicates.scan import content_of
from crosslevel.data.images import ImageView
from crosslevel.data.open import open_images
from crosslevel.data.pack import pack
from crosslevel.features import embed
from crosslevel.features.extract import Runtime, encoded, extract
from crosslevel.features.part_files import PartFiles
from crosslevel.inspection.inspect import inspect
from crosslevel.models.encoder import View
from crosslevel.models.named import open_encoder
from crosslevel.training.train import train
from crosslevel.utils.device import choose
from crosslevel.utils.errors import MissingExtra, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return random_encoder(tmp_path_factory.mktemp("run"))


def test_a_folder_of_parts_has_the_rows_of_a_table_and_takes_what_is_new(trained, tmp_path, capsys):
    photos, folder = tmp_path / "photos", tmp_path / "features"
    draw(photos, range(30))
    (photos / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    embedded(trained, photos, folder)
    embedded(trained, photos, tmp_path / "f.parquet")
    same(rows(folder), rows(tmp_path / "f.parquet"))
    assert len(list(folder.glob("*.parquet"))) == 4
    assert "30 features added to" in capsys.readouterr().out
    assert "broken.png" in (tmp_path / "features.bad_files.txt").read_text()
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    embedded(trained, photos, folder)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.parquet")} == written
    assert "0 features added to" in capsys.readouterr().out
    draw(photos, range(30, 37))
    draw(photos, [4], seed=1)  # another picture under an old name
    embedded(trained, photos, folder)
    assert "8 features added to" in capsys.readouterr().out
    paths = pq.read_table(folder)["path"].to_pylist()
    assert len(paths) == 38
    assert sorted(set(paths)) == sorted(
        rows(tmp_path / "f.parquet").keys() | {f"{'b' if i % 3 else 'a ü'}/{i:03}.png" for i in range(37)}
    )


def test_a_folders_checksums_are_of_the_images_and_no_labels(trained, tmp_path):
    """Each image keeps its own label wherever it goes, and the checksum is of the image in its own size."""
    photos = tmp_path / "photos"
    draw(photos, range(5))
    encoder, images = open_encoder(str(trained)), open_images(photos)
    handed_on = []

    class Watched(ImageView):
        def __getitem__(self, i):
            image = super().__getitem__(i)
            handed_on.append(image[1])
            return image

    runtime = Runtime(choose("cpu", "fp32"), workers=0)
    parts = PartFiles(tmp_path / "features", encoder.identity())
    done = parts.write(encoder, Watched(images), 0, 5, parts.existing_keys(), runtime)
    table = pq.read_table(tmp_path / "features")
    assert (done.rows, done.reasons, handed_on) == (5, {}, images.labels.tolist())
    assert table["content"].to_pylist() == [content_of(images[i][0]) for i in range(5)]
    assert table["label"].to_pylist() == images.labels.tolist()
    np.testing.assert_array_equal(
        np.array(table["feature"].to_pylist(), np.float32),
        extract(encoder, images, workers=0, hardware=runtime.hardware).features.numpy(),
    )


def test_the_encoder_takes_columns_of_any_kind_beside_the_images(trained):
    """What belongs to an image goes beside it and comes back as it was: no other column is borrowed for it."""
    encoder, hardware = open_encoder(str(trained)), choose("cpu", "fp32")
    images = torch.randint(256, (70, 3, encoder.view.size, encoder.view.size), dtype=torch.uint8)
    numbers, names = torch.arange(70), torch.rand(70, 2)
    features, *columns = map(torch.cat, zip(*encoded(encoder, [(images, numbers, names)], hardware), strict=True))
    assert features.shape == (70, encoder.num_features)
    assert all(torch.equal(a, b) for a, b in zip(columns, (numbers, names), strict=True))


def test_a_folder_takes_no_features_of_another_encoder(trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    draw(photos, range(4))
    embedded(trained, photos, tmp_path / "features")
    other = Encoder("resnet18", True, 0.0625)
    other.view = View(16)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other" / "encoder.safetensors")
    with pytest.raises(SystemExit):
        embedded(tmp_path / "other", photos, tmp_path / "features")
    assert "has features of another encoder, or none: give a folder of its own" in capsys.readouterr().err


def test_without_ray_the_install_command_is_told(trained, tmp_path, monkeypatch):
    """And nothing is left behind."""
    draw(tmp_path / "photos", range(4))
    photos = str(tmp_path / "photos")
    monkeypatch.setitem(sys.modules, "ray", None)
    for verb in (
        lambda: embed.embed(str(trained), photos, str(tmp_path / "f.parquet"), engine="ray"),
        lambda: embed.embed(str(trained), photos, str(tmp_path / "features"), engine="ray"),
        lambda: pack(photos, str(tmp_path / "packed"), size=8, engine="ray", quiet=True),
        lambda: inspect(photos, output=str(tmp_path / "inspected"), engine="ray", quiet=True),
    ):
        with pytest.raises(MissingExtra, match=r"^--engine ray needs Ray: pip install 'crosslevel\[ray\]'$"):
            verb()
    with pytest.raises(MissingExtra, match=r"^--launcher ray needs Ray: pip install 'crosslevel\[ray\]'$"):
        train(photos, run=str(tmp_path / "run"), launcher="ray")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]


def test_what_a_launcher_starts_is_a_command_with_a_name():
    with pytest.raises(
        UserError, match=r"^--launcher ray: give the run a name that all machines know: --run runs/NAME$"
    ):
        train("photos", launcher="ray")
    with pytest.raises(UserError, match=r"^launcher=ray: .*: run crosslevel train IMAGES --launcher ray$"):
        crosslevel.train("photos", run="runs/photos", launcher="ray")
