"""Trainings from weights of other networks than the usual ViT: ConvNeXts, and DINOv3 in both of its forms."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from hub_samples import CONVNEXT, VIT, local_hub, narrow, weights
from PIL import Image
from reference import normal
from run_samples import metrics, write_images
from safetensors.torch import load_file

import crosslevel
from crosslevel.cli import main
from crosslevel.features.extract import normalize
from crosslevel.models.encoder import Encoder, View, load_encoder
from crosslevel.models.named import open_encoder
from crosslevel.utils.errors import UserError

TINY = "test_convnext.r160_in1k"
DINOV3, DINOV3_CONVNEXT = "vit_small_patch16_dinov3.lvd1689m", "convnext_tiny.dinov3_lvd1689m"
FEW = ["--epochs=1", "--batch_size=12", "--device=cpu", "--workers=0", "--report_html=false", "--quiet=true"]


@pytest.fixture(scope="module", autouse=True)
def theirs(tmp_path_factory):
    """The networks whose weights the hub has."""
    with pytest.MonkeyPatch.context() as patch, local_hub(patch, tmp_path_factory.mktemp("hub")) as (hub, _):
        narrow(patch, {"vit_small_patch16_dinov3": VIT, "convnext_tiny": CONVNEXT})
        models = {}
        for name in (TINY, DINOV3, DINOV3_CONVNEXT):
            models[name], file = weights(name)
            hub.put(f"timm/{name}", model__safetensors=file)
        yield models


def train(photos, folder, name, *more):
    main(["train", str(photos), f"--encoder.name={name}", "--encoder.pretrained=true", f"--run={folder}", *FEW, *more])
    return folder


def moved(run, name):
    """The names of the weights that a training has changed."""
    after, before = load_file(run / "encoder.safetensors"), Encoder(name, pretrained=True).backbone.state_dict()
    assert after.keys() == before.keys()
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def images(size, count=2):
    return normal(0, count, 3, size, size, dtype=torch.float32)


def test_a_convnext_is_trained_as_a_vit_is(photos, tmp_path):
    run = train(photos, tmp_path / "r", TINY)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["optimizer"], settings["encoder_rate"], settings["layer_decay"]) == ("adamw", 0.1, 0.75)
    assert (settings["encoder"]["drop_path"], settings["views"]["size"]) == (0.1, 112)
    assert float(metrics(run)[0]["knn"]) >= 0
    assert {key.split(".")[0] for key in moved(run, TINY)} == {"stem", "stages", "head"}
    encoder = load_encoder(run)
    assert (encoder.view.size, encoder.licence) == (112, "apache-2.0")


def test_dinov3_is_opened_by_name_in_another_size_than_its_own(theirs):
    encoder = open_encoder(f"timm:{DINOV3},size=96")
    assert (encoder.view.size, encoder.fixed_size, encoder.licence) == (96, 96, "dinov3-license")
    assert open_encoder(f"timm:{DINOV3}").view.size == 256
    torch.testing.assert_close(encoder(images(96)), theirs[DINOV3](images(96)))  # timm takes any size
    token = Encoder(DINOV3, pretrained=True, pool="token").eval()
    assert torch.equal(token(images(256)), theirs[DINOV3].forward_features(images(256))[:, 0])
    with pytest.raises(UserError, match="takes images of whole patches of 16 pixels, not 100: give 96"):
        open_encoder(f"timm:{DINOV3},size=100")


@pytest.mark.parametrize("name", [DINOV3, DINOV3_CONVNEXT])
def test_dinov3_embeds_images(name, tmp_path, theirs):
    photos = write_images(tmp_path / "photos", count=2, size=(64, 64))
    table = crosslevel.embed(f"timm:{name},size=64", photos, tmp_path / "t.parquet", workers=0, quiet=True)
    rows = pq.read_table(table).to_pydict()
    pixels = [torch.from_numpy(np.array(Image.open(photos / path))).permute(2, 0, 1) for path in rows["path"]]
    model, config = theirs[name], timm.get_pretrained_cfg(name)
    with torch.no_grad():
        shown = normalize(torch.stack(pixels), View(64, config.mean, config.std))
        features = model.forward_head(model.forward_features(shown), pre_logits=True)
    np.testing.assert_allclose(np.array(rows["feature"]), features.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("all", lambda key: True),
        ("last:1", lambda key: key.startswith(("blocks.1.", "norm."))),
        ("norm", lambda key: "norm" in key),
        ("lora", lambda key: key.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight"))),
    ],
)
def test_a_training_from_dinov3(what, trained, photos, tmp_path):
    run = train(photos, tmp_path / "r", DINOV3, f"--encoder.train={what}", "--encoder.image_size=32")
    assert int(metrics(run)[-1]["step"]) == 2
    changed = moved(run, DINOV3)
    assert changed
    assert all(map(trained, changed)), changed
    assert "patch_embed.proj.weight" in changed or what != "all"
    encoder = load_encoder(run)
    assert (encoder.view.size, encoder.licence) == (32, "dinov3-license")
    assert encoder(images(32)).isfinite().all()


@pytest.mark.parametrize("what", ["last:1", "lora"])
def test_a_training_from_dinov3_as_a_convnext(what, photos, tmp_path):
    changed = moved(train(photos, tmp_path / "r", DINOV3_CONVNEXT, f"--encoder.train={what}"), DINOV3_CONVNEXT)
    assert changed
    where = {"last:1": ("stages.3.", "head.norm."), "lora": ("stages.",)}[what]
    assert all(key.startswith(where) for key in changed), changed
    assert what == "last:1" or all(key.endswith((".fc1.weight", ".fc2.weight")) for key in changed)


def test_dinos_small_crops_are_taken_by_dinov3(photos, tmp_path):
    method = ["--method=DINO", "--method.small_views=2", "--method.outputs=64", "--encoder.train=last:1"]
    run = train(photos, tmp_path / "r", DINOV3, "--encoder.image_size=64", *method)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["views"]["size"], settings["views"]["small_size"]) == (64, 32)
    assert moved(run, DINOV3)
