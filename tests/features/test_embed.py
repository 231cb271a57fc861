"""A table of features: right, in order, whole after a kill."""

import csv
import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from run_samples import watching_encoders

from crosslevel import Encoder, load_encoder
from crosslevel.data.open import open_images
from crosslevel.features import embed
from crosslevel.features.pieces import text
from crosslevel.models.encoder import View
from crosslevel.settings.parser import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with an encoder of random weights."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", True, 0.0625)
    encoder.view = View(16)
    folder = tmp_path_factory.mktemp("run")
    encoder.save(folder / "encoder.safetensors")
    return folder


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "photos" / ("b" if i % 3 else "a ü")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return tmp_path / "photos"


def expected(trained, photos):
    """Path and feature of each image, one at a time, in float32, by hand."""
    encoder = load_encoder(trained)
    out = {}
    for file in sorted(photos.rglob("*.png")):
        x = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
        mean, std = np.array([[[0.485]], [[0.456]], [[0.406]]]), np.array([[[0.229]], [[0.224]], [[0.225]]])
        with torch.no_grad():
            x = torch.tensor((x - mean) / std, dtype=torch.float32)
            out[file.relative_to(photos).as_posix()] = encoder(x[None])[0].numpy()
    return out


def embedded(trained, photos, output, *options):
    return run(embed.embed, [str(trained), str(photos), "-o", str(output), "--device=cpu", *options], rows=8)


def test_parquet_has_path_label_class_and_feature(trained, photos, tmp_path):
    file = embedded(trained, photos, tmp_path / "f.parquet", "--precision=fp32", "--batch_size=7")
    table = pq.read_table(file).to_pydict()
    truth = expected(trained, photos)
    assert table["path"] == list(truth)
    np.testing.assert_allclose(np.array(table["feature"]), np.array(list(truth.values())), rtol=1e-4, atol=1e-5)
    assert table["class"] == [path.split("/")[0] for path in truth]
    assert table["label"] == [0 if path.startswith("a") else 1 for path in truth]
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "f.parquet"}


def test_npy_has_the_same_rows_and_a_manifest(trained, photos, tmp_path):
    embedded(trained, photos, tmp_path / "f.npy", "--precision=fp32")
    truth = expected(trained, photos)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), np.array(list(truth.values())), rtol=1e-4, atol=1e-5)
    with (tmp_path / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(truth)
    assert [row["class"] for row in rows] == [path.split("/")[0] for path in truth]


def test_images_without_labels_have_no_label_column(trained, tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    file = embedded(trained, tmp_path, tmp_path / "f.parquet")
    assert pq.read_schema(file).names == ["path", "feature"]


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_a_killed_run_continues_and_ends_in_the_same_table(trained, photos, tmp_path, capsys, suffix):
    embedded(trained, photos, tmp_path / f"whole{suffix}", "--batch_size=4")
    encoded = []

    def interrupting(encoder, images):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(len(images))

    with watching_encoders(before=interrupting), pytest.raises(SystemExit) as stop:
        embedded(trained, photos, tmp_path / f"cut{suffix}", "--batch_size=4")
    assert stop.value.code == 130
    assert "16 images are done; the same command continues there\n" in capsys.readouterr().err
    assert not (tmp_path / f"cut{suffix}").exists()
    capsys.readouterr()
    embedded(trained, photos, tmp_path / f"cut{suffix}", "--batch_size=4")
    assert "continuing at image 16" in capsys.readouterr().out
    if suffix == ".npy":
        assert np.array_equal(np.load(tmp_path / "cut.npy"), np.load(tmp_path / "whole.npy"))
        assert (tmp_path / "cut.csv").read_text() == (tmp_path / "whole.csv").read_text()
    else:
        assert pq.read_table(tmp_path / "cut.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


def left_in_pieces(trained, photos, output):
    """All pieces are there, and the table could not be put in its place: a folder stood in the way."""
    (output / "in the way").mkdir(parents=True)
    with pytest.raises(SystemExit):
        embedded(trained, photos, output, "--batch_size=4")
    (output / "in the way").rmdir()
    output.rmdir()


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("0*.parquet")}


def damaged(piece, how):
    content = bytearray(piece.read_bytes())
    if how == "flipped":
        content[len(content) // 3] ^= 1
    piece.write_bytes({"flipped": content, "short": content[:-9], "empty": b"", "zeros": bytes(len(content))}[how])


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "zeros"])
def test_a_damaged_piece_is_computed_again_and_said_so(trained, photos, tmp_path, capsys, how):
    whole = pq.read_table(embedded(trained, photos, tmp_path / "whole.parquet", "--batch_size=4"))
    left_in_pieces(trained, photos, tmp_path / "f.parquet")
    damaged(tmp_path / "f.parquet.parts" / "000000000008.parquet", how)
    before = times(tmp_path / "f.parquet.parts")
    capsys.readouterr()
    left_in_pieces(trained, photos, tmp_path / "f.parquet")
    said = capsys.readouterr().out
    assert "000000000008.parquet is damaged" in said
    assert "continuing at image 8" in said
    after = times(tmp_path / "f.parquet.parts")
    assert [name for name in after if after[name] != before[name]] == ["000000000008.parquet"]
    assert pq.read_table(embedded(trained, photos, tmp_path / "f.parquet", "--batch_size=4")).equals(whole)


def test_a_call_that_was_killed_while_it_cleaned_up_computes_nothing_again(trained, photos, tmp_path, capsys):
    """The table is in its place, what could not be read cannot be told; and of the table's pieces one is removed."""
    (photos / "b" / "broken.png").touch()
    (tmp_path / "f.bad_files.txt" / "in the way").mkdir(parents=True)
    with pytest.raises(SystemExit):
        embedded(trained, photos, tmp_path / "f.parquet", "--batch_size=4")
    shutil.rmtree(tmp_path / "f.bad_files.txt")
    sorted((tmp_path / "f.parquet.parts").glob("0*"))[1].unlink()
    before = (tmp_path / "f.parquet").read_bytes()
    capsys.readouterr()
    computed = []
    with watching_encoders(before=lambda encoder, images: computed.append(len(images))):
        embedded(trained, photos, tmp_path / "f.parquet", "--batch_size=4")
    assert computed == []
    assert "30 features of 32" in capsys.readouterr().out
    assert (tmp_path / "f.parquet").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "f.parquet", "f.bad_files.txt"}


def test_pieces_of_other_images_are_not_continued(trained, photos, tmp_path, capsys):
    left_in_pieces(trained, photos, tmp_path / "f.parquet")
    (photos / "b" / "01.png").rename(photos / "b" / "99.png")
    capsys.readouterr()
    file = embedded(trained, photos, tmp_path / "f.parquet")
    said = capsys.readouterr().out
    assert "continuing" not in said
    assert "4 finished pieces are of other images" in said
    assert pq.read_table(file)["path"].to_pylist()[-1] == "b/99.png"


def test_unreadable_files_are_left_out_and_named(trained, photos, tmp_path, capsys):
    (photos / "b" / "zz.png").write_bytes(b"\x89PNG broken")
    (photos / "a ü" / "00.png").write_bytes(b"")
    file = embedded(trained, photos, tmp_path / "f.parquet", "--batch_size=4")
    table = pq.read_table(file)
    assert len(table) == 29
    assert "a ü/00.png" not in table["path"].to_pylist()
    named = (tmp_path / "f.bad_files.txt").read_text()
    assert [line.split("\t")[0] for line in named.splitlines()] == ["a ü/00.png", "b/zz.png"]
    assert "2 of 31" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["RUN", "PHOTOS", "--output=f.txt"], ".parquet, .npy, .lance, .fiftyone"),
        (["nowhere", "PHOTOS"], "nowhere"),
        (["RUN", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use_ends_in_one_line(trained, photos, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    given = [{"RUN": str(trained), "PHOTOS": str(photos)}.get(a, a) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        run(embed.embed, given)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert named in said


def test_a_file_name_that_is_no_unicode_is_kept_as_escapes():
    assert text("gr\udcfcn.png") == "gr\\xfcn.png"
    assert io.StringIO(text("日本.png")).read() == "日本.png"


def test_what_is_done_with_the_table_is_told_in_one_line(trained, photos, tmp_path, capsys):
    file = embedded(trained, photos, tmp_path / "my f.parquet")
    verbs = [f"crosslevel {verb}" for verb in (f"search '{file}' IMAGE", f"explore '{file}'", f"curate '{file}'")]
    assert capsys.readouterr().out.splitlines()[-1] == f"next: {verbs[0]}, {verbs[1]}, or {verbs[2]}"


def test_a_table_says_which_encoder_looked_at_what(trained, photos, tmp_path):
    told = json.loads(pq.read_schema(embedded(trained, photos, tmp_path / "f.parquet")).metadata[b"crosslevel"])
    encoder = load_encoder(trained)
    assert told["encoder"] == encoder.identity()
    assert told["view"]["size"] == 16
    assert (told["run"], told["root"], told["images"]) == (str(trained), str(photos), str(photos))
    assert set(told["versions"]) == {"crosslevel", "torch", "timm"}


def test_thumbnails_are_the_images_made_small_and_a_source_of_their_own(trained, photos, tmp_path):
    wide = np.zeros((40, 200, 3), np.uint8)
    wide[:, 100:] = 255
    Image.fromarray(wide).save(photos / "b" / "wide.png")
    file = embedded(trained, photos, tmp_path / "f.parquet", "--thumbnails=96")
    table = pq.read_table(file)
    assert table.column_names == ["path", "label", "class", "feature", "image"]
    pictures = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist()]
    assert all(picture.format == "JPEG" for picture in pictures)
    by_path = dict(zip(table["path"].to_pylist(), pictures, strict=True))
    assert by_path["b/wide.png"].size == (96, 19)
    small = np.asarray(by_path["b/wide.png"].convert("L"))
    assert small[:, :44].max() < 30
    assert small[:, 52:].min() > 225
    assert by_path["b/01.png"].size == (16, 16)
    images = open_images(f"{file},column=image,label=label")
    assert len(images) == 31
    assert images[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize("options", [["--thumbnails=4"], ["--thumbnails=96", "--output=f.npy"]])
def test_thumbnails_that_cannot_be_are_refused(trained, photos, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(embed.embed, [str(trained), str(photos), *options])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_datasets_library_opens_a_table_with_its_pictures(trained, photos, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'crosslevel[hub]'")
    file = embedded(trained, photos, tmp_path / "f.parquet", "--thumbnails=96")
    opened = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    row = opened.cast_column("image", datasets.Image())[4]
    assert row["image"].size == (16, 16)
    assert len(row["feature"]) == 32
