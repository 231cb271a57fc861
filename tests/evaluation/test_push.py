"""`crosslevel push` to a hub on this machine: what timm loads from there is the encoder; nothing private is told."""

import json

import pytest
import timm
import torch
import yaml
from hub_samples import local_hub

import crosslevel
from crosslevel.cli import main
from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.models.named import open_encoder

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with local_hub(monkeypatch, tmp_path / "cache") as (hub, address):
        yield hub, address


@pytest.fixture
def run(tmp_path):
    """What a training and an evaluation leave, as far as it is told."""
    torch.manual_seed(0)
    encoder = Encoder("test_vit", image_size=64, pool="avg")
    encoder.view, encoder.licence = View(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "apache-2.0"
    (tmp_path / "run").mkdir()
    encoder.save(tmp_path / "run" / "encoder.safetensors")
    settings = {
        "images": "/home/somebody/secret/photos", "data_root": "/home/somebody/data", "epochs": 3.0, "workers": 2,
        "encoder": {"name": "hf-hub:other/start", "pretrained": True, "weights": None},
        "method": {"class_path": "crosslevel.methods.simclr.SimCLR", "init_args": {"temperature": 0.2}},
    }  # fmt: skip
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run" / "images.json").write_text(json.dumps({"images": 12345, "paths": "x"}))
    figures = {"untrained encoder": {"top1": 10.0}, "trained encoder": {"top1": 61.25}}
    result = {"protocol": "kNN, k = 3", "accuracy_percent": figures, "interval_percent": {}}
    result |= {"images": "/home/somebody/secret/train", "test": "/home/somebody/secret/test"}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"results": [result]}))
    return tmp_path / "run"


def test_timm_loads_what_was_pushed(hub, run, capsys):
    main(["push", str(run), "hf:me/tiny"])
    out = capsys.readouterr().out
    assert out.startswith(f"{hub[1]}/me/tiny/commit/")
    assert 'timm.create_model("hf-hub:me/tiny"' in out
    files = hub[0].files["me/tiny"]
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)
    encoder, shown = load_encoder(run), torch.randn(2, 3, 64, 64)
    again = open_encoder("hf-hub:me/tiny")
    assert torch.equal(again(shown), encoder(shown))
    assert (again.view, again.licence) == (encoder.view, "apache-2.0")


@pytest.mark.parametrize("to", ["the hub", "a folder"])
def test_timm_itself_loads_it(to, hub, run, tmp_path):
    """By its own loader, with its own transform."""
    folder = tmp_path / "out"
    crosslevel.push(run, "hf:me/tiny", output=folder if to == "a folder" else None, quiet=True)
    assert ("me/tiny" in hub[0].files) == (to == "the hub")
    name = f"local-dir:{folder}" if to == "a folder" else "hf-hub:me/tiny"
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    fetched = {path.rpartition("/")[2] for method, path in hub[0].seen if method == "GET"}
    assert fetched == ({"config.json", "model.safetensors"} if to == "the hub" else set())
    shown = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(shown), load_encoder(run)(shown))
    data = timm.data.resolve_model_data_config(model)
    assert [list(data[name]) for name in ("input_size", "mean", "std")] == [
        [3, 64, 64],
        [0.1, 0.2, 0.3],
        [0.4, 0.5, 0.6],
    ]
    assert (data["crop_pct"], data["interpolation"]) == (1.0, "bilinear")


def test_a_resnet_that_was_pushed_is_opened_again_by_name(hub, run):
    """Its files say how its random weights were drawn, which is nothing to a network that has weights."""
    encoder = Encoder("test_resnet", small_images=False).eval()
    encoder.save(run / "encoder.safetensors")
    crosslevel.push(run, "hf:me/resnet", quiet=True)
    assert json.loads(hub[0].files["me/resnet"]["config.json"])["model_args"]["zero_init_last"] is False
    shown = torch.randn(2, 3, 64, 64)
    assert torch.equal(open_encoder("hf-hub:me/resnet")(shown), encoder(shown))


def test_the_card_has_data_settings_figures_and_licence_and_no_path(hub, run):
    crosslevel.push(run, "hf-hub:me/tiny", quiet=True)
    card = hub[0].files["me/tiny"]["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["library_name"], head["base_model"]) == ("apache-2.0", "timm", "other/start")
    assert "photos: 12,345 images, without labels." in card
    assert "method.init_args.temperature: 0.2" in card
    assert "kNN, k = 3 (train, tested on test), in %:" in card
    assert "| trained encoder | 61.2 |" in card
    assert "The training began with the weights hf-hub:other/start (apache-2.0)." in card
    everything = b"".join(data for data in hub[0].files["me/tiny"].values())
    for private in (b"somebody", b"secret", b"workers", TOKEN.encode()):
        assert private not in everything


def test_the_token_is_sent_and_never_told(hub, run, capsys, monkeypatch):
    main(["push", str(run), "hf:me/tiny"])
    assert {f"Bearer {TOKEN}"} == hub[0].tokens
    first = capsys.readouterr()
    for endpoint, name in ((hub[1], "echo"), ("http://127.0.0.1:9", "tiny")):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(SystemExit):
            main(["push", str(run), f"hf:me/{name}"])
        told = capsys.readouterr()
        assert TOKEN not in first.out + first.err + told.out + told.err
        assert told.err.count("\n") == 1
        assert f"me/{name} was not pushed: " in told.err
        assert ("not with Bearer ***" in told.err) == (name == "echo")


@pytest.mark.parametrize(
    ("to", "options", "what"),
    [
        ("me/tiny", {}, "'me/tiny' is no repository of the hub: give hf:owner/name"),
        ("hf:tiny", {}, "is no repository of the hub"),
        ("hf:me/tiny", {"width": 0.0625}, "timm has no resnet18 with a small-image stem or a width"),
    ],
)
def test_what_cannot_be_pushed_says_so(to, options, what, run, capsys):
    if options:
        Encoder("resnet18", **options).save(run / "encoder.safetensors")
    with pytest.raises(SystemExit):
        main(["push", str(run), to])
    assert what in capsys.readouterr().err


def test_a_licence_beside_that_of_the_start_is_pointed_out(run, tmp_path, capsys):
    main(["push", str(run), "hf:me/tiny", "--license=mit", f"--output={tmp_path / 'out'}"])
    out = capsys.readouterr().out
    assert "the run began with weights under apache-2.0: see whether that allows mit" in out
    assert "nothing was sent" in out
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
