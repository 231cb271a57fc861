"""Images of one and of more than three channels, from a folder to features, and what does not fit them."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hub_samples import local_hub, weights
from PIL import Image
from run_samples import metrics, write_images

import crosslevel
from crosslevel.cli import main
from crosslevel.data.uri import parse
from crosslevel.evaluation.detection.model import detector
from crosslevel.features.source import check_channels, suited
from crosslevel.models.encoder import Encoder, load_encoder
from crosslevel.models.named import open_encoder
from crosslevel.utils.errors import UserError

LESS = [
    "--epochs=1", "--batch_size=8", "--device=cpu", "--workers=0", "--report_html=false", "--cld.groups=4",
    "--encoder.width=0.0625", "--views.size=16", "--monitor=both", "--monitor_every=1",
]  # fmt: skip
QUIET = {"device": "cpu", "workers": 0, "quiet": True}
GRID = np.random.default_rng(0)


def write_bands(folder, count=8, size=20, channels=5):
    """Arrays of 16 bits whose class is in one band alone, in values up to 1,000."""
    for c, name in enumerate(("dry", "wet")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            bands = GRID.integers(0, 300, (size, size, channels))
            bands[..., 3] += 600 * c
            np.save(folder / name / f"{i}.npy", bands.astype(np.uint16))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    write_bands(folder / "bands")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        main(["train", str(folder / "bands"), "--channels=5", "--range=0:1000", f"--run={folder / 'run'}", *LESS])
    return folder


def test_a_run_on_bands_remembers_how_they_are_read(home, capsys, monkeypatch):
    encoder = load_encoder(home / "run")
    assert encoder.reads == {"channels": "5", "range": "0:1000"}
    assert encoder.backbone.conv1.weight.shape[1] == 5
    settings = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert settings["images"].endswith("bands,channels=5,range=0:1000")
    assert settings["encoder"]["channels"] == 5
    every = np.stack([np.load(file) for file in sorted((home / "bands").rglob("*.npy"))]).astype(float) / 1000
    np.testing.assert_allclose(settings["views"]["mean"], every.mean((0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(settings["views"]["std"], every.std((0, 1, 2)), atol=2e-3)
    assert encoder.view.mean == tuple(settings["views"]["mean"])


def test_embed_and_load_read_images_as_the_training_did(home, tmp_path):
    file = crosslevel.embed(home / "run", home / "bands", output=tmp_path / "t.parquet", **QUIET)
    table = pq.read_table(file).to_pydict()
    assert len(table["path"]) == 16
    model = crosslevel.load(str(home / "run"), device="cpu", precision="fp32")
    found = model.transform([str(home / "bands" / path) for path in table["path"]])
    np.testing.assert_allclose(found, np.array(table["feature"]), atol=1e-5)
    array = np.rint(np.load(home / "bands" / table["path"][0]).astype(float) * 255 / 1000).astype(np.uint8)
    np.testing.assert_allclose(model.transform(array), found[:1], atol=1e-5)
    with pytest.raises(UserError, match=r"give an array \(H, W, 5\) or \(H, W\), or a tensor \(5, H, W\)"):
        model.transform(np.zeros((8, 8, 3), np.uint8))
    copy = shutil.copy(home / "bands" / table["path"][3], tmp_path)
    (best,) = crosslevel.search(str(file), str(copy), k=1, **QUIET)
    assert best["matches"][0]["path"] == table["path"][3]


def test_evaluate_inspect_and_classify_take_the_same_images(home):
    bands = str(home / "bands")
    figures = crosslevel.evaluate(str(home / "run"), bands, test=bands, protocol="knn", **QUIET)
    assert list(next(iter(figures.values()))) == ["raw pixels", "untrained encoder", "trained encoder"]
    assert crosslevel.inspect(bands, run=str(home / "run"), **QUIET)["count"] == 16


def test_a_run_goes_on(home):
    before = len(metrics(home / "run"))
    main(["train", f"--resume={home / 'run'}", "--epochs=2"])
    assert len(metrics(home / "run")) > before
    assert load_encoder(home / "run").reads == {"channels": "5", "range": "0:1000"}


def test_transparency_and_gray_are_trained_on(tmp_path):
    photos = write_images(tmp_path / "photos", count=6)
    for channels in (1, 4):
        run = tmp_path / f"run{channels}"
        line = ["--method=MoCo", f"--run={run}", *LESS[:-2], "--monitor_every=0"]
        main(["train", str(photos), f"--channels={channels}", *line])
        encoder = load_encoder(run)
        assert (encoder.view.channels, encoder.reads) == (channels, {"channels": str(channels)})
        features = crosslevel.embed(run, photos, **QUIET).features
        assert features.shape == (12, 32)
        picture = Image.open(photos / "cat" / "000.png")
        found = crosslevel.load(str(run), device="cpu", precision="fp32").transform(picture)
        np.testing.assert_allclose(found[0], features[0], atol=1e-5)


def test_weights_of_three_channels_serve_one_and_more(tmp_path, monkeypatch):
    _, file = weights("test_vit")
    with local_hub(monkeypatch, tmp_path / "hub") as (hub, _):
        hub.put("timm/test_vit.r160_in1k", model__safetensors=file)
        gray, six = (Encoder("test_vit.r160_in1k", pretrained=True, channels=c).eval() for c in (1, 6))
        colours = open_encoder("timm:test_vit.r160_in1k")
    x = torch.rand(2, 1, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(gray(x), colours(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
        y = torch.rand(2, 3, 160, 160)
        torch.testing.assert_close(six(torch.cat([y, y], 1)), colours(y), atol=1e-4, rtol=1e-4)
    assert (gray.view.channels, six.view.channels) == (1, 6)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (["train", "photos", "--channels=4", "--views.hue=0.1"], "views.hue=0.1 needs red, green and blue"),
        (
            ["train", "photos", "--channels=4", "--encoder.channels=5"],
            "the images have 4 channels, the encoder takes 5",
        ),
        (["train", "photos", "--encoder.channels=4"], "the images have 3 channels, the encoder takes 4"),
        (["train", "photos", "--channels=9"], "3 channels, not 9"),
        (["train", "photos", "--channels=none"], "channels=none: needs a whole number from 1 to 1024"),
        (["train", "photos", "--range=7"], "needs the smallest and the largest value"),
        (["train", "photos", "--channels=4", "--views.mean=[0.5,0.5,0.5]"], "give one for each"),
        (["train", "photos", "--channels=1", "--method=Distill", "--method.teacher=plain"], "takes 3 channels, the im"),
        (["embed", "run", "photos", "--channels=1"], "images of 1 channels, where resnet18 takes 5"),
        (["embed", "plain", "photos", "--channels=4"], "images of 4 channels, where resnet18 takes 3"),
        (["embed", "run", "photos"], "images can be read (the first: cat/000.png: 3 channels, not 5"),
        (
            ["evaluate", "run", "photos", "--test=photos", "--beside=plain"],
            "plain: images of 3 channels, where resnet18",
        ),
        (["pack", "photos", "--channels=4"], "packs have images of 3 channels"),
        (["export", "run", "--format=torchvision"], "takes images of 3 channels, not 5|no stem for small"),
    ],
)
def test_what_does_not_fit_is_one_line(home, tmp_path, monkeypatch, capsys, line, what):
    monkeypatch.chdir(home)
    if not (home / "plain").exists():
        write_images(home / "photos", count=2)
        (home / "plain").mkdir()
        Encoder("resnet18", width=0.0625, small_images=True).save(home / "plain" / "encoder.safetensors")
    fitting = LESS if line[0] == "train" else ["--output=x.parquet"] if line[0] == "embed" else []
    with pytest.raises(SystemExit) as ended:
        main([*line, *fitting])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert what.split("|")[0] in said or what.split("|")[-1] in said, said
    assert said.strip().count("\n") == 0


def test_data_sets_by_name_are_what_they_are(home):
    encoder = load_encoder(home / "run")
    assert suited(parse("turntable:test"), encoder).text == "turntable:test"
    bands = str(home / "bands")
    assert suited(parse(f"{bands},channels=3@frames=2"), encoder).text == f"{bands},channels=5,range=0:1000@frames=2"
    assert suited(parse(f"{bands},range=0:5"), encoder).text == f"{bands},channels=5,range=0:5"
    with pytest.raises(UserError, match="cifar10: images of 3 channels, where resnet18 takes 5"):
        check_channels(encoder, 3, "cifar10")


def test_detectors_take_colours(home):
    encoder = Encoder("resnet18", width=0.0625, channels=4)
    with pytest.raises(UserError, match="detection takes images of 3 channels, resnet18 those of 4"):
        detector(encoder, classes=2)
